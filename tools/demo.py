#!/usr/bin/env python3
"""The main job of adderd, end to end, with the standard library alone: start the daemon, upload a training file, run a LoRA
job with a live progress line, and complete the same prompts with the base model and with the adapter."""
import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPTS = ["ROMEO:\n", "KING HENRY:\nMy lord,"]


class Client:
    def __init__(self, base):
        self.base = base

    def request(self, method, path, body=None, content_type="application/json"):
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        request = urllib.request.Request(self.base + path, data=data, method=method, headers={"Content-Type": content_type})
        try:
            return urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            sys.exit(f"{method} {path}: {error.code} {error.read().decode()}")

    def json(self, method, path, body=None, **more):
        with self.request(method, path, body, **more) as response:
            return json.load(response)

    def upload(self, path):
        boundary = uuid.uuid4().hex
        parts = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{path.name}"\r\n'
            "Content-Type: application/jsonl\r\n\r\n"
        ).encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        return self.json("POST", "/v1/files", parts, content_type=f"multipart/form-data; boundary={boundary}")

    def events(self, job):
        """The job's events as they happen, until it ends (server-sent events)."""
        with self.request("GET", f"/v1/fine_tuning/jobs/{job}/events?stream=true") as response:
            for line in response:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[6:])


def start(adderd, data_dir, device):
    port_file = data_dir / "port"
    log = open(data_dir / "adderd.log", "wb")
    began = time.monotonic()
    process = subprocess.Popen(
        [adderd, "serve", "--listen", "127.0.0.1:0", "--port-file", str(port_file), "--data-dir", str(data_dir),
         "--models-dir", str(ROOT / "models"), "--device", device], stdout=log, stderr=log)
    while time.monotonic() - began < 30:
        if process.poll() is not None:
            break
        try:
            base = "http://" + port_file.read_text().strip()
            urllib.request.urlopen(base + "/readyz").close()
            return process, Client(base), time.monotonic() - began
        except (OSError, ValueError):
            time.sleep(0.01)
    process.kill()
    sys.exit("adderd did not start:\n" + (data_dir / "adderd.log").read_text())


def follow(client, job):
    live = sys.stdout.isatty()
    for event in client.events(job):
        if event["type"] == "metrics":
            data = event["data"]
            done, total, rate = data["step"], data["total_steps"], data["tokens_per_second"] or 0
            progress = client.json("GET", f"/v1/fine_tuning/jobs/{job}")["progress"]
            eta = progress["eta_seconds"] or 0
            bar = "#" * (24 * done // total) + "." * (24 - 24 * done // total)
            line = f"  [{bar}] step {done}/{total}  loss {data['train_loss']:.3f}  {rate:,.0f} tokens/s  ETA {eta:.0f} s "
            if live:
                print("\r" + line, end="", flush=True)
            elif done % 10 == 0 or done == total or done == 1:
                print(line, flush=True)
        else:
            print(("\r\033[K" if live else "") + f"  {event['message']}", flush=True)
    return client.json("GET", f"/v1/fine_tuning/jobs/{job}")


def complete(client, model, prompt):
    body = {"model": model, "prompt": prompt, "max_tokens": 60, "temperature": 0.7, "seed": 7, "repetition_penalty": 1.1}
    return client.json("POST", "/v1/completions", body)["choices"][0]["text"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adderd", default=str(ROOT / "build/adderd"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda:N or auto")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adderd-demo-") as folder:
        process, client, seconds = start(options.adderd, pathlib.Path(folder), options.device)
        try:
            print(f"adderd is ready after {seconds:.2f} s at {client.base}")
            file = client.upload(ROOT / "examples/shakespeare.jsonl")
            print(f"uploaded {file['filename']}: {file['bytes']:,} bytes as {file['id']}")
            job = client.json("POST", "/v1/fine_tuning/jobs", {
                "model": "hatchling", "training_file": file["id"], "suffix": "shakespeare", "seed": 1,
                "method": {"type": "supervised", "supervised": {"hyperparameters": {
                    "n_epochs": 3, "max_steps": options.steps, "batch_size": 8, "max_seq_len": 256,
                    "learning_rate": 3e-3, "warmup_steps": 5,
                    "lora": {"rank": 8, "alpha": 16, "targets": ["in_proj", "x_proj", "out_proj"]}}}}})
            print(f"job {job['id']}: LoRA on hatchling")
            job = follow(client, job["id"])
            if job["status"] != "succeeded":
                sys.exit(f"the job {job['status']}: {job['error']}")
            adapter = job["fine_tuned_model"]
            for prompt in PROMPTS:
                print(f"\nprompt: {prompt!r}")
                for name, model in (("base   ", "hatchling"), ("adapter", adapter)):
                    text = (prompt + complete(client, model, prompt)).strip().replace("\n", "\n           ")
                    print(f"  {name}  {text}")
            print(f"\nthe adapter answers as model {adapter!r}")
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    main()
