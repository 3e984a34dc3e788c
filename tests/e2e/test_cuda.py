"""The service on a GPU. On a machine that has one:  ADDERD_TEST_CUDA=1 tools/test clients"""
import os
import pathlib
import re
import signal
import subprocess
import threading
import time

import pytest

from conftest import SOURCE, Server, upload, wait_for

GPU = bool(os.environ.get("ADDERD_TEST_CUDA")) and pathlib.Path("/dev/nvidiactl").exists()
pytestmark = pytest.mark.skipif(not GPU, reason="needs ADDERD_TEST_CUDA=1 and an NVIDIA GPU")

HYPERPARAMETERS = {"max_steps": 300, "batch_size": 8, "max_seq_len": 256, "learning_rate": 2e-3, "checkpoint_steps": 40,
                   "lora": {"rank": 8, "targets": ["in_proj", "x_proj", "dt_proj", "out_proj"], "dropout": 0.1}}


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("gpu"), device="cuda:0").start()
    yield server
    assert server.stop() == 0, server.text_log()


@pytest.fixture(scope="module")
def verses(gpu):
    return upload(gpu.openai(), (SOURCE / "examples/shakespeare.jsonl").read_bytes())


def create(client, file, **more):
    return client.fine_tuning.jobs.create(model="hatchling", training_file=file, seed=5, extra_body={"hyperparameters": {**HYPERPARAMETERS, **more}})


def losses(client, job):
    return [(event.data["step"], event.data["train_loss"], event.data["grad_norm"])
            for event in client.fine_tuning.jobs.list_events(job, limit=100) if event.type == "metrics"][::-1]


def wait_for_step(client, job, step):
    while client.fine_tuning.jobs.retrieve(job).progress["step"] < step:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(gpu, verses):
    """In bf16, which is what "auto" is on a GPU."""
    client = gpu.openai()
    job = create(client, verses)
    assert job.method.supervised.hyperparameters.to_dict()["precision"] == "bf16"
    job = wait_for(client, job.id, "succeeded")
    assert job.progress["device"] == "cuda:0" and job.progress["peak_memory_bytes"] > 0
    return job, losses(client, job.id)


def complete(client, model):
    chunks = client.completions.create(model=model, prompt="ROMEO:\n", max_tokens=60, temperature=0, stream=True, extra_body={"ignore_eos": True})
    return "".join(chunk.choices[0].text for chunk in chunks)


def test_learns_and_serves(gpu, undisturbed):
    job, steps = undisturbed
    client = gpu.openai()
    assert len(steps) == 300 and sum(loss for _, loss, _ in steps[-20:]) < sum(loss for _, loss, _ in steps[:20])
    assert complete(client, job.fine_tuned_model) != complete(client, "hatchling")


def test_completions_while_training(gpu, verses, undisturbed):
    client = gpu.openai()
    models = ["hatchling", undisturbed[0].fine_tuned_model] * 3
    alone = {model: complete(client, model) for model in models}
    job = create(client, verses)
    wait_for(client, job.id, "running")
    beside = []
    threads = [threading.Thread(target=lambda model=model: beside.append((model, complete(client, model)))) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(beside) == len(models) and all(text == alone[model] for model, text in beside)
    wait_for(client, job.id, "succeeded")
    assert losses(client, job.id) == undisturbed[1]


def test_killed_worker(gpu, verses, undisturbed):
    client = gpu.openai()
    job = create(client, verses)
    wait_for_step(client, job.id, 130)
    (worker,) = gpu.worker_pids()
    os.kill(worker, signal.SIGKILL)
    wait_for(client, job.id, "succeeded")
    assert gpu.worker_pids() != [worker] and losses(client, job.id) == undisturbed[1]


def test_cancel(gpu, verses):
    client = gpu.openai()
    job = create(client, verses)
    wait_for_step(client, job.id, 20)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_precisions_agree(gpu, verses, undisturbed):
    client = gpu.openai()
    means = {}
    for precision in ("fp32", "tf32", "fp16"):
        job = wait_for(client, create(client, verses, precision=precision).id, "succeeded")
        means[precision] = sum(loss for _, loss, _ in losses(client, job.id)[-20:]) / 20
    means["bf16"] = sum(loss for _, loss, _ in undisturbed[1][-20:]) / 20
    assert means == pytest.approx(dict.fromkeys(means, means["fp32"]), rel=0.01)


def test_memory_comes_back_after_each_job(gpu):
    client = gpu.openai()
    file = upload(client)

    def run(count):
        jobs = [client.fine_tuning.jobs.create(model="hatchling", training_file=file, extra_body={"max_steps": 1, "max_seq_len": 64}).id
                for _ in range(count)]
        for job in jobs:
            wait_for(client, job, "succeeded")
        time.sleep(1.5)  # the worker says once a second what it holds
        allocated = re.search(r'adder_device_memory_bytes{device="cuda:0",kind="allocated"} (\S+)', gpu.get("/metrics").body.decode())[1]
        used = subprocess.check_output(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"])
        return float(allocated), int(used)

    before = run(20)
    began = time.monotonic()
    assert run(300) == before
    assert time.monotonic() - began < 90
