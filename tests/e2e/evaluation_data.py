"""Documents of the built-in tasks in their official files, made up; and the same documents as lm-evaluation-harness has them, with the
harness's own definitions pointed at them."""
import csv
import io
import json
import pathlib
import random
import re

SUBJECTS = ("anatomy", "high_school_us_history")
WORDS = ("river", "Paris", "the", "naïve", "sun", "metal", "don't", "7", "cat", "violin", "green", "under", "slowly", "it's", "a", "of",
         "stone", "42%", "whale", "and", "music", "“quoted”", "ice", "lamp", "runs", "heavy", "north", "bread", "quietly", "glass")


class Writer:
    def __init__(self, folder, documents):
        self.folder, self.n, self.random = pathlib.Path(folder), documents, random.Random(5)

    def words(self, least, most):
        return " ".join(self.random.choice(WORDS) for _ in range(self.random.randint(least, most)))

    def put(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")

    def jsonl(self, name, make, n=None):
        self.put(name, "".join(json.dumps(make(i)) + "\n" for i in range(n or self.n)))

    def arc(self, _):
        labels = self.random.choice(("ABCD", "1234", "ABC", "ABCDE"))
        return {"id": str(self.random.random()), "answerKey": self.random.choice(labels),
                "question": {"stem": self.words(4, 16) + "?", "choices": [{"text": self.words(1, 6), "label": l} for l in labels]}}

    def hellaswag(self, i):
        brackets = self.random.choice(("", " [title] ", " [header] ", "  ", " [substeps]  a ]b "))
        return {"ind": i, "activity_label": self.words(1, 3).capitalize(), "ctx_a": brackets + self.words(5, 14) + "." + brackets,
                "ctx_b": self.random.choice(("", "The " + self.words(0, 3), "éA McDonald")),
                "endings": [self.words(3, 12) + brackets + self.words(1, 3) + "." for _ in range(4)],
                "label": self.random.choice((0, 1, 2, 3))}

    def winogrande(self, _):
        return {"qID": self.words(1, 1), "sentence": f"{self.words(3, 8)} _ {self.words(2, 6)}, _.", "option1": self.words(1, 2),
                "option2": self.words(1, 2), "answer": self.random.choice("12")}

    def openbookqa(self, n):
        rows = ["ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n"]
        for i in range(n):
            choices = " ".join(f"({l}) {self.words(1, 5)}" for l in "ABCD")
            stem = self.random.choice(("", '"')) + self.words(3, 12)
            rows.append(f"{i}\t{stem}\t{choices}\t{stem} {choices}\t{self.random.choice('ABCD')}\n")
        return "".join(rows)

    def mmlu(self, n):
        out = io.StringIO()
        for _ in range(n):
            csv.writer(out, lineterminator="\n").writerow(
                [self.random.choice((" ", "", '"', "a\nb, ")) + self.words(4, 20)] + [self.words(1, 6) for _ in range(4)] +
                [self.random.choice("ABCD")])
        return out.getvalue()

    def write(self):
        self.jsonl("piqa_valid.jsonl", lambda i: {"goal": self.words(1, 12) + self.random.choice(("", " ")), "sol1": self.words(2, 14),
                                                  "sol2": self.words(2, 14), "label": self.random.choice((0, 1))})
        # Documents that are there twice: more than one copy may be drawn for, and removed from, a sample.
        piqa = (self.folder / "piqa_valid.jsonl").read_text().splitlines()
        self.put("piqa_valid.jsonl", "".join(line + "\n" for line in piqa + piqa[:4] * 3))
        for name in ("Easy", "Challenge"):
            for split in ("Train", "Test"):
                self.jsonl(f"ARC-{name}-{split}.jsonl", self.arc)
        self.jsonl("winogrande_dev.jsonl", self.winogrande)
        self.jsonl("hellaswag_train.jsonl", self.hellaswag, 3 * self.n)
        self.jsonl("hellaswag_val.jsonl", self.hellaswag)
        self.put("openbookqa_train.tsv", self.openbookqa(self.n))
        self.put("openbookqa_test.tsv", self.openbookqa(self.n))
        self.jsonl("boolq_train.jsonl", lambda i: {"question": self.words(4, 9), "title": self.words(1, 2), "passage": self.words(9, 30),
                                                   "answer": self.random.random() < 0.5})
        self.jsonl("boolq_dev.jsonl", lambda i: {"question": self.words(4, 9), "title": self.words(1, 2), "passage": self.words(9, 30),
                                                 "answer": self.random.random() < 0.5})
        self.jsonl("lambada_test.jsonl", lambda i: {"text": self.words(6, 30) if i else "word"})
        for subject in SUBJECTS:
            self.put(f"mmlu/dev/{subject}_dev.csv", self.mmlu(5))
            self.put(f"mmlu/test/{subject}_test.csv", self.mmlu(self.n))


# ---- the harness's forms ----

def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def arc(path):
    return [{"id": d["id"], "question": d["question"]["stem"], "answerKey": d["answerKey"],
             "choices": {"text": [c["text"] for c in d["question"]["choices"]], "label": [c["label"] for c in d["question"]["choices"]]}}
            for d in lines(path)]


def openbookqa(path):
    rows = csv.DictReader(path.open(encoding="utf-8", newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [{"id": row["ID"], "question_stem": row["Question Stem"], "answerKey": row["Answer Key"],
             "choices": {"text": list(re.match(r"\(A\) (.*) \(B\) (.*) \(C\) (.*) \(D\) (.*)$", row["Choices"]).groups()),
                         "label": list("ABCD")}} for row in rows]


def boolq(path):
    return [{"idx": i, "passage": d["passage"], "question": d["question"], "label": int(d["answer"])} for i, d in enumerate(lines(path))]


def mmlu(path):
    return [{"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])} for row in csv.reader(path.open(encoding="utf-8", newline=""))]


def hellaswag(path):
    return [{"label": d["gold"], **d} if "query" in d else d for d in lines(path)]


def harness_tasks(data, folder, stock):
    """Definitions for the harness that include its own (in `stock`) and read local files, for all tasks whose documents are in
    `data`. Returns {our name: the harness's name}."""
    data, folder = pathlib.Path(data), pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {}

    def task(name, include, files, **more):
        found = {}
        for split, (file, read) in files.items():
            if not (data / file).exists():
                continue
            path = folder / f"{name}_{split}.jsonl"
            path.write_text("".join(json.dumps(d) + "\n" for d in read(data / file)), encoding="utf-8")
            found[split] = str(path)
        if not set(found) & {"validation", "test"}:
            return
        missing = {f"{split}_split": None for split in ("training", "validation", "test") if {"training": "train"}.get(split, split) not in found}
        definition = {"include": str(stock / include), "task": f"adderd_{name}", "dataset_path": "json", "dataset_name": None,
                      "dataset_kwargs": {"data_files": found}, "tag": None, **missing, **more}
        (folder / f"{name}.yaml").write_text(json.dumps(definition))
        names[name] = f"adderd_{name}"

    task("piqa", "piqa/piqa.yaml", {"train": ("piqa_train.jsonl", lines), "validation": ("piqa_valid.jsonl", lines)})
    for name, file in (("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge")):
        task(name, "arc/arc_easy.yaml", {"train": (f"{file}-Train.jsonl", arc), "test": (f"{file}-Test.jsonl", arc)})
    task("winogrande", "winogrande/default.yaml", {"validation": ("winogrande_dev.jsonl", lines)})
    if (data / "hellaswag_val.jsonl").exists():
        task("hellaswag", "hellaswag/hellaswag.yaml",
             {"train": ("hellaswag_train.jsonl", lines), "validation": ("hellaswag_val.jsonl", lines)})
    else:
        task("hellaswag", "hellaswag/hellaswag.yaml", {"validation": ("hellaswag_val_2500.jsonl", hellaswag)}, process_docs=None)
    has_train = (data / "openbookqa_train.tsv").exists()
    task("openbookqa", "openbookqa/openbookqa.yaml",
         {"train": ("openbookqa_train.tsv", openbookqa), "test": ("openbookqa_test.tsv", openbookqa)},
         **({} if has_train else {"fewshot_split": "test"}))
    task("boolq", "super_glue/boolq/default.yaml", {"train": ("boolq_train.jsonl", boolq), "validation": ("boolq_dev.jsonl", boolq)})
    task("lambada_openai", "lambada/lambada_openai.yaml", {"test": ("lambada_test.jsonl", lines)})
    for path in sorted((data / "mmlu/test").glob("*_test.csv")):
        subject = path.name[:-len("_test.csv")]
        task(f"mmlu_{subject}", f"mmlu/default/mmlu_{subject}.yaml",
             {"dev": (f"mmlu/dev/{subject}_dev.csv", mmlu), "test": (f"mmlu/test/{subject}_test.csv", mmlu)})
    return names
