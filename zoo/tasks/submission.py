"""Predictions in the form that the benchmarks' servers take.

GLUE wants a table a task with the columns `index` and `prediction` (https://gluebenchmark.com/faq),
SuperGLUE an object a line with `idx` and `label` (https://super.gluebenchmark.com/faq). Both want
diagnostic files too (AX.tsv, AX-b.jsonl, AX-g.jsonl), which are not made here.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np

from zoo.tasks import answers, metrics
from zoo.tasks.data import Examples
from zoo.tasks.task import SUITES, get
from zoo.tasks.text_scores import read_text

_FILES = {
    "glue/cola": "CoLA.tsv",
    "glue/sst2": "SST-2.tsv",
    "glue/mrpc": "MRPC.tsv",
    "glue/stsb": "STS-B.tsv",
    "glue/qqp": "QQP.tsv",
    "glue/qnli": "QNLI.tsv",
    "glue/rte": "RTE.tsv",
    "glue/wnli": "WNLI.tsv",
    "super_glue/boolq": "BoolQ.jsonl",
    "super_glue/cb": "CB.jsonl",
    "super_glue/copa": "COPA.jsonl",
    "super_glue/multirc": "MultiRC.jsonl",
    "super_glue/record": "ReCoRD.jsonl",
    "super_glue/rte": "RTE.jsonl",
    "super_glue/wic": "WiC.jsonl",
    "super_glue/wsc": "WSC.jsonl",
}
_MNLI_FILES = {"matched": "MNLI-m.tsv", "mismatched": "MNLI-mm.tsv"}

# The tasks whose file has the words of the classes; the others' has numbers.
_IN_WORDS = {
    "glue/mnli": ("entailment", "neutral", "contradiction"),
    "glue/qnli": ("entailment", "not_entailment"),
    "glue/rte": ("entailment", "not_entailment"),
    "super_glue/boolq": ("false", "true"),
    "super_glue/cb": ("entailment", "contradiction", "neutral"),
    "super_glue/rte": ("entailment", "not_entailment"),
    "super_glue/wic": ("false", "true"),
    "super_glue/wsc": ("False", "True"),
}


def write_submission(task, examples, outputs, folder, split=None):
    """Writes the predictions of one task, beside and then renamed: the file is there whole.

    Args:
        task: A GLUE or SuperGLUE `Task` or the name of one.
        examples: The `Examples` of a test split, or its `TextExamples`.
        outputs: As in `evaluate`; with `TextExamples` the texts that a model wrote. A text that is
            none of the task's words becomes the first class.
        folder: Where to write; it is made if it is not there. An older file is replaced.
        split: The name of the split, which tells MNLI's two files apart.

    Returns:
        The path of the file.

    Raises:
        ValueError: If the task has no submission file, the outputs do not fit the examples, or
            an example is there twice.
    """
    task = get(task)
    path = submission_path(task, folder, split)
    if isinstance(examples, Examples):
        predicted = _from_outputs(task, examples, outputs)
    else:
        values = read_text(task, outputs, examples)
        if task.words and task.name != "super_glue/record":
            values = [max(value, 0) for value in values]
        predicted = list(zip(examples.ids, values, strict=True))
    if len({id for id, _ in predicted}) < len(predicted):
        raise ValueError(
            f"`examples` must have every example of {task.name!r} once. Received: one twice"
        )
    lines = _lines(task, sorted(predicted, key=lambda pair: pair[0]))
    return _write(path, lines)


def submission_path(task, folder, split=None):
    """Where `write_submission` writes.

    Args:
        task, folder, split: As there.

    Returns:
        Path of the file.

    Raises:
        ValueError: If the task or split has no submission file, or the folder is none.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`predictions` must be a folder. Received: predictions={str(folder)!r}")
    return folder / _file_name(get(task), split)


def _file_name(task, split):
    if task.name == "glue/mnli":
        part = str(split).rpartition("_")[2]
        if split not in task.splits or part not in _MNLI_FILES:
            raise ValueError(
                f"`split` must be one of {list(task.test)} for {task.name!r}. "
                f"Received: split={split!r}"
            )
        return _MNLI_FILES[part]
    if task.name not in _FILES:
        known = [name for names in SUITES.values() for name in names]
        raise ValueError(
            f"`task` must be one of {known}, whose predictions can be handed in. "
            f"Received: task={task.name!r}"
        )
    return _FILES[task.name]


def _from_outputs(task, examples, outputs):
    """A list of an id and what is predicted: a class, a score or an entity."""
    outputs = metrics.check_outputs(task, outputs, examples.labels.shape)
    if task.grouping != "one":
        values = metrics.predictions(task, outputs).tolist()
        return list(zip(examples.ids, values, strict=True))
    groups = metrics.check_groups(task, examples.groups, len(outputs))
    rows = answers.chosen(outputs, groups)
    if examples.candidates is not None:
        return [(examples.ids[row], examples.candidates[row]) for row in rows]
    first = np.unique(groups, return_index=True)[1]
    return [(examples.ids[a], int(b - a)) for a, b in zip(first, rows, strict=True)]


def _lines(task, predicted):
    if task.name == "super_glue/multirc":
        return [json.dumps(passage) for passage in _passages(predicted)]
    words = _IN_WORDS.get(task.name)
    pairs = [(id, words[value] if words else value) for id, value in predicted]
    if task.name in SUITES["superglue"]:
        numbers = [(id[-1] if isinstance(id, tuple) else id, value) for id, value in pairs]
        return [json.dumps({"idx": id, "label": value}) for id, value in numbers]
    if task.labels is None:
        pairs = [(id, f"{min(max(value, 0.0), 5.0):.3f}") for id, value in pairs]
    return ["index\tprediction", *(f"{id}\t{value}" for id, value in pairs)]


def _passages(predicted):
    """MultiRC's answers in their questions in their passages."""
    passages = {}
    for (passage, question, answer), label in predicted:
        answer = {"idx": answer, "label": label}
        passages.setdefault(passage, {}).setdefault(question, []).append(answer)
    for passage, questions in passages.items():
        listed = [{"idx": idx, "answers": answers} for idx, answers in questions.items()]
        yield {"idx": passage, "passage": {"questions": listed}}


def _write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    number, beside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
    return path
