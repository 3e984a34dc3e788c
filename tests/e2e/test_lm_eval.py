"""Stock lm-evaluation-harness (local-completions, remote tokenizer) scores a local task, and its log-likelihoods are those of a
direct computation."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

import reference
from conftest import PATIENCE, SOURCE

HERE = pathlib.Path(__file__).resolve().parent


@pytest.mark.slow
def test_log_likelihoods_equal_a_direct_computation(server, tmp_path):
    arguments = (f"model=hatchling,base_url={server.base}/v1/completions,tokenizer_backend=remote,tokenized_requests=True,"
                 "num_concurrent=4,max_retries=3")
    run = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments, "--tasks", "adderd_stories",
         "--include_path", str(HERE / "lm_eval_task"), "--batch_size", "4", "--log_samples", "--output_path", str(tmp_path)],
        cwd=HERE / "lm_eval_task", capture_output=True, text=True, timeout=240 * PATIENCE,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    assert run.returncode == 0, run.stderr[-4000:]
    (results,) = tmp_path.glob("**/results_*.json")
    scores = json.loads(results.read_text())["results"]["adderd_stories"]
    assert scores["acc,none"] >= 0.75
    (samples,) = tmp_path.glob("**/samples_*.jsonl")
    model = reference.load(SOURCE / "models/hatchling")
    checked = 0
    for sample in map(json.loads, samples.read_text().splitlines()):
        for choice, answer in zip(sample["doc"]["choices"], sample["resps"]):
            context = server.send("POST", "/tokenize", {"prompt": sample["doc"]["context"]}).json()["tokens"]
            whole = server.send("POST", "/tokenize", {"prompt": sample["doc"]["context"] + " " + choice}).json()["tokens"]
            table = reference.log_probabilities(model, whole)
            direct = sum(table[t - 1, whole[t]] for t in range(len(context), len(whole)))
            greedy = all(table[t - 1].argmax() == whole[t] for t in range(len(context), len(whole)))
            assert abs(float(answer[0][0]) - direct) < 1e-3
            assert (str(answer[0][1]) == "True") == greedy
            checked += 1
    assert checked == 16
