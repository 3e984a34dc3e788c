"""What the devices of the workers mean for a job: its precision, and where it is trained."""
import time

import openai
import pytest

from conftest import PATIENCE, upload, wait_for


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
    while "cuda:99" not in server.text_log() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "worker down" in server.text_log() and ("device cuda:99 does not open" in server.text_log() or "no CUDA" in server.text_log())
    job = create(client, max_steps=1)
    assert precision(job) == "bf16"
    assert precision(create(client, precision="fp32")) == "fp32"
    assert client.fine_tuning.jobs.retrieve(job.id).status == "validating_files"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
