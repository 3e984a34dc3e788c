"""/v1/evaluations: the same prompts, scores and results as stock lm-evaluation-harness; states, resumption, refusals.

ADDERD_EVAL_DATA names a folder with real documents; without it they are made up. ADDERD_EVAL_LIMIT: documents of a task."""
import http.server
import json
import math
import os
import pathlib
import shutil
import threading
import time
import urllib.error
import urllib.request

import pytest

import evaluation_data
from conftest import PATIENCE, SOURCE

DATA = os.environ.get("ADDERD_EVAL_DATA")
SUBJECT = "mmlu_world_religions" if DATA else "mmlu_anatomy"
LIMIT = int(os.environ.get("ADDERD_EVAL_LIMIT", "200" if DATA else "10"))


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    if DATA:
        return pathlib.Path(DATA)
    folder = tmp_path_factory.mktemp("documents")
    evaluation_data.Writer(folder, 12).write()
    return folder


def flags(documents):
    return "--eval-data-dir", str(documents), "--tasks-dir", str(SOURCE / "tasks")


@pytest.fixture(scope="module")
def evaluator(documents, tmp_path_factory):
    """A daemon that finds the documents, for all tests here that do not restart it."""
    from conftest import Server
    server = Server(tmp_path_factory.mktemp("evaluator"), *flags(documents)).start()
    yield server
    assert server.stop() == 0, server.text_log()


def create(server, **body):
    answer = server.send("POST", "/v1/evaluations", {"model": "hatchling", **body})
    assert answer.status == 200, answer.body
    return answer.json()["id"]


def get(server, evaluation, rest=""):
    return server.get(f"/v1/evaluations/{evaluation}{rest}").json()


def wait(server, evaluation, *statuses, timeout=300):
    deadline = time.monotonic() + timeout * PATIENCE
    while time.monotonic() < deadline:
        state = get(server, evaluation)
        if state["status"] in statuses:
            return state
        if state["status"] in ("succeeded", "failed", "cancelled"):
            break
        time.sleep(0.05)
    raise AssertionError(f"evaluation is {state['status']}, not {statuses}: {state['error']}")


def run(server, **body):
    return wait(server, create(server, **body), "succeeded", timeout=3000)


def examples(server, evaluation):
    answer = server.get(f"/v1/evaluations/{evaluation}/results")
    assert answer.headers["Content-Type"] == "application/jsonl"
    rows = [json.loads(line) for line in answer.body.decode().splitlines()]
    return {(row["model"], row["task"], row["num_fewshot"], row["doc"]): row for row in rows}


def by_unit(state):
    return {(row["model"], row["task"], row["num_fewshot"]): row for row in state["results"]}


# ---- parity ----

class Recorder:
    """Stands between the harness and the server, and keeps the prompts that are sent."""

    def __init__(self, base):
        prompts = self.prompts = set()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
                if self.path == "/v1/completions":
                    prompts.update(tuple(ids) for ids in json.loads(body)["prompt"])
                request = urllib.request.Request(base + self.path, data=body, method=self.command,
                                                 headers={"Content-Type": "application/json"})
                try:
                    answer = urllib.request.urlopen(request, timeout=600)
                except urllib.error.HTTPError as error:
                    answer = error
                with answer:
                    content = answer.read()
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = forward

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def harness(base, model, tasks, folder, shots):
    """Run stock lm_eval. Returns its results by task, and its samples by task."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    answer = lm_eval.simple_evaluate(
        model="local-completions", tasks=tasks, task_manager=TaskManager(include_path=str(folder)), num_fewshot=shots, limit=LIMIT,
        batch_size=8, log_samples=True, bootstrap_iters=2,
        model_args={"model": model, "base_url": f"{base}/v1/completions", "tokenizer_backend": "remote", "tokenized_requests": True,
                    "num_concurrent": 4, "max_retries": 3, "max_length": 1000000, "timeout": 600})
    return answer["results"], answer["samples"]


@pytest.fixture(scope="module")
def tuned(evaluator):
    """An adapter on the evaluator."""
    from conftest import upload, wait_for
    client = evaluator.openai()
    job = client.fine_tuning.jobs.create(
        model="hatchling", training_file=upload(client), suffix="sounds", seed=7,
        extra_body={"hyperparameters": {"n_epochs": 3, "batch_size": 4, "learning_rate": 5e-3, "max_seq_len": 64, "packing": False}})
    return wait_for(client, job.id, "succeeded").fine_tuned_model


@pytest.mark.slow
@pytest.mark.parametrize("what,shots", [("base", 0), ("base", 3), ("adapter", 3)] + ([("adapter", 0)] if DATA else []))
def test_equal_to_the_harness(evaluator, documents, tuned, tmp_path, monkeypatch, what, shots):
    for variable, value in (("HF_HOME", str(tmp_path / "hf")), ("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1")):
        monkeypatch.setenv(variable, value)
    import lm_eval
    model = {"base": "hatchling", "adapter": tuned}[what]
    names = evaluation_data.harness_tasks(documents, tmp_path / "tasks", pathlib.Path(lm_eval.__file__).parent / "tasks")
    assert len(names) >= 9
    recorder = Recorder(evaluator.base)
    theirs, samples = harness(recorder.base, model, list(names.values()), tmp_path / "tasks", shots)
    recorder.server.shutdown()
    state = run(evaluator, model=model, tasks=list(names), num_fewshot=shots, limit=LIMIT)
    ours, units = examples(evaluator, state["id"]), by_unit(state)
    prompts, largest = set(), 0
    for name, other in names.items():
        for sample in samples[other]:
            doc = sample["doc_id"]
            row = ours.pop((model, name, shots, doc))
            assert len(row["choices"]) == len(sample["resps"])
            for choice, response in zip(row["choices"], sample["resps"]):
                prompts.add(tuple(choice.get("context_ids", row.get("context_ids")) + choice["ids"]))
                largest = max(largest, abs(choice["log_likelihood"] - float(response[0][0])))
                assert choice["greedy"] == (str(response[0][1]) == "True")
            for metric in ("acc", "acc_norm"):
                if metric in sample:
                    assert row[metric] == sample[metric], (name, doc)
        unit, result = units[model, name, shots], theirs[other]
        for metric in ("acc", "acc_norm"):
            if f"{metric},none" in result:
                assert unit[metric] == pytest.approx(result[f"{metric},none"], abs=1e-12)
                assert unit[f"{metric}_stderr"] == pytest.approx(result[f"{metric}_stderr,none"], rel=1e-6)
        if "perplexity,none" in result:
            assert unit["perplexity"] == pytest.approx(result["perplexity,none"], rel=1e-4)
    assert not ours, list(ours)[:3]
    assert prompts == recorder.prompts
    assert largest < 1e-3


# ---- what it costs, and what it depends on ----

@pytest.mark.slow
def test_states_are_reused(evaluator):
    """The same scores, from fewer tokens."""
    body = {"tasks": ["arc_easy", "winogrande", SUBJECT], "num_fewshot": [0, 2], "limit": 4}
    shared, alone = run(evaluator, **body), run(evaluator, reuse_states=False, **body)
    assert examples(evaluator, shared["id"]) == examples(evaluator, alone["id"])
    for unit, row in by_unit(shared).items():
        other = by_unit(alone)[unit]
        assert row["tokens"] == other["tokens"] == other["tokens_run"]
        assert row["tokens_run"] < row["tokens"]
        assert {k: v for k, v in row.items() if k not in ("tokens_run", "seconds")} == {
            k: v for k, v in other.items() if k not in ("tokens_run", "seconds")}


@pytest.mark.slow
def test_limits_shots_and_models(evaluator):
    """A limit takes the first documents and leaves their examples alone; units are what was asked for."""
    small, large = (run(evaluator, tasks=["piqa", "arc_easy"], num_fewshot=[2, 0], limit=n) for n in (3, 6))
    few, many = examples(evaluator, small["id"]), examples(evaluator, large["id"])
    assert len(few) == 12 and len(many) == 24
    for key, row in few.items():
        assert many[key] == row
    assert small["progress"]["examples"] == small["progress"]["total_examples"] == 12
    other = run(evaluator, tasks=["piqa"], num_fewshot=2, limit=3, seed=99)
    assert examples(evaluator, other["id"]) != {k: v for k, v in few.items() if k[1:3] == ("piqa", 2)}


def test_max_length(evaluator):
    state = run(evaluator, tasks=["piqa"], num_fewshot=2, limit=3, max_length=40)
    for row in examples(evaluator, state["id"]).values():
        for choice in row["choices"]:
            assert len(choice.get("context_ids", row.get("context_ids")) + choice["ids"]) == 39


@pytest.mark.slow
def test_report(evaluator, tuned):
    state = run(evaluator, model=["hatchling", tuned], tasks=["arc_easy", SUBJECT], num_fewshot=[0, 1, 3], limit=8)
    report, units = get(evaluator, state["id"], "/report"), by_unit(state)
    assert [table["model"] for table in report["tables"]] == ["hatchling", tuned]
    aipss = []
    for table in report["tables"]:
        model, of_tasks = table["model"], []
        assert {task["task"] for task in table["tasks"]} == {"arc_easy", "mmlu"}
        for task in table["tasks"]:
            scores = {shots: units[model, task["task"], shots][task["metric"]] for shots in (0, 1, 3)}
            assert task["scores"] == {str(shots): score for shots, score in scores.items()}
            assert task["metric"] == ("acc_norm" if task["task"] == "arc_easy" else "acc")
            if not scores[0]:
                assert task["aipss"] is None
                continue
            gains = [(scores[shots] - scores[0]) / scores[0] for shots in (1, 3)]
            assert list(task["relative_gain"].values()) == pytest.approx(gains)
            assert task["aipss"] == pytest.approx(sum(gains) / 2)
            of_tasks.append(sum(gains) / 2)
        aipss.append(sum(of_tasks) / len(of_tasks) if of_tasks else None)
        assert table["aipss"] == (pytest.approx(aipss[-1]) if of_tasks else None)
    if None not in aipss and aipss[0] > 0:
        assert report["shares"] == [{"model": tuned, "of": "hatchling", "precision": "fp32", "share": pytest.approx(aipss[1] / aipss[0])}]
    assert report["divergence"] == []


@pytest.mark.slow
def test_groups_weigh_examples_and_subtasks(evaluator):
    if DATA:
        pytest.skip("not all subjects are there")
    state = run(evaluator, tasks=["mmlu_anatomy", "mmlu_high_school_us_history"], limit=9)
    units = by_unit(state)
    parts = [units["hatchling", f"mmlu_{subject}", 0] for subject in evaluation_data.SUBJECTS]
    whole, n = units["hatchling", "mmlu", 0], sum(part["n"] for part in parts)
    assert whole["subtasks"] == 2 and whole["n"] == n == 18
    assert whole["acc"] == pytest.approx(sum(part["acc"] * part["n"] for part in parts) / n)
    assert whole["acc_macro"] == pytest.approx(sum(part["acc"] for part in parts) / 2)
    assert whole["acc_macro_stderr"] == pytest.approx(math.sqrt(sum(part["acc_stderr"] ** 2 for part in parts)) / 2)
    pooled = sum((part["n"] - 1) * part["acc_stderr"] ** 2 * part["n"] for part in parts) / (n - 2)
    assert whole["acc_stderr"] == pytest.approx(math.sqrt(pooled / n))
    assert units["hatchling", "mmlu_stem", 0]["n"] == parts[0]["n"]


# ---- tasks of one's own ----

COUNTING = {"task": "counting", "splits": {"test": [{"file": "counting.jsonl", "format": "jsonl"}]}, "documents": "test",
            "fewshot": {"from": ["test"]}, "context": "After {n} comes", "choices": ["{a}", "{b}"], "gold": "{gold}", "metrics": ["acc"]}
COUNTS = b"".join(json.dumps({"n": i, "a": str(i + 1), "b": str(i + 2), "gold": 0}).encode() + b"\n" for i in range(6))


def put(server, name, content):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return server.openai().files.create(file=(name, content), purpose="evals").id


def test_uploaded_task(evaluator):
    put(evaluator, "counting.jsonl", COUNTS)
    definition = put(evaluator, "counting.json", COUNTING)
    by_name, by_id = (run(evaluator, tasks=[task], num_fewshot=[0, 2]) for task in ("counting", definition))
    rows = examples(evaluator, by_name["id"])
    assert len(rows) == 12 and rows == examples(evaluator, by_id["id"])
    assert by_unit(by_name)["hatchling", "counting", 2]["fewshot_file"] == "counting.jsonl"
    text = evaluator.send("POST", "/detokenize", {"tokens": rows["hatchling", "counting", 0, 3]["context_ids"]}).json()["prompt"]
    assert text == "After 3 comes"


def test_uploaded_again(evaluator):
    """The newest file of a name counts; an id is that file, whatever was uploaded since."""
    put(evaluator, "counting.jsonl", COUNTS)
    first = put(evaluator, "counting.json", COUNTING)
    put(evaluator, "counting.json", {**COUNTING, "context": "Before {n} is"})
    old, new = (run(evaluator, tasks=[task], limit=1) for task in (first, "counting"))
    contexts = [examples(evaluator, state["id"])["hatchling", "counting", 0, 0]["context_ids"] for state in (old, new)]
    assert contexts[0] != contexts[1]


def test_too_many_results(evaluator):
    put(evaluator, "counting.jsonl", COUNTS)
    groups = {f"g{i}": [f"s{i}_{j}" for j in range(128)] for i in range(8)}
    tasks = [put(evaluator, f"many_{i}.json", {**COUNTING, "task": f"many_{i}", "subtasks": {"field": "s", "groups": groups}}) for i in range(2)]
    state = wait(evaluator, create(evaluator, tasks=tasks, num_fewshot=list(range(9))), "failed")
    assert "more than 16384 results" in state["error"]["message"]


@pytest.mark.parametrize("name,change,message", [
    ("missing", {"context": None}, "the definition of counting_missing: context: missing"),
    ("template", {"context": "{n|up}"}, "the definition of counting_template: context: column 4: no filter is called 'up'"),
    ("field", {"context": "{m}"}, "counting_field at 0 shots: counting.jsonl line 1: context: {m}: there is no field 'm'"),
    ("gold", {"gold": "{n}"}, "counting_gold at 0 shots: counting.jsonl line 3: gold: 2 is outside the choices 0 to 1"),
    ("file", {"splits": {"test": [{"file": "none.jsonl", "format": "jsonl"}]}, "source": "example.org"},
     "counting_file at 0 shots: counting_file wants the file none.jsonl, from example.org"),
])
def test_definitions_are_refused_with_the_place(evaluator, name, change, message):
    definition = {key: value for key, value in {**COUNTING, **change, "task": f"counting_{name}"}.items() if value is not None}
    put(evaluator, "counting.jsonl", COUNTS)
    put(evaluator, f"counting_{name}.json", definition)
    state = wait(evaluator, create(evaluator, tasks=[f"counting_{name}"]), "failed")
    assert state["error"]["message"] == message


@pytest.mark.parametrize("body,param", [
    ({}, "tasks"),
    ({"tasks": []}, "tasks"),
    ({"tasks": ["piqa", "piqa"]}, "tasks"),
    ({"tasks": ["no_such_task"]}, "tasks"),
    ({"tasks": ["../tasks/piqa"]}, "tasks"),
    ({"tasks": ["piqa"], "model": "nobody"}, "model"),
    ({"tasks": ["piqa"], "num_fewshot": -1}, "num_fewshot"),
    ({"tasks": ["piqa"], "num_fewshot": [0, 0]}, "num_fewshot"),
    ({"tasks": ["piqa"], "limit": 0}, "limit"),
    ({"tasks": ["piqa"], "precision": "int8"}, "precision"),
    ({"tasks": ["piqa"], "precision": ["auto", "fp32"]}, "precision"),
    ({"tasks": ["piqa"], "precision": ["fp32", "bf16"]}, "precision"),  # the CPU has fp32 alone
    ({"tasks": ["piqa"], "shots": 1}, "shots"),
    ({"tasks": ["piqa"], "metadata": {"a": 1}}, "metadata"),
])
def test_requests_that_are_refused(evaluator, body, param):
    answer = evaluator.send("POST", "/v1/evaluations", {"model": "hatchling", **body})
    assert answer.status == 400 and answer.json()["error"]["param"] == param


# ---- states ----

def test_lists_and_kinds(evaluator):
    ids = [create(evaluator, tasks=["piqa"], limit=2, metadata={"n": str(n)}) for n in range(3)]
    for evaluation in ids:
        wait(evaluator, evaluation, "succeeded")
    page = evaluator.get("/v1/evaluations?limit=2").json()
    assert [e["id"] for e in page["data"]] == [ids[2], ids[1]] and page["has_more"]
    page = evaluator.get(f"/v1/evaluations?limit=2&after={ids[1]}").json()
    assert page["data"][0]["id"] == ids[0] and page["data"][0]["results"] is None
    assert [e["id"] for e in evaluator.get("/v1/evaluations?metadata[n]=1").json()["data"]] == [ids[1]]
    assert not [job for job in evaluator.get("/v1/fine_tuning/jobs").json()["data"] if job["id"] in ids]
    for path in (f"/v1/fine_tuning/jobs/{ids[0]}", f"/v1/fine_tuning/jobs/{ids[0]}/events", "/v1/evaluations/eval-none",
                 "/v1/evaluations/eval-none/report", "/v1/evaluations/eval-none/results", "/v1/evaluations/eval-none/events"):
        assert evaluator.get(path).status == 404
    assert evaluator.send("POST", f"/v1/evaluations/{ids[0]}/cancel").json()["error"]["code"] == "job_already_ended"


def test_events(evaluator):
    evaluation = run(evaluator, tasks=["piqa"], num_fewshot=1, limit=5)["id"]
    events = get(evaluator, evaluation, "/events?order=asc&limit=100")["data"]
    assert all(event["object"] == "evaluation.event" for event in events)
    assert [(event["level"], event["message"]) for event in events][:3] == [
        ("info", f"Created evaluation: {evaluation}"),
        ("warn", "piqa takes its examples from piqa_valid.jsonl: there is no file of the split train"),
        ("info", "Tasks validated: 5 examples")]
    assert events[-1]["message"] == "The evaluation has successfully completed: 5 examples"
    assert [event["data"]["examples"] for event in events if event["type"] == "metrics"][-1] == 5
    stream = evaluator.get(f"/v1/evaluations/{evaluation}/events?stream=true").body.decode()
    assert stream.count("data: {") == len(events) and stream.endswith("data: [DONE]\n\n")


def busy(documents):
    """Enough work to be interrupted."""
    return {"tasks": ["arc_easy", "piqa"], "num_fewshot": [3, 5], "limit": 10}


def test_pause_resume_cancel(evaluator, documents):
    reference = run(evaluator, **busy(documents))
    evaluation = create(evaluator, **busy(documents))
    wait(evaluator, evaluation, "running")
    while not get(evaluator, evaluation)["progress"]["examples"]:
        time.sleep(0.01)
    assert evaluator.send("POST", f"/v1/evaluations/{evaluation}/pause").json()["status"] == "paused"
    paused = get(evaluator, evaluation)["progress"]["examples"]
    assert 0 < paused < 40
    assert evaluator.send("POST", f"/v1/evaluations/{evaluation}/resume").json()["status"] in ("queued", "running")
    wait(evaluator, evaluation, "succeeded")
    assert examples(evaluator, evaluation) == examples(evaluator, reference["id"])
    cancelled = create(evaluator, **busy(documents))
    wait(evaluator, cancelled, "running")
    assert evaluator.send("POST", f"/v1/evaluations/{cancelled}/cancel").json()["status"] == "cancelled"


def test_killed_and_resumed(own_server, documents):
    """kill -9 of the daemon, then of a worker: the results are those of a run that was left alone."""
    server = own_server(*flags(documents))
    reference = run(server, **busy(documents))
    evaluation = create(server, **busy(documents))
    wait(server, evaluation, "running")
    while get(server, evaluation)["progress"]["examples"] < 5:
        time.sleep(0.01)
    server.kill()
    server.start()
    stored = len(examples(server, evaluation))
    assert stored > 0
    while get(server, evaluation)["progress"]["examples"] <= stored + 3:
        time.sleep(0.01)
    os.kill(server.worker_pids()[0], 9)
    state = wait(server, evaluation, "succeeded")
    assert examples(server, evaluation) == examples(server, reference["id"])
    for unit, row in by_unit(state).items():
        other = by_unit(reference)[unit]
        assert {k: v for k, v in row.items() if not k.startswith("token") and k != "seconds"} == {
            k: v for k, v in other.items() if not k.startswith("token") and k != "seconds"}


def test_documents_that_change_meanwhile(own_server, documents, tmp_path):
    """What was validated is what is scored: an evaluation that finds other documents when it begins fails."""
    folder = tmp_path / "documents"
    shutil.copytree(documents, folder)
    (folder / "counting.jsonl").write_bytes(COUNTS)
    server = own_server(*flags(folder))
    put(server, "counting.json", COUNTING)
    first = create(server, **busy(folder))
    wait(server, first, "running")
    evaluation = create(server, tasks=["counting"], num_fewshot=[0, 2])
    wait(server, evaluation, "queued")
    (folder / "counting.jsonl").write_bytes(COUNTS[:COUNTS.index(b"\n") * 4 + 4])
    server.send("POST", f"/v1/evaluations/{first}/cancel")
    assert wait(server, evaluation, "failed")["error"]["message"] == (
        "there are 8 examples now and were 12: a task's definition or its documents changed meanwhile")


def test_completions_are_served_meanwhile(evaluator, documents):
    evaluation = create(evaluator, **busy(documents))
    wait(evaluator, evaluation, "running")
    answer = evaluator.send("POST", "/v1/completions", {"prompt": "Once upon", "max_tokens": 4, "temperature": 0})
    assert answer.status == 200
    assert get(evaluator, evaluation)["status"] == "running"
    wait(evaluator, evaluation, "succeeded")


@pytest.mark.slow
def test_a_model_under_evaluation_is_not_deleted(evaluator, tuned, documents):
    evaluation = create(evaluator, model=["hatchling", tuned], **busy(documents))
    assert evaluator.send("DELETE", f"/v1/models/{tuned}").status == 400
    evaluator.send("POST", f"/v1/evaluations/{evaluation}/cancel")
