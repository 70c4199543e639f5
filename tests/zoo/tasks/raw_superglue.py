"""Small raw SuperGLUE files in the official form of each task."""

import json

from zoo.tasks import SUITES

SUPERGLUE = list(SUITES["superglue"])

FOLDERS = {
    "super_glue/boolq": "BoolQ",
    "super_glue/cb": "CB",
    "super_glue/copa": "COPA",
    "super_glue/multirc": "MultiRC",
    "super_glue/record": "ReCoRD",
    "super_glue/rte": "RTE",
    "super_glue/wic": "WiC",
    "super_glue/wsc": "WSC",
}
FILES = {"train": "train.jsonl", "validation": "val.jsonl", "test": "test.jsonl"}

# How many examples TensorFlow Datasets makes of a file with three lines.
EXAMPLES = dict.fromkeys(SUPERGLUE, 3) | {"super_glue/multirc": 9, "super_glue/record": 6}


def lines(task, split, count=3):
    """The lines of a file, as dicts."""
    rows = [_LINES[task](n, split) for n in range(count)]
    return [_without_labels(row) for row in rows] if split == "test" else rows


def _without_labels(value):
    if isinstance(value, dict):
        parts = {k: _without_labels(v) for k, v in value.items() if k != "label"}
        if "query" in parts:
            del parts["answers"]
        return parts
    return [_without_labels(v) for v in value] if isinstance(value, list) else value


def _boolq(n, split):
    return {
        "question": f"is it {n} é",
        "passage": f"{split} passage\u2028 {n}",
        "idx": n,
        "label": n % 2 == 1,
    }


def _cb(n, split):
    label = ("entailment", "contradiction", "neutral")[n % 3]
    return {"premise": f"{split} {n}", "hypothesis": "it's so", "label": label, "idx": n}


def _copa(n, split):
    return {
        "premise": f"{split} {n}.",
        "choice1": "It rained.",
        "choice2": "It snowed.",
        "question": ("cause", "effect")[n % 2],
        "label": n % 2,
        "idx": n,
    }


def _multirc(n, split):
    """A paragraph with two questions, of two answers and of one; their numbers go on."""
    return {
        "idx": n,
        "version": 1.1,
        "passage": {
            "text": f"<b>Sent 1: </b>{split} {n}.<br>",
            "questions": [
                {
                    "question": "Which?",
                    "idx": 2 * n,
                    "answers": [
                        {"text": "this", "idx": 3 * n, "label": 1},
                        {"text": "that", "idx": 3 * n + 1, "label": 0},
                    ],
                },
                {
                    "question": "Who?",
                    "idx": 2 * n + 1,
                    "answers": [{"text": "she", "idx": 3 * n + 2, "label": n % 2}],
                },
            ],
        },
    }


def _record(n, split):
    """A passage with three entities, of which two are the same, and two queries."""
    text = f"Ann met Bob in {split} {n}\n@highlight\nAnn left"
    spans = [(0, 2), (8, 10), (text.index("\nAnn") + 1, text.index("\nAnn") + 3)]
    answers = [{"start": 0, "end": 2, "text": "Ann"}]
    both = [*answers, {"start": 8, "end": 10, "text": "Bob"}]
    return {
        "source": "made up",
        "idx": n,
        "passage": {"text": text, "entities": [{"start": s, "end": e} for s, e in spans]},
        "qas": [
            {"query": "@placeholder left", "idx": 2 * n, "answers": answers},
            {"query": "they saw @placeholder", "idx": 2 * n + 1, "answers": both},
        ],
    }


def _rte(n, split):
    label = ("entailment", "not_entailment")[n % 2]
    return {"premise": f"{split} {n}", "hypothesis": "so it is", "label": label, "idx": n}


def _wic(n, split):
    return {
        "word": "place",
        "sentence1": f"No place in {split}.",
        "sentence2": f"{n} places.",
        "idx": n,
        "start1": 3,
        "end1": 8,
        "start2": 2,
        "end2": 8,
        "version": 1.1,
        "label": n % 2 == 0,
    }


def _wsc(n, split):
    target = {"span1_text": "The cat", "span1_index": 2, "span2_text": "It", "span2_index": 4}
    return {
        "text": f"{split} saw the cat. It slept {n} hours.",
        "target": target,
        "idx": n,
        "label": n % 2 == 0,
    }


_LINES = {
    "super_glue/boolq": _boolq,
    "super_glue/cb": _cb,
    "super_glue/copa": _copa,
    "super_glue/multirc": _multirc,
    "super_glue/record": _record,
    "super_glue/rte": _rte,
    "super_glue/wic": _wic,
    "super_glue/wsc": _wsc,
}


def write(path, rows):
    """Writes rows, an object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(root, task, tests=True):
    """Writes all files of a task under `root`; returns its folder."""
    folder = root / FOLDERS[task]
    for split, name in FILES.items():
        if tests or split != "test":
            write(folder / name, lines(task, split))
    return folder
