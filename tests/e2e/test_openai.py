"""Stock openai-python, unmodified, does everything its user would."""
import io
import tarfile

import openai
import pytest

from conftest import SANITIZED, STORIES, jsonl, upload, wait_for


@pytest.mark.tsan
def test_files(client):
    file = client.files.create(file=("a name.jsonl", STORIES), purpose="fine-tune")
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(STORIES), "a name.jsonl", "fine-tune")
    assert client.files.retrieve(file.id).id == file.id
    assert client.files.content(file.id).read() == STORIES
    assert file.id in [item.id for item in client.files.list(purpose="fine-tune")]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_file_list_pages_to_its_end(client):
    made = {client.files.create(file=(f"{i}.jsonl", STORIES), purpose="fine-tune").id for i in range(7)}
    listed = [item.id for item in client.files.list(limit=3)]
    assert len(listed) == len(set(listed)) and made <= set(listed)
    for file in made:
        client.files.delete(file)


def test_expiring_file(client):
    file = client.files.create(file=("x.jsonl", STORIES), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600
    client.files.delete(file.id)


@pytest.mark.tsan
def test_job_from_method(adapter, client):
    assert adapter.status == "succeeded" and adapter.object == "fine_tuning.job" and adapter.seed == 7
    assert adapter.fine_tuned_model.startswith("ft:hatchling:") and ":sounds:" in adapter.fine_tuned_model
    assert adapter.hyperparameters.n_epochs == 4 and adapter.hyperparameters.batch_size == 4
    assert adapter.method.supervised.hyperparameters.n_epochs == 4
    assert adapter.trained_tokens > 0 and adapter.started_at <= adapter.finished_at and adapter.error is None
    assert adapter.progress["step"] == adapter.progress["total_steps"] == 12
    assert adapter.progress["peak_memory_bytes"] > 0 and adapter.progress["device"] == "cpu"
    csv = client.files.content(adapter.result_files[0]).text.splitlines()
    assert csv[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy" and len(csv) == 13


def test_events_newest_first_and_paged(adapter, client):
    events = list(client.fine_tuning.jobs.list_events(adapter.id, limit=5))
    metrics = [event for event in events if event.type == "metrics"]
    assert [event.data["step"] for event in metrics] == list(range(12, 0, -1))
    assert metrics[0].data["train_loss"] < metrics[-1].data["train_loss"]
    assert {"learning_rate", "grad_norm", "tokens_per_second", "train_mean_token_accuracy"} <= metrics[0].data.keys()
    assert len({event.id for event in events}) == len(events)
    assert "completed" in events[0].message and events[-1].message.startswith("Created")


def test_checkpoints_are_servable(adapter, client):
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(adapter.id))
    assert checkpoints and checkpoints[0].step_number == 12
    model = checkpoints[0].fine_tuned_model_checkpoint
    assert model == f"{adapter.fine_tuned_model}:ckpt-step-12"
    assert checkpoints[0].metrics.train_loss > 0
    prompt = "Q: What does the cow say?\nA:"
    final, checkpoint = (client.completions.create(model=m, prompt=prompt, max_tokens=12, temperature=0).choices[0].text
                         for m in (adapter.fine_tuned_model, model))
    assert final == checkpoint


def test_job_with_extra_body_then_cancel(client):
    job = client.fine_tuning.jobs.create(
        model="hatchling", training_file=upload(client), metadata={"team": "barn"},
        extra_body={"hyperparameters": {"n_epochs": 50, "max_steps": 5000, "learning_rate": 1e-4, "lora": {"rank": 4, "targets": "all"}}})
    assert job.status in ("validating_files", "queued", "running") and job.metadata == {"team": "barn"}
    wait_for(client, job.id, "running")
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled" and cancelled.finished_at
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.cancel(job.id)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"


def test_pause_and_resume(client):
    job = client.fine_tuning.jobs.create(
        model="hatchling", training_file=upload(client),
        extra_body={"hyperparameters": {"n_epochs": 100, "max_steps": 8 if SANITIZED else 40, "max_seq_len": 64}})
    wait_for(client, job.id, "running")
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "running", "validating_files")
    done = wait_for(client, job.id, "succeeded")
    steps = [event.data["step"] for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.type == "metrics"]
    assert steps == list(range(done.progress["total_steps"], 0, -1))


def test_job_list_pages_by_itself(client):
    made = [client.fine_tuning.jobs.create(model="hatchling", training_file=upload(client), metadata={"lot": "paging"}).id for _ in range(5)]
    for job in made:
        client.fine_tuning.jobs.cancel(job)
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2, metadata={"lot": "paging"})] == made[::-1]


def test_full_fine_tune(client):
    job = client.fine_tuning.jobs.create(
        model="hatchling", training_file=upload(client), validation_file=upload(client),
        extra_body={"hyperparameters": {"adaptation": "full", "n_epochs": 2, "batch_size": 6, "max_seq_len": 64, "learning_rate": 1e-4}})
    done = wait_for(client, job.id, "succeeded")
    last = next(iter(client.fine_tuning.jobs.checkpoints.list(job.id)))
    assert last.metrics.full_valid_loss > 0
    answer = client.completions.create(model=done.fine_tuned_model, prompt="Q: What does the cow say?\nA:", max_tokens=8, temperature=0)
    assert answer.choices[0].text
    client.models.delete(done.fine_tuned_model)


def test_models(adapter, client):
    models = {model.id: model for model in client.models.list()}
    assert models["hatchling"].parent is None
    assert models[adapter.fine_tuned_model].parent == "hatchling" and models[adapter.fine_tuned_model].root == "hatchling"
    assert client.models.retrieve(adapter.fine_tuned_model).object == "model"
    with pytest.raises(openai.BadRequestError):
        client.models.delete("hatchling")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_adapter_as_peft_folder(adapter, server):
    answer = server.get(f"/v1/models/{adapter.fine_tuned_model}/adapter")
    assert answer.status == 200
    with tarfile.open(fileobj=io.BytesIO(answer.body)) as tar:
        names = {pathname.rsplit("/", 1)[-1] for pathname in tar.getnames()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names


def test_deleted_model_is_gone(client):
    job = client.fine_tuning.jobs.create(model="hatchling", training_file=upload(client),
                                         extra_body={"hyperparameters": {"max_steps": 1, "max_seq_len": 64}})
    model = wait_for(client, job.id, "succeeded").fine_tuned_model
    client.completions.create(model=model, prompt="a", max_tokens=1)
    assert client.models.delete(model).deleted
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=model, prompt="a", max_tokens=1)


@pytest.mark.tsan
def test_completion(client):
    answer = client.completions.create(model="hatchling", prompt="Once upon a time, there was a little girl named Lily. She",
                                       max_tokens=20, temperature=0)
    assert answer.object == "text_completion" and answer.model == "hatchling"
    assert answer.choices[0].text.startswith(" loved to play with her toys") and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (14, 20, 34)


def test_adapter_changes_the_answer(adapter, client):
    prompt = "Q: What does the cow say?\nA:"
    base = client.completions.create(model="hatchling", prompt=prompt, max_tokens=8, temperature=0).choices[0]
    tuned = client.completions.create(model=adapter.fine_tuned_model, prompt=prompt, max_tokens=12, temperature=0).choices[0]
    named = client.completions.create(model="hatchling", prompt=prompt, max_tokens=12, temperature=0,
                                      extra_body={"adapter": adapter.fine_tuned_model}).choices[0]
    assert tuned.text.startswith(" The ") and " says " in tuned.text and tuned.finish_reason == "stop"
    assert named.text == tuned.text != base.text


def test_many_prompts_and_samples(client):
    answer = client.completions.create(model="hatchling", prompt=["The cat", "The dog"], n=3, max_tokens=5, seed=5, temperature=1.0)
    assert [choice.index for choice in answer.choices] == list(range(6))
    again = client.completions.create(model="hatchling", prompt=["The cat", "The dog"], n=3, max_tokens=5, seed=5, temperature=1.0)
    assert [choice.text for choice in answer.choices] == [choice.text for choice in again.choices]
    assert len({choice.text for choice in answer.choices}) > 2


def test_prompt_as_ids(server, client):
    ids = server.send("POST", "/tokenize", {"prompt": "The cat sat"}).json()["tokens"]
    by_text = client.completions.create(model="hatchling", prompt="The cat sat", max_tokens=6, temperature=0)
    by_ids = client.completions.create(model="hatchling", prompt=ids, max_tokens=6, temperature=0)
    by_lists = client.completions.create(model="hatchling", prompt=[ids, ids], max_tokens=6, temperature=0)
    assert by_text.choices[0].text == by_ids.choices[0].text == by_lists.choices[1].text


@pytest.mark.tsan
def test_streamed_completion(client):
    plain = client.completions.create(model="hatchling", prompt="The bird", max_tokens=16, temperature=0).choices[0].text
    chunks = list(client.completions.create(model="hatchling", prompt="The bird", max_tokens=16, temperature=0, stream=True,
                                            stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == plain
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 16


def test_streamed_characters_are_whole(client):
    chunks = client.completions.create(model="hatchling", prompt="é", echo=True, max_tokens=24, temperature=1.5, seed=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks).startswith("é")


def test_stop(client):
    whole = client.completions.create(model="hatchling", prompt="The bird", max_tokens=30, temperature=0).choices[0].text
    stop = whole[9:13]
    answer = client.completions.create(model="hatchling", prompt="The bird", max_tokens=30, temperature=0, stop=[stop, "never said"]).choices[0]
    assert answer.text == whole[:whole.index(stop)] and answer.finish_reason == "stop"
    assert client.completions.create(model="hatchling", prompt="The bird", max_tokens=3, temperature=0, stop=[]).choices[0].text


def test_logprobs_and_echo(client):
    answer = client.completions.create(model="hatchling", prompt="The cat sat", max_tokens=4, temperature=0, logprobs=3, echo=True)
    logprobs, choice = answer.choices[0].logprobs, answer.choices[0]
    assert "".join(logprobs.tokens) == choice.text and len(logprobs.tokens) == answer.usage.total_tokens
    assert logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert [choice.text[o:o + len(t)] for o, t in zip(logprobs.text_offset, logprobs.tokens)] == logprobs.tokens
    assert all(3 <= len(top) <= 4 for top in logprobs.top_logprobs[1:])


def test_chat(adapter, client):
    messages = [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": "Tell me of a cat."}]
    answer = client.chat.completions.create(model="hatchling", messages=messages, max_tokens=10, temperature=0)
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(model="hatchling", messages=messages, max_tokens=10, temperature=0, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    scored = client.chat.completions.create(model="hatchling", messages=messages, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2)
    assert len(scored.choices[0].logprobs.content) == 3 and len(scored.choices[0].logprobs.content[0].top_logprobs) == 2
    tuned = client.chat.completions.create(model=adapter.fine_tuned_model, messages=messages, max_completion_tokens=5)
    assert tuned.usage.completion_tokens <= 5


def test_logit_bias_and_penalties(client):
    answer = client.completions.create(model="hatchling", prompt="The bird", max_tokens=12, temperature=0, logit_bias={"15": 100})
    assert answer.choices[0].text == "." * 12
    spread = client.completions.create(model="hatchling", prompt="The bird", max_tokens=12, temperature=0, logit_bias={"15": 100},
                                       frequency_penalty=2, presence_penalty=2).choices[0].text
    assert set(spread) == {"."}


def test_job_training_on_chat_and_alpaca_forms(client):
    chat = jsonl(*({"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": str(i)}]} for i in range(6)))
    alpaca = jsonl(*({"instruction": "Add.", "input": f"{i} + {i}", "output": str(2 * i)} for i in range(6)))
    for content in (chat, alpaca):
        job = client.fine_tuning.jobs.create(model="hatchling", training_file=upload(client, content),
                                             extra_body={"hyperparameters": {"max_steps": 1, "max_seq_len": 128}})
        wait_for(client, job.id, "succeeded")


def test_event_stream_resumes(adapter, server):
    whole = server.get(f"/v1/fine_tuning/jobs/{adapter.id}/events", {"Accept": "text/event-stream"}).body.decode()
    ids = [line[4:] for line in whole.splitlines() if line.startswith("id: ")]
    assert len(ids) > 12
    rest = server.get(f"/v1/fine_tuning/jobs/{adapter.id}/events?stream=true", {"Last-Event-ID": ids[4]}).body.decode()
    assert [line[4:] for line in rest.splitlines() if line.startswith("id: ")] == ids[5:]


def test_idempotency_key(server, client):
    file = upload(client)
    body = {"model": "hatchling", "training_file": file, "hyperparameters": {"max_steps": 1, "max_seq_len": 64}}
    first = server.send("POST", "/v1/fine_tuning/jobs", body, {"Idempotency-Key": "once"})
    second = server.send("POST", "/v1/fine_tuning/jobs", body, {"Idempotency-Key": "once"})
    assert first.status == second.status == 200 and first.json()["id"] == second.json()["id"]
    other = server.send("POST", "/v1/fine_tuning/jobs", {**body, "seed": 3}, {"Idempotency-Key": "once"})
    assert other.status == 400
    wait_for(client, first.json()["id"], "succeeded")
