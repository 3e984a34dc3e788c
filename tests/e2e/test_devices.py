"""What the devices of the workers mean for a job: its precision, where it is trained, and whether it fits."""
import json
import re
import time

import openai
import pytest

from conftest import PATIENCE, SANITIZED, Server, upload, wait_for

FIRST_JOBS, MORE_JOBS = (3, 5) if SANITIZED else (10, 60)


def create(client, **hyperparameters):
    return client.fine_tuning.jobs.create(model="hatchling", training_file=upload(client), extra_body={"hyperparameters": hyperparameters})


def precision(job):
    return job.method.supervised.hyperparameters.to_dict()["precision"]


@pytest.mark.parametrize("hyperparameters", [{}, {"precision": "auto"}, {"precision": "fp32"}])
def test_cpu_trains_in_fp32(client, hyperparameters):
    job = create(client, max_steps=1, max_seq_len=64, **hyperparameters)
    assert precision(job) == "fp32"
    assert precision(wait_for(client, job.id, "succeeded")) == "fp32"


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_cpu_refuses_what_it_cannot_do(client, precision):
    jobs = len(list(client.fine_tuning.jobs.list()))
    with pytest.raises(openai.BadRequestError, match=f"{precision} needs a GPU") as refused:
        create(client, precision=precision)
    assert refused.value.param == "precision" and refused.value.code == "unsupported_precision"
    assert len(list(client.fine_tuning.jobs.list())) == jobs


def test_jobs_wait_for_the_gpu_of_a_mixed_pool(own_server):
    """A GPU that is not there says why; the CPU beside it completes, and trains nothing."""
    server = own_server("--device", "cuda:99")
    client = server.openai()
    assert client.completions.create(model="hatchling", prompt="The", max_tokens=2).choices[0].text
    deadline = time.monotonic() + 20 * PATIENCE
    while "worker down" not in server.text_log() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "worker down" in server.text_log() and ("device cuda:99 does not open" in server.text_log() or "no CUDA" in server.text_log())
    job = create(client, max_steps=1)
    assert precision(job) == "bf16"
    assert precision(create(client, precision="fp32")) == "fp32"
    assert client.fine_tuning.jobs.retrieve(job.id).status == "validating_files"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_a_gpu_that_does_not_open_says_why(tmp_path):
    server = Server(tmp_path, device="cuda:99").start(wait=False)
    try:
        deadline = time.monotonic() + 20 * PATIENCE
        while b"cuda:99" not in server.get("/readyz").body and time.monotonic() < deadline:
            time.sleep(0.05)
        answer = server.get("/readyz")
        assert answer.status == 503 and re.search("worker of cuda:99 is down: .*(does not open|no CUDA)", answer.json()["error"]["message"])
        job = create(server.openai())  # it waits for the device
        assert job.status == "validating_files" and precision(job) == "bf16"
    finally:
        server.stop()


def memory(server, kind):
    """Of the CPU's worker; it says so once a second."""
    time.sleep(1.2)
    line = re.search(rf'adder_device_memory_bytes{{device="cpu",kind="{kind}"}} (\S+)', server.get("/metrics").body.decode())
    return float(line[1])


def test_what_cannot_fit_is_refused_at_creation(server, client):
    total = memory(server, "total")
    if total > 80e9:
        pytest.skip("needs a host of less memory")
    lines = (json.dumps({"text": f"The quick brown fox number {i} jumps over the lazy dog. " * 20}) for i in range(8000))
    file = upload(client, "\n".join(lines).encode())
    try:
        job = client.fine_tuning.jobs.create(model="hatchling", training_file=file, extra_body={"batch_size": 1024, "max_seq_len": 2048})
    except openai.BadRequestError as refused:
        error, message = refused, refused.message
        assert all(job.training_file != file for job in client.fine_tuning.jobs.list())
    else:  # on a machine so slow that the plan took longer than a client is kept waiting
        assert not job.progress["planned_memory_bytes"]
        error = wait_for(client, job.id, "failed").error
        message = error.message
    assert error.code == "insufficient_memory" and error.param == "batch_size"
    said = re.search(r"needs (\d+) bytes beyond the model's (\d+).* (\d+) are free; batch_size (\d+) with gradient_accumulation_steps (\d+) fits",
                     message)
    needed, model, free, batch_size, accumulation = map(int, said.groups())
    assert needed > free > model and batch_size * accumulation == 1024
    job = client.fine_tuning.jobs.create(model="hatchling", training_file=file, extra_body={
        "batch_size": batch_size, "gradient_accumulation_steps": accumulation, "max_seq_len": 2048})
    job = wait_for(client, job.id, "queued", "running")
    assert 0 < job.progress["planned_memory_bytes"] <= total  # others on the host may have made room meanwhile
    client.fine_tuning.jobs.cancel(job.id)


def test_plan_and_peak_are_shown(client):
    job = wait_for(client, create(client, max_steps=2, max_seq_len=64).id, "succeeded")
    planned, peak = job.progress["planned_memory_bytes"], job.progress["peak_memory_bytes"]
    assert 0 < planned and planned / 2 < peak and job.progress["bytes_per_token"] > 0 and job.progress["skipped_steps"] == 0


def test_memory_comes_back_after_each_job(own_server):
    server = own_server()
    client = server.openai()
    file = upload(client)

    def run(count):
        jobs = [client.fine_tuning.jobs.create(model="hatchling", training_file=file, extra_body={"max_steps": 1, "max_seq_len": 64}).id
                for _ in range(count)]
        for job in jobs:
            wait_for(client, job, "succeeded")
        return memory(server, "allocated"), memory(server, "resident")

    allocated, resident = run(FIRST_JOBS)
    allocated_later, resident_later = run(MORE_JOBS)
    assert allocated_later == allocated
    assert SANITIZED or resident_later < resident + (16 << 20)
