"""Evaluations that a fine-tuning job names: of its checkpoints and its end, the best of them kept; killed in the middle."""
import json
import time

import openai
import pytest

from conftest import PATIENCE, STORIES, Server, upload, wait_for

SOUNDS = [json.loads(line) for line in STORIES.splitlines()]
TASK = {"task": "sounds", "splits": {"test": [{"file": "sounds.jsonl", "format": "jsonl"}]}, "documents": "test",
        "fewshot": {"from": ["test"]}, "context": "{prompt}", "choices": "{choices}", "gold": "{gold}", "target_delimiter": "",
        "metrics": ["acc", "acc_norm"]}
DOCUMENTS = "".join(json.dumps({"prompt": row["prompt"], "choices": [row["completion"], SOUNDS[i - 1]["completion"]], "gold": 0}) + "\n"
                    for i, row in enumerate(SOUNDS))
HYPERPARAMETERS = {"n_epochs": 20, "max_steps": 6, "batch_size": 4, "max_seq_len": 64, "packing": False, "learning_rate": 2e-3,
                   "checkpoint_steps": 2, "keep_checkpoints": 1, "lora": {"rank": 2}}


def prepare(server):
    client = server.openai()
    client.files.create(file=("sounds.json", json.dumps(TASK).encode()), purpose="evals")
    client.files.create(file=("sounds.jsonl", DOCUMENTS.encode()), purpose="evals")
    return client


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("job-evaluations")).start()
    client = prepare(server)
    client.adderd = server
    yield client
    assert server.stop() == 0, server.text_log()


def start(client, evaluations, **hyperparameters):
    return client.fine_tuning.jobs.create(model="hatchling", training_file=upload(client), seed=3, extra_body={
        "hyperparameters": {**HYPERPARAMETERS, **hyperparameters}, "evaluations": {"tasks": ["sounds"], **evaluations}})


def evaluation(server, made):
    return server.get(f"/v1/evaluations/{made['id']}").json()


def messages(client, job):
    return [event.message for event in client.fine_tuning.jobs.list_events(job, limit=100)][::-1]


@pytest.mark.tsan
def test_at_the_end(client):
    job = start(client, {"num_fewshot": [0, 2], "limit": 4})
    assert job.evaluations == {"tasks": ["sounds"], "num_fewshot": [0, 2], "limit": 4, "max_length": None, "reuse_states": True,
                               "seed": 1234, "precision": ["auto"], "at": ["end"], "keep_best": None, "jobs": []}
    ended = wait_for(client, job.id, "succeeded")
    (made,) = ended.evaluations["jobs"]
    assert made["model"] == ended.fine_tuned_model
    state = evaluation(client.adderd, made)
    assert state["status"] == "succeeded" and state["fine_tuning_job"] == job.id and state["finished_at"] <= ended.finished_at
    assert [row["num_fewshot"] for row in state["results"]] == [0, 2]
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
    (outcome,) = [event for event in events if event.data and "evaluation" in event.data]
    assert outcome.data["evaluation"] == made["id"] and outcome.data["results"] == state["results"]
    assert events[0].message.startswith("The job has successfully completed")
    assert len(list(client.fine_tuning.jobs.checkpoints.list(job.id))) == 1  # as keep_checkpoints has it
    assert client.completions.create(model=ended.fine_tuned_model, prompt="Q:", max_tokens=1).choices


def test_the_best_is_kept(client):
    job = start(client, {"keep_best": {"metric": "acc_norm"}})
    assert job.evaluations["at"] == ["checkpoints"] and job.evaluations["keep_best"] == {
        "task": "sounds", "metric": "acc_norm", "num_fewshot": 0}
    ended = wait_for(client, job.id, "succeeded")
    checkpoints = {c.fine_tuned_model_checkpoint: c.step_number for c in client.fine_tuning.jobs.checkpoints.list(job.id)}
    assert sorted(checkpoints.values()) == [2, 4, 6]
    scores = {made["model"]: evaluation(client.adderd, made)["results"][0]["acc_norm"] for made in ended.evaluations["jobs"]}
    assert [checkpoints[model] for model in scores] == [2, 4, 6]  # the last of them is what training ended with
    best = max(scores.values())
    assert ended.fine_tuned_model == next(model for model, score in scores.items() if score == best)
    assert client.completions.create(model=ended.fine_tuned_model, prompt="Q:", max_tokens=1).choices
    assert any(message.startswith(f"The best is {ended.fine_tuned_model}") for message in messages(client, job.id))


def test_what_training_ends_with_is_a_candidate(client):
    job = start(client, {"keep_best": {"metric": "acc"}}, max_steps=3)
    ended = wait_for(client, job.id, "succeeded")
    assert [made["model"].endswith(":ckpt-step-2") for made in ended.evaluations["jobs"]] == [True, False]


def test_cancelled_with_its_evaluations(client):
    job = start(client, {"num_fewshot": [4, 5, 6, 7]})
    while not (jobs := client.fine_tuning.jobs.retrieve(job.id).evaluations["jobs"]):
        time.sleep(0.01)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    time.sleep(0.1)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "running"
    try:
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    except openai.BadRequestError:  # the evaluation was faster
        return
    assert evaluation(client.adderd, jobs[0])["status"] in ("cancelled", "succeeded")
    assert jobs[0]["model"] not in [model.id for model in client.models.list()]


@pytest.mark.parametrize("evaluations,param", [
    ({"tasks": ["no_such_task"]}, "evaluations.tasks"),
    ({"tasks": []}, "evaluations.tasks"),
    ({"model": "hatchling"}, "evaluations.model"),
    ({"precision": "bf16"}, "evaluations.precision"),
    ({"at": "step"}, "evaluations.at"),
    ({"at": "end", "keep_best": {"metric": "acc"}}, "evaluations.at"),
    ({"keep_best": {}}, "evaluations.keep_best.metric"),
    ({"keep_best": {"metric": "acc", "num_fewshot": 1}}, "evaluations.keep_best.num_fewshot"),
    ({"keep_best": {"metric": "acc", "task": "piqa"}}, "evaluations.keep_best.task"),
])
def test_refused(client, evaluations, param):
    answer = client.adderd.send("POST", "/v1/fine_tuning/jobs", {
        "model": "hatchling", "training_file": upload(client), "evaluations": {"tasks": ["sounds"], **evaluations}})
    assert answer.status == 400 and answer.json()["error"]["param"] == param, answer.body


def test_killed_between_checkpoint_and_evaluation(own_server):
    """kill -9 of the daemon as soon as there is a checkpoint, then when training is done: nothing is evaluated twice, nothing left out."""
    server = own_server()
    client = prepare(server)
    job = start(client, {"num_fewshot": [0, 3], "keep_best": {"metric": "acc_norm", "num_fewshot": 3}}).id
    for wanted in ("Checkpoint at step", "Training is done"):
        deadline = time.monotonic() + 60 * PATIENCE
        while not any(message.startswith(wanted) for message in messages(client, job)):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        server.kill()
        server.start()
        client = server.openai()
    ended = wait_for(client, job, "succeeded")
    assert [made["model"][-1] for made in ended.evaluations["jobs"]] == ["2", "4", "6"]
    assert all(evaluation(server, made)["status"] == "succeeded" for made in ended.evaluations["jobs"])
    assert messages(client, job).count("Training is done; the job ends with its evaluations") == 1
