"""What an operator looks at: health, metrics, keys, logs, settings."""
import json
import os
import subprocess
import time

import openai
import pytest

from conftest import ADDERD, PATIENCE, SOURCE, upload


@pytest.mark.tsan
def test_health_and_version(server):
    assert server.get("/healthz").status == 200 and server.get("/readyz").status == 200
    assert server.get("/version").json()["version"]
    assert server.send("HEAD", "/healthz").status == 200


def test_request_ids(server):
    first, second = server.get("/v1/models"), server.get("/v1/models")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


def test_metrics(server, client):
    client.completions.create(model="hatchling", prompt="The", max_tokens=3)
    text = server.get("/metrics").body.decode()
    for name in ("adder_requests_running", "adder_requests_waiting", "adder_time_to_first_token_seconds_bucket",
                 "adder_e2e_request_latency_seconds_count", "adder_prompt_tokens_total", "adder_generation_tokens_total",
                 'adder_jobs{status="succeeded"}', 'adder_worker_up{device="cpu"} 1', "adder_device_memory_bytes"):
        assert name in text, name
    for line in text.splitlines():
        assert line.startswith("#") or len(line.rsplit(" ", 1)) == 2 and float(line.rsplit(" ", 1)[1]) is not None


def test_tokenizer_endpoints(server):
    info = server.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>"
    answer = server.send("POST", "/tokenize", {"prompt": "Hello world", "add_special_tokens": False}).json()
    assert answer == {"tokens": [2, 2828], "count": 2} or answer["count"] == len(answer["tokens"])
    assert server.send("POST", "/detokenize", {"tokens": answer["tokens"]}).json()["prompt"] == "Hello world"


def keys(folder, *arguments):
    run = subprocess.run([ADDERD, "keys", *arguments, "--data-dir", str(folder / "data")], capture_output=True, text=True, timeout=30 * PATIENCE)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_keys(own_server, tmp_path):
    (tmp_path / "own/data").mkdir(parents=True)
    token = next(word for word in keys(tmp_path / "own", "create", "team").split() if word.startswith("adder-"))
    server = own_server()
    assert server.get("/v1/models").status == 401 and server.get("/healthz").status == 200
    assert server.get("/v1/models").json()["error"]["type"] == "authentication_error"
    client = server.openai(key=token)
    assert client.models.list().data
    with pytest.raises(openai.AuthenticationError):
        server.openai(key=token[:-1] + ("a" if token[-1] != "a" else "b")).models.list()
    assert "team" in keys(tmp_path / "own", "list") and token not in keys(tmp_path / "own", "list")
    keys(tmp_path / "own", "revoke", "team")
    deadline = time.monotonic() + 10 * PATIENCE
    while server.get("/v1/models", {"Authorization": f"Bearer {token}"}).status != 401 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.get("/v1/models", {"Authorization": f"Bearer {token}"}).status == 401


def run(*arguments):
    return subprocess.run([ADDERD, *arguments], capture_output=True, text=True, timeout=30 * PATIENCE)


def test_without_keys_only_loopback(tmp_path):
    answer = run("serve", "--listen", "0.0.0.0:0", "--data-dir", str(tmp_path), "--models-dir", str(SOURCE / "models"))
    assert answer.returncode != 0 and "key" in answer.stderr


def test_help_names_every_flag_and_variable():
    text = run("serve", "--help").stdout
    for flag in ("listen", "data-dir", "models-dir", "device", "default-model"):
        assert f"--{flag}" in text and "ADDER_" + flag.upper().replace("-", "_") in text
    assert run("version").stdout.split()[0] == "adderd"
    assert run("serve", "--no-such-flag").returncode != 0


def test_one_daemon_a_data_folder(own_server):
    server = own_server()
    answer = run("serve", "--listen", "127.0.0.1:0", "--data-dir", str(server.folder / "data"), "--models-dir", str(SOURCE / "models"))
    assert answer.returncode != 0 and "data" in answer.stderr


def test_json_log(own_server):
    server = own_server("--log-format", "json")
    server.get("/v1/models")
    server.stop()
    lines = [json.loads(line) for line in (server.folder / "adderd.log").read_text().splitlines()]
    assert lines and all({"time", "level", "message"} <= line.keys() for line in lines)


def test_variables(own_server):
    server = own_server(env={"ADDER_MAX_BODY_BYTES": "2000"})
    assert server.send("POST", "/v1/completions", {"prompt": "x" * 5000}).status == 413


def test_a_file_in_use_is_kept(client, server):
    file = upload(client)
    job = client.fine_tuning.jobs.create(model="hatchling", training_file=file, extra_body={"hyperparameters": {"n_epochs": 50, "max_steps": 5000}})
    with pytest.raises(openai.BadRequestError):
        client.files.delete(file)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(file).deleted


def test_completions_while_a_job_trains(client):
    job = client.fine_tuning.jobs.create(model="hatchling", training_file=upload(client),
                                         extra_body={"hyperparameters": {"n_epochs": 50, "max_steps": 5000, "max_seq_len": 64}})
    began = time.monotonic()
    answers = [client.completions.create(model="hatchling", prompt="The bird", max_tokens=20, temperature=0).choices[0].text for _ in range(3)]
    assert len(set(answers)) == 1 and time.monotonic() - began < 30 * PATIENCE
    client.fine_tuning.jobs.cancel(job.id)
