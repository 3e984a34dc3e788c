"""Whatever a client sends: a clear error in OpenAI's shape, nothing lost, nothing half-written."""
import json
import shutil
import socket
import struct
import time

import pytest

from conftest import PATIENCE, SOURCE, STORIES, jsonl, upload, wait_for


def refused(answer, status, *words, param=None, code=None):
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/json" and answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error
    if param:
        assert error["param"] == param, error
    return error


def job(server, file, hyperparameters=None, **more):
    body = {"model": "hatchling", "training_file": file, **more}
    if hyperparameters is not None:
        body["method"] = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    return server.send("POST", "/v1/fine_tuning/jobs", body)


@pytest.mark.tsan
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "hatchling"', b'{"a": 1, "a": 2}', b"\xff\xfe", b"[" * 5000])
def test_malformed_json(server, body):
    for path in ("/v1/completions", "/v1/fine_tuning/jobs", "/v1/chat/completions", "/tokenize"):
        refused(server.send("POST", path, body, {"Content-Type": "application/json"}), 400)


def test_oversized_json(own_server):
    server = own_server("--max-body-bytes", "100000")
    refused(server.send("POST", "/v1/completions", {"prompt": "x" * 200000}), 413)
    assert server.get("/healthz").status == 200


@pytest.mark.parametrize("body, param", [
    ({"temperature": 3}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"top_p": 0}, "top_p"), ({"n": 0}, "n"),
    ({"max_tokens": -1}, "max_tokens"), ({"logprobs": 1000}, "logprobs"), ({"suffix": "x"}, "suffix"), ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [1, "two"]}, "prompt"), ({"prompt": [999999]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"stop": 5}, "stop"), ({"seed": "x"}, "seed"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"frequency_penalty": 9}, "frequency_penalty"), ({"top_k": -5}, "top_k"),
])
def test_completion_values(server, body, param):
    error = refused(server.send("POST", "/v1/completions", {"model": "hatchling", "prompt": "a", "max_tokens": 2, **body}), 400)
    assert error["param"] and error["param"].startswith(param), error


def test_unknown_model(server):
    refused(server.send("POST", "/v1/completions", {"model": "gpt-9", "prompt": "a"}), 404, "gpt-9")
    refused(server.send("POST", "/v1/completions", {"model": "hatchling", "prompt": "a", "adapter": "ft:none"}), 404, "ft:none")
    file = upload(server.openai())
    refused(job(server, file, model="gpt-9"), 400, "gpt-9", param="model")


@pytest.mark.parametrize("hyperparameters, words", [
    ({"colour": "red"}, ["colour"]), ({"lora": {"rnak": 8}}, ["rnak"]), ({"learning_rate": -1}, ["learning_rate"]), ({"n_epochs": 0}, ["n_epochs", "1"]),
    ({"lora": {"rank": 100000}}, ["rank"]), ({"lora": {"targets": ["q_proj"]}}, ["q_proj"]), ({"precision": "int3"}, ["precision", "fp32"]),
    ({"lr_schedule": "bumpy"}, ["lr_schedule", "cosine"]), ({"max_seq_len": 1}, ["max_seq_len"]), ({"batch_size": "many"}, ["batch_size"]),
    ({"optimizer": {"betas": [0.9]}}, ["betas"]), ({"early_stopping": {"patience": 0}}, ["patience"]), ({"lora": {"dropout": 1.0}}, ["dropout"]),
])
def test_hyperparameters(server, hyperparameters, words):
    refused(job(server, "file-none", hyperparameters), 400, *words)


def test_job_files(server):
    client = server.openai()
    refused(job(server, "file-none"), 400, "file-none", param="training_file")
    other = client.files.create(file=("x.txt", b"hello"), purpose="user_data").id
    refused(job(server, other), 400, "purpose", param="training_file")
    good = upload(client)
    refused(job(server, good, validation_file="file-none"), 400, param="validation_file")
    refused(server.send("POST", "/v1/fine_tuning/jobs", {"training_file": good}), 400, "model")
    refused(server.send("POST", "/v1/fine_tuning/jobs", {"model": "hatchling", "training_file": good, "method": {"type": "dpo"}}), 400, "dpo")


def failed_job(server, content, hyperparameters=None):
    client = server.openai()
    answer = job(server, upload(client, content), hyperparameters or {"max_steps": 2})
    assert answer.status == 200, answer.body
    state = wait_for(client, answer.json()["id"], "failed")
    return state, client.fine_tuning.jobs.list_events(state.id, limit=100).data


def test_bad_lines_are_listed(server):
    lines = STORIES.splitlines()[:3] + [b"not json", b'{"prompt": "a"}', b'{"text": "other form"}', b'{"prompt": 1, "completion": "x"}']
    state, events = failed_job(server, b"\n".join(lines))
    assert state.error.param == "training_file"
    for line in (4, 5, 6, 7):
        assert f"line {line}" in state.error.message
        assert any(f"line {line}" in event.message for event in events)


def test_only_the_first_twenty_bad_lines_are_listed(server):
    state, _ = failed_job(server, b"oops\n" * 50)
    assert "50" in state.error.message and "line 20:" in state.error.message and "line 21:" not in state.error.message


def test_long_example_is_named_and_cut_only_when_told(server):
    content = STORIES + jsonl({"prompt": "a", "completion": " word" * 200})
    state, _ = failed_job(server, content, {"max_steps": 1, "max_seq_len": 64})
    assert "line 13" in state.error.message and "64" in state.error.message
    client = server.openai()
    cut = job(server, upload(client, content), {"max_steps": 1, "max_seq_len": 64, "truncate_long_examples": True})
    assert cut.status == 200, cut.body
    wait_for(client, cut.json()["id"], "succeeded")


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_set(server, content):
    client = server.openai()
    if not content:
        answer = raw_upload(server, content)
        if answer.status == 400:
            return
        file = answer.json()["id"]
    else:
        file = upload(client, content)
    state = wait_for(client, job(server, file).json()["id"], "failed")
    assert "no example" in state.error.message or "empty" in state.error.message


def multipart(content, purpose="fine-tune", boundary="frontier"):
    return (f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n--{boundary}\r\nContent-Disposition: form-data; '
            f'name="file"; filename="a.jsonl"\r\n\r\n').encode() + content + f"\r\n--{boundary}--\r\n".encode()


def raw_upload(server, content, **more):
    return server.send("POST", "/v1/files", multipart(content, **more), {"Content-Type": "multipart/form-data; boundary=frontier"})


def test_upload_fields(server):
    refused(raw_upload(server, b"x", purpose="world-domination"), 400, "purpose", param="purpose")
    refused(server.send("POST", "/v1/files", b"hello", {"Content-Type": "text/plain"}), 400, "multipart")
    refused(server.send("POST", "/v1/files", b"--frontier--\r\n", {"Content-Type": "multipart/form-data; boundary=frontier"}), 400, "file")


def test_oversized_upload(own_server):
    server = own_server("--max-upload-bytes", "50000")
    refused(raw_upload(server, b"x" * 200000), 413)
    assert raw_upload(server, b"x" * 1000).status == 200
    assert len(list((server.folder / "data/files").iterdir())) == 1 and not list((server.folder / "data/uploads").iterdir())


def connect(server):
    host, port = server.base[7:].split(":")
    return socket.create_connection((host, int(port)), timeout=30 * PATIENCE)


def test_truncated_upload_leaves_nothing(own_server):
    server = own_server()
    body = multipart(b"x" * 100000)
    with connect(server) as connection:
        connection.sendall(b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=frontier\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body) + body[:60000])
        time.sleep(0.2)
    deadline = time.monotonic() + 10 * PATIENCE
    while list((server.folder / "data/uploads").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list((server.folder / "data/uploads").iterdir()) and not list((server.folder / "data/files").iterdir())
    assert server.openai().files.list().data == []


@pytest.mark.tsan
def test_client_that_leaves_in_mid_stream(own_server):
    server = own_server()
    body = json.dumps({"model": "hatchling", "prompt": "The", "max_tokens": 4000, "stream": True, "ignore_eos": True}).encode()
    for _ in range(3):
        with connect(server) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert b"200" in connection.recv(4096)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    deadline = time.monotonic() + 30 * PATIENCE
    while time.monotonic() < deadline:
        metrics = server.get("/metrics").body.decode()
        if "adder_requests_running 0" in metrics:
            break
        time.sleep(0.1)
    assert "adder_requests_running 0" in metrics
    assert server.openai().completions.create(model="hatchling", prompt="The", max_tokens=2).choices[0].text


def test_unknown_routes_and_methods(server):
    refused(server.get("/v1/nothing"), 404)
    answer = server.send("PUT", "/v1/files", b"")
    refused(answer, 405)
    assert "GET" in answer.headers["Allow"] and "POST" in answer.headers["Allow"]
    refused(server.get("/v1/files/file-none"), 404)
    refused(server.get("/v1/fine_tuning/jobs/ftjob-none"), 404)
    refused(server.get("/v1/fine_tuning/jobs?limit=0"), 400, param="limit")
    refused(server.get("/v1/fine_tuning/jobs?after=ftjob-none"), 400, param="after")


def models_with(tmp_path, **edits):
    """A models directory with hatchling in it, its model.safetensors changed by edits['weights']."""
    folder = tmp_path / "models/hatchling"
    shutil.copytree(SOURCE / "models/hatchling", folder)
    if "weights" in edits:
        path = folder / "model.safetensors"
        path.write_bytes(edits["weights"](path.read_bytes()))
    if "tokenizer" in edits:
        shutil.copy(edits["tokenizer"], folder / "tokenizer.json")
    return tmp_path / "models"


@pytest.mark.parametrize("change, word", [
    (lambda raw: raw[:len(raw) // 2], "model.safetensors"),
    (lambda raw: b"\xff" * 8 + raw[8:], "model.safetensors"),
    (lambda raw: raw[:8] + raw[8:].replace(b"A_log", b"B_log", 1), "log"),
])
def test_corrupt_weights_are_named(own_server, tmp_path, change, word):
    from conftest import Server
    server = Server(tmp_path / "own", models_dir=models_with(tmp_path, weights=change))
    server.start(wait=False)
    try:
        deadline = time.monotonic() + 20 * PATIENCE
        while time.monotonic() < deadline:
            answer = server.send("POST", "/v1/completions", {"model": "hatchling", "prompt": "a"})
            if answer.status != 503 or word in answer.json()["error"]["message"]:
                break
            time.sleep(0.1)
        assert 400 <= answer.status and word in answer.json()["error"]["message"], answer.body
        assert server.get("/readyz").status == 503 and server.get("/healthz").status == 200
    finally:
        server.stop()


def test_tokenizer_that_does_not_fit(tmp_path):
    from conftest import Server
    models = models_with(tmp_path, tokenizer=SOURCE / "tests/vectors/tokenizers/gpt-neox-20b.json")
    server = Server(tmp_path / "own", models_dir=models)
    server.start(wait=False)
    try:
        deadline = time.monotonic() + 20 * PATIENCE
        while time.monotonic() < deadline:
            answer = server.send("POST", "/v1/completions", {"model": "hatchling", "prompt": "a"})
            if "tokenizer" in answer.json()["error"]["message"]:
                break
            time.sleep(0.1)
        assert "tokenizer" in answer.json()["error"]["message"]
    finally:
        server.stop()


def test_diverging_job_fails_at_its_step_and_keeps_the_checkpoint(server):
    client = server.openai()
    answer = job(server, upload(client), {"adaptation": "full", "n_epochs": 50, "max_steps": 60, "learning_rate": 1.0, "max_grad_norm": 0, "warmup_steps": 0,
                                          "lr_schedule": "constant", "checkpoint_steps": 1, "keep_checkpoints": 2, "max_seq_len": 64,
                                          "optimizer": {"weight_decay": 10}})
    assert answer.status == 200, answer.body
    state = wait_for(client, answer.json()["id"], "failed", timeout=180)
    assert "step" in state.error.message and state.error.code == "diverged"
    assert list(client.fine_tuning.jobs.checkpoints.list(state.id))
