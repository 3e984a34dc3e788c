"""Changes of a job's status that meet each other, a worker that stands still, or the server's end: every client gets its answer."""
import http.client
import json
import os
import signal
import sqlite3
import threading
import time
import urllib.request

import openai
import pytest

from conftest import PATIENCE, SOURCE, upload, wait_for


@pytest.fixture
def still(own_server):
    """A server whose worker stands still, so that no job gets beyond where it is."""
    server = own_server()
    (worker,) = server.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    yield server
    if server.process:
        os.kill(worker, signal.SIGCONT)


def create(client):
    return client.fine_tuning.jobs.create(model="hatchling", training_file=upload(client)).id


def in_background(call):
    """A thread that calls; .answer() waits for what came back."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()

    def answer():
        thread.join(20 * PATIENCE)
        assert answers, "there was no answer"
        return answers[0]

    thread.answer = answer
    return thread


def test_cancelled_validation_ends_the_stream(still):
    client = still.openai()
    job = create(client)
    stream = urllib.request.urlopen(f"{still.base}/v1/fine_tuning/jobs/{job}/events?stream=true", timeout=20 * PATIENCE)
    assert stream.readline().startswith(b"id: ")
    assert client.fine_tuning.jobs.cancel(job).status == "cancelled"
    body = stream.read()
    assert b"cancelled" in body and body.endswith(b"data: [DONE]\n\n")


def test_pause_and_resume_at_once(still):
    client = still.openai(max_retries=0)
    job = create(client)

    def post(change):
        return [still.send("POST", f"/v1/fine_tuning/jobs/{job}/{change}").status for _ in range(40)]

    clients = [in_background(lambda change=change: post(change)) for change in ("pause", "resume", "pause", "resume")]
    for one in clients:
        assert set(one.answer()) <= {200, 400}  # 400: there was nothing to resume
    assert client.fine_tuning.jobs.cancel(job).status == "cancelled"


def test_pause_is_answered_while_the_server_stops(own_server):
    server = own_server()
    client = server.openai()
    job = client.fine_tuning.jobs.create(model="hatchling", training_file=upload(client),
                                         extra_body={"hyperparameters": {"n_epochs": 1000, "max_steps": 100000}}).id
    wait_for(client, job, "running")
    (worker,) = server.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    pause = http.client.HTTPConnection(server.base.removeprefix("http://"), timeout=20 * PATIENCE)
    pause.request("POST", f"/v1/fine_tuning/jobs/{job}/pause")
    assert server.get("/healthz").status == server.get("/healthz").status == 200  # by now the pause was taken in
    server.process.send_signal(signal.SIGTERM)
    os.kill(worker, signal.SIGCONT)
    assert json.loads(pause.getresponse().read())["status"] == "paused"
    assert server.stop() == 0
    server.start()
    assert server.openai().fine_tuning.jobs.retrieve(job).status == "paused"


def test_slow_reader_gets_a_long_history(own_server):
    server = own_server()
    job = create(server.openai())
    server.openai().fine_tuning.jobs.cancel(job)
    server.stop()
    with sqlite3.connect(server.folder / "data/adderd.db") as store:
        store.executemany("INSERT INTO events (job, created_at, level, type, message, data, step) VALUES (?, 1, 'info', 'message', ?, NULL, -1)",
                          [(job, "x" * 4000)] * 8000)
    store.close()
    server.start()
    with urllib.request.urlopen(f"{server.base}/v1/fine_tuning/jobs/{job}/events?stream=true", timeout=20 * PATIENCE) as stream:
        stream.readline()
        time.sleep(2)  # 32 MB: more than the sockets and the server hold for a reader
        body = stream.read()
    assert body.count(b"id: ftevent-") >= 8000 and body.endswith(b"data: [DONE]\n\n")


def test_names_that_do_not_fit(own_server, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / ("m" * 150)).symlink_to(SOURCE / "models/hatchling")
    client = own_server(models_dir=tmp_path / "models").openai()
    file = upload(client)
    with pytest.raises(openai.BadRequestError, match="suffix: "):
        client.fine_tuning.jobs.create(model="m" * 150, training_file=file, suffix="s" * 64)
    assert client.fine_tuning.jobs.create(model="m" * 150, training_file=file).status == "validating_files"
