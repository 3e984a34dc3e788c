#!/usr/bin/env python3
"""Write tokenizer_unicode.json: what Hugging Face's `tokenizers` (0.23.3) gives for awkward text.

    python3 -m venv venv && venv/bin/pip install tokenizers==0.23.3
    venv/bin/python tests/vectors/make_tokenizer_unicode.py

Each variant is one of the two tokenizer.json files with some keys replaced ("patch") and added tokens
appended. Texts are drawn from a pool of characters and strings that have bitten tokenizers before.
"""
import copy
import json
import pathlib
import random

from tokenizers import Tokenizer

vectors = pathlib.Path(__file__).resolve().parent
files = {
    "hatchling": vectors.parent.parent / "models/hatchling/tokenizer.json",
    "gpt-neox-20b": vectors / "tokenizers/gpt-neox-20b.json",
}

added = [
    {"content": "<sw>", "single_word": True},
    {"content": "wort", "single_word": True},
    {"content": "<l>", "lstrip": True},
    {"content": "<r>", "rstrip": True},
    {"content": "<lr>", "lstrip": True, "rstrip": True, "special": True},
    {"content": "\u00e91", "normalized": True},
    {"content": "e\u0301y"},
    {"content": "  ", "normalized": True},
    {"content": "<lo"},
    {"content": "<long>"},
    {"content": "abc"},
    {"content": "bcdef"},
    {"content": "na\nme", "normalized": True, "lstrip": True, "rstrip": True},
]
byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
nfc = {"type": "NFC"}
variants = [
    ("hatchling", {}, []),
    ("gpt-neox-20b", {}, []),
    ("hatchling", {"normalizer": nfc}, added),
    ("hatchling", {}, added),
    ("gpt-neox-20b", {"pre_tokenizer": {**byte_level, "add_prefix_space": True}}, added[2:5]),
    (
        "hatchling",
        {
            "normalizer": {"type": "Sequence", "normalizers": [nfc]},
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{**byte_level, "add_prefix_space": True, "use_regex": False}],
            },
        },
        added[2:6],
    ),
]

pool = (
    [" ", "  ", "   ", " " * 25, "\n", "\t", "\r\n", "\u00a0", "\u2003", "\u180e", "\u3000", "\u0085", "\u200b", "\u200d"]
    + ["'s", "'t", "'ll", "'S", "\u2019s", "Hello", " world", " the", "123", "\uff14", "\u2167", "\u00bd", "\u00b2", "\u0663"]
    + [token["content"] for token in added]
    + ["e\u0301", "x", "y", "ng>", "def", "na", "_", "<|endoftext|>", "<|padding|>", "<|endof", ".", "!!", "$", "\u2026"]
    + ["\u0301", "\u0323", "\u0308", "\u0344", "\u0958", "\uac00", "\u1100", "\u1161", "\u11a8", "\u0c46\u0c56"]
    + ["\u212b", "\u00f1", "\u4e2d\u6587", "\u65e5\u672c", "\U0001f642", "\U0001f469\u200d\U0001f467", "\U0001f1e6"]
    + ["\u2126", "\u03a9", "\ufb01", "\ufeff", "\x7f", "\x1c", "\u24b6", "\u00aa", "\ufffd", "\U0010ffff"]
)


def draw(rng):
    count = rng.choice([1, 2, 3, 5, 8, 13])
    kind = rng.random()
    if kind < 0.7:
        return "".join(rng.choice(pool) for _ in range(count))
    if kind < 0.85:
        ranges = [(32, 127), (1, 0x300), (0x300, 0x600), (0x900, 0xE00), (0x1100, 0x3200), (0xE000, 0x20000)]
        return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(count))
    return "".join(rng.choice(pool) if rng.random() < 0.2 else chr(rng.randrange(97, 123)) for _ in range(4 * count))


def tokenizer_of(base, patch, tokens):
    description = copy.deepcopy(base)
    description.update(patch)
    description["added_tokens"] += tokens
    return Tokenizer.from_str(json.dumps(description))


def main():
    rng = random.Random(20260101)
    written = []
    for name, patch, extra in variants:
        base = json.loads(files[name].read_text())
        next_id = 1 + max([*base["model"]["vocab"].values(), *(token["id"] for token in base["added_tokens"])])
        defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        tokens = [{"id": next_id + i, **defaults, **token} for i, token in enumerate(extra)]
        tokenizer = tokenizer_of(base, patch, tokens)
        cases = []
        for _ in range(150):
            text = draw(rng)
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            cases.append(
                {
                    "text": text,
                    "ids": ids,
                    "decoded": tokenizer.decode(ids, skip_special_tokens=False),
                    "without_special": tokenizer.decode(ids, skip_special_tokens=True),
                }
            )
        written.append({"tokenizer": name, "patch": patch, "added_tokens": tokens, "cases": cases})
    lines = ",\n".join(
        json.dumps({**variant, "cases": None})[:-len("null}")]
        + "[\n" + ",\n".join(json.dumps(case) for case in variant["cases"]) + "\n]}"
        for variant in written
    )
    (vectors / "tokenizer_unicode.json").write_text("[\n" + lines + "\n]\n")


if __name__ == "__main__":
    main()
