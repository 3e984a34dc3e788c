"""Mamba-1 once more, in numpy and as plainly as it can be written: what the daemon's scores are held against. It shares nothing
with the engine but the files of the model."""
import json
import struct

import numpy as np


def load(folder):
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        data = raw[8 + length + begin:8 + length + end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data, np.float32)
        tensors[name] = values.reshape(entry["shape"]).astype(np.float64)
    return tensors, json.loads((folder / "config.json").read_text())


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def log_probabilities(model, ids):
    """ids [T] -> log-probabilities of every next token [T, vocabulary]."""
    tensors, config = model
    rank, states, eps = config["time_step_rank"], config["state_size"], config["layer_norm_epsilon"]
    x = tensors["backbone.embeddings.weight"][ids]
    steps = len(ids)
    for layer in range(config["num_hidden_layers"]):
        at = lambda name: tensors[f"backbone.layers.{layer}.{name}"]  # noqa: E731
        h, z = np.split(norm(x, at("norm.weight"), eps) @ at("mixer.in_proj.weight").T, 2, axis=1)
        kernel = at("mixer.conv1d.weight")[:, 0]
        padded = np.vstack([np.zeros((kernel.shape[1] - 1, h.shape[1])), h])
        h = silu(sum(padded[k:k + steps] * kernel[:, k] for k in range(kernel.shape[1])) + at("mixer.conv1d.bias"))
        low, b, c = np.split(h @ at("mixer.x_proj.weight").T, [rank, rank + states], axis=1)
        delta = np.logaddexp(0, low @ at("mixer.dt_proj.weight").T + at("mixer.dt_proj.bias"))
        a = -np.exp(at("mixer.A_log"))
        state, y = np.zeros_like(a), np.empty_like(h)
        for t in range(steps):
            state = np.exp(delta[t][:, None] * a) * state + (delta[t] * h[t])[:, None] * b[t]
            y[t] = state @ c[t]
        x = x + ((y + at("mixer.D") * h) * silu(z)) @ at("mixer.out_proj.weight").T
    logits = norm(x, tensors["backbone.norm_f.weight"], eps) @ tensors["backbone.embeddings.weight"].T
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
