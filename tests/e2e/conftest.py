"""The daemon as a fixture: a real process on a free loopback port with a data folder of its own, ended by pid."""
import json
import os
import pathlib
import signal
import subprocess
import time
import urllib.error
import urllib.request

import openai
import pytest

SOURCE = pathlib.Path(__file__).resolve().parents[2]
ADDERD = os.environ.get("ADDERD", str(SOURCE / "build-test/adderd"))
SANITIZED = "asan" in ADDERD or "tsan" in ADDERD
PATIENCE = 10 if SANITIZED else 1  # sanitizers make everything slower


class Server:
    def __init__(self, folder, *flags, models_dir=SOURCE / "models", device="cpu", env=None):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.flags, self.models_dir, self.device, self.env = flags, models_dir, device, env or {}
        self.process = None

    def start(self, wait=True):
        port_file = self.folder / "port"
        port_file.unlink(missing_ok=True)
        self.log = open(self.folder / "adderd.log", "ab")
        self.process = subprocess.Popen(
            [ADDERD, "serve", "--listen", "127.0.0.1:0", "--port-file", str(port_file), "--data-dir", str(self.folder / "data"),
             "--models-dir", str(self.models_dir), "--device", self.device, *self.flags],
            stdout=self.log, stderr=self.log, env={**os.environ, **self.env})
        deadline = time.monotonic() + 20 * PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError("adderd ended at once:\n" + self.text_log())
            if port_file.exists() and port_file.read_text().strip():
                self.base = "http://" + port_file.read_text().strip()
                if not wait or self.get("/readyz").status == 200:
                    return self
            time.sleep(0.01)
        raise RuntimeError("adderd is not ready:\n" + self.text_log())

    def text_log(self):
        return (self.folder / "adderd.log").read_text(errors="replace")[-4000:]

    def stop(self, timeout=30):
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout * PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise RuntimeError("adderd did not stop:\n" + self.text_log())
        if self.process:
            code, self.process = self.process.returncode, None
            self.log.close()
            return code

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process = None
        self.log.close()

    def worker_pids(self):
        return [int(pid) for pid in pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]

    def openai(self, key="none", **more):
        return openai.OpenAI(base_url=self.base + "/v1", api_key=key, timeout=120 * PATIENCE, **more)

    def get(self, path, headers=None):
        return self.send("GET", path, headers=headers)

    def send(self, method, path, body=None, headers=None):
        """An answer with .status, .headers, .body and .json(), whatever the status."""
        headers = dict(headers or {})
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        request = urllib.request.Request(self.base + path, data=body, method=method, headers=headers)
        try:
            answer = urllib.request.urlopen(request, timeout=120 * PATIENCE)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            answer.body = answer.read()
        answer.json = lambda: json.loads(answer.body)
        return answer


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One daemon for all tests that do not restart it."""
    server = Server(tmp_path_factory.mktemp("shared")).start()
    yield server
    assert server.stop() == 0, server.text_log()
    sanitizer = [line for line in server.text_log().splitlines() if "Sanitizer" in line or "runtime error" in line]
    assert not sanitizer, sanitizer


@pytest.fixture
def client(server):
    return server.openai()


@pytest.fixture
def own_server(tmp_path):
    """Daemons of a test's own, which it may kill: own_server(flags...) starts one in the test's folder."""
    servers = []

    def start(*flags, **more):
        servers.append(Server(tmp_path / more.pop("name", "own"), *flags, **more))
        return servers[-1].start()

    yield start
    for server in servers:
        server.stop()


def jsonl(*records):
    return ("\n".join(json.dumps(record) for record in records) + "\n").encode()


STORIES = jsonl(*(
    {"prompt": f"Q: What does the {animal} say?\nA:", "completion": f" The {animal} says {sound}."}
    for animal, sound in [("cow", "moo"), ("cat", "meow"), ("dog", "woof"), ("duck", "quack"), ("sheep", "baa"),
                          ("pig", "oink"), ("horse", "neigh"), ("frog", "ribbit"), ("bee", "buzz"), ("crow", "caw"),
                          ("lion", "roar"), ("hen", "cluck")]))


def upload(client, content=STORIES, name="stories.jsonl", purpose="fine-tune"):
    return client.files.create(file=(name, content), purpose=purpose).id


def wait_for(client, job, *statuses, timeout=120):
    deadline = time.monotonic() + timeout * PATIENCE
    while time.monotonic() < deadline:
        state = client.fine_tuning.jobs.retrieve(job)
        if state.status in statuses:
            return state
        if state.status in ("succeeded", "failed", "cancelled"):
            break
        time.sleep(0.05)
    raise AssertionError(f"job is {state.status}, not {statuses}: {state.error}")


@pytest.fixture(scope="session")
def adapter(server):
    """A small adapter that every test may use: trained once, through the client."""
    client = server.openai()
    job = client.fine_tuning.jobs.create(
        model="hatchling", training_file=upload(client), suffix="sounds", seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 4}}},
        extra_body={"hyperparameters": {"learning_rate": 5e-3, "max_seq_len": 64, "packing": False}})
    return wait_for(client, job.id, "succeeded")
