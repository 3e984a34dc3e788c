"""A worker or the daemon may be killed at any moment: no accepted job is lost, and its losses are those of the undisturbed run,
bit for bit."""
import os
import signal
import time

import pytest

from conftest import PATIENCE, SANITIZED, STORIES, upload, wait_for

STEPS = 20 if SANITIZED else 40  # room for every kill below
HYPERPARAMETERS = {"n_epochs": 20, "max_steps": STEPS, "batch_size": 4, "max_seq_len": 64, "packing": False, "learning_rate": 1e-3,
                   "checkpoint_steps": 7, "eval_steps": 10, "lora": {"rank": 4, "dropout": 0.1}}


def start_job(client):
    return client.fine_tuning.jobs.create(model="hatchling", training_file=upload(client), validation_file=upload(client), seed=11,
                                          extra_body={"hyperparameters": HYPERPARAMETERS}).id


def losses(client, job):
    events = client.fine_tuning.jobs.list_events(job, limit=100)
    return [(event.data["step"], event.data["train_loss"], event.data["valid_loss"], event.data["grad_norm"])
            for event in events if event.type == "metrics"][::-1]


def wait_for_step(client, job, step):
    deadline = time.monotonic() + 60 * PATIENCE
    while time.monotonic() < deadline:
        state = client.fine_tuning.jobs.retrieve(job)
        if state.status == "running" and state.progress["step"] >= step:
            return
        assert state.status in ("validating_files", "queued", "running"), state
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {state}")


@pytest.fixture(scope="module")
def undisturbed(server):
    client = server.openai()
    job = start_job(client)
    wait_for(client, job, "succeeded")
    result = losses(client, job)
    assert [step for step, *_ in result] == list(range(1, STEPS + 1)) and sum(valid is not None for _, _, valid, _ in result) == STEPS // 10
    return result


def test_killed_worker(own_server, undisturbed):
    server = own_server()
    client = server.openai()
    job = start_job(client)
    for step in (3, 15):
        wait_for_step(client, job, step)
        (worker,) = server.worker_pids()
        os.kill(worker, signal.SIGKILL)
    wait_for(client, job, "succeeded")
    assert losses(client, job) == undisturbed
    assert any("worker died" in event.message for event in client.fine_tuning.jobs.list_events(job, limit=100))


def test_killed_daemon(own_server, undisturbed):
    server = own_server()
    client = server.openai()
    job, waiting = start_job(client), start_job(client)
    wait_for_step(client, job, 15)
    server.kill()
    server.start()
    client = server.openai()
    for each in (job, waiting):
        wait_for(client, each, "succeeded")
        assert losses(client, each) == undisturbed
    assert len(list(client.fine_tuning.jobs.list())) == 2
    assert len([model for model in client.models.list() if model.parent]) == 2


@pytest.mark.tsan
def test_stopped_daemon_goes_on(own_server, undisturbed):
    server = own_server()
    client = server.openai()
    job = start_job(client)
    wait_for_step(client, job, 10)
    assert server.stop() == 0
    server.start()
    client = server.openai()
    assert client.fine_tuning.jobs.retrieve(job).status in ("queued", "running")
    wait_for(client, job, "succeeded")
    assert losses(client, job) == undisturbed


def test_paused_job_survives_a_kill(own_server, undisturbed):
    server = own_server()
    client = server.openai()
    job = start_job(client)
    wait_for_step(client, job, 5)
    assert client.fine_tuning.jobs.pause(job).status == "paused"
    server.kill()
    server.start()
    client = server.openai()
    assert client.fine_tuning.jobs.retrieve(job).status == "paused"
    client.fine_tuning.jobs.resume(job)
    wait_for(client, job, "succeeded")
    assert losses(client, job) == undisturbed


def test_job_that_kills_its_worker_twice_fails_alone(own_server):
    """Twice at the same step is the job's own fault; the next one has a worker again."""
    server = own_server()
    client = server.openai()
    slow = {"n_epochs": 50, "batch_size": 64, "gradient_accumulation_steps": 1024, "max_seq_len": 64, "packing": False}
    poison = client.fine_tuning.jobs.create(model="hatchling", training_file=upload(client), extra_body={"hyperparameters": slow}).id
    innocent = start_job(client)
    for killing in (1, 2):
        deadline = time.monotonic() + 30 * PATIENCE
        while sum("Fine-tuning started" in event.message for event in client.fine_tuning.jobs.list_events(poison, limit=100)) < killing:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (worker,) = server.worker_pids()
        os.kill(worker, signal.SIGKILL if SANITIZED else signal.SIGSEGV)
    with pytest.raises(AssertionError, match="worker_lost.*died 2 times at step 0: killed by signal"):
        wait_for(client, poison, "succeeded")
    wait_for(client, innocent, "succeeded")
    messages = [event.message for event in client.fine_tuning.jobs.list_events(poison, limit=100)]
    assert sum("killed by signal" in message for message in messages) == 2


def test_worker_death_fails_a_completion_and_no_more(own_server):
    server = own_server()
    client = server.openai(max_retries=0)
    stream = client.completions.create(model="hatchling", prompt="The", max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    os.kill(server.worker_pids()[0], signal.SIGKILL)
    with pytest.raises(Exception, match="worker"):
        for _ in stream:
            pass
    deadline = time.monotonic() + 20 * PATIENCE
    while server.get("/readyz").status != 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert client.completions.create(model="hatchling", prompt="The", max_tokens=2).choices[0].text


def test_a_daemon_that_stood_still_keeps_its_workers(own_server, undisturbed):
    server = own_server("--heartbeat-timeout", "2")
    client = server.openai()
    job = start_job(client)
    wait_for_step(client, job, 3)
    workers = server.worker_pids()
    os.kill(server.process.pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(server.process.pid, signal.SIGCONT)
    wait_for(client, job, "succeeded")
    assert server.worker_pids() == workers and losses(client, job) == undisturbed


def test_what_no_row_names_is_swept_at_the_start(own_server):
    server = own_server()
    client = server.openai()
    file = upload(client)
    job = start_job(client)
    wait_for(client, job, "running", "succeeded")
    assert server.stop() == 0
    data = server.folder / "data"
    before = sorted(path for folder in ("files", "jobs") for path in (data / folder).iterdir())
    (data / "files/file-AAAAAAAAAAAAAAAAAAAAAAAA").write_bytes(b"renamed, its row never committed")
    orphan = data / "jobs/ftjob-AAAAAAAAAAAAAAAAAAAAAAAA/checkpoints/step-1"
    orphan.mkdir(parents=True)
    (orphan / "state.json").write_text("{}")
    (data / "files/README").write_text("not ours")
    server.start()
    assert sorted(path for folder in ("files", "jobs") for path in (data / folder).iterdir()) == sorted([*before, data / "files/README"])
    assert server.openai().files.content(file).read() == STORIES


def test_a_lost_database_takes_no_files_with_it(own_server):
    server = own_server()
    upload(server.openai())
    assert server.stop() == 0
    data = server.folder / "data"
    files = sorted((data / "files").iterdir())
    database = list(data.glob("adderd.db*"))
    for path in database:
        path.unlink()
    server.start()
    assert database and files and sorted((data / "files").iterdir()) == files


def test_acknowledged_files_survive_a_kill(own_server):
    server = own_server()
    client = server.openai()
    files = [upload(client) for _ in range(5)]
    server.kill()
    server.start()
    client = server.openai()
    for file in files:
        assert client.files.content(file).read() == STORIES
    assert not list((server.folder / "data/uploads").iterdir())
