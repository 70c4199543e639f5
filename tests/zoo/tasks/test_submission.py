import json
import os

import numpy as np
import pytest

from zoo.tasks import SUITES, TASKS, Examples, TextExamples, submission_path, write_submission


def examples(task, ids, **options):
    width = len(TASKS[task].inputs)
    labels = np.full(len(ids), -1)
    return Examples(([""] * len(ids),) * width, labels, np.arange(len(ids)), ids, **options)


def logits(predictions, classes=2):
    return np.eye(classes)[predictions]


def write(task, predictions, folder, split=None):
    ids = list(range(len(predictions)))[::-1]  # Not in order, as tfds.load gives them.
    outputs = logits(predictions, TASKS[task].num_classes)
    return write_submission(task, examples(task, ids), outputs, folder, split)


@pytest.mark.parametrize(
    ("task", "name", "rows"),
    [
        ("glue/cola", "CoLA.tsv", ["0\t1", "1\t0"]),
        ("glue/sst2", "SST-2.tsv", ["0\t1", "1\t0"]),
        ("glue/mrpc", "MRPC.tsv", ["0\t1", "1\t0"]),
        ("glue/qqp", "QQP.tsv", ["0\t1", "1\t0"]),
        ("glue/wnli", "WNLI.tsv", ["0\t1", "1\t0"]),
        ("glue/qnli", "QNLI.tsv", ["0\tnot_entailment", "1\tentailment"]),
        ("glue/rte", "RTE.tsv", ["0\tnot_entailment", "1\tentailment"]),
    ],
)
def test_tables(tmp_path, task, name, rows):
    path = write(task, [0, 1], tmp_path / "new" / "folder")  # of the examples 1 and 0
    assert path == tmp_path / "new" / "folder" / name
    assert path.read_text() == "index\tprediction\n" + "".join(f"{row}\n" for row in rows)


@pytest.mark.parametrize(
    ("split", "name"), [("test_matched", "MNLI-m.tsv"), ("test_mismatched", "MNLI-mm.tsv")]
)
def test_the_two_tables_of_mnli(tmp_path, split, name):
    path = write("glue/mnli", [2, 1, 0], tmp_path, split)
    assert path.name == name
    assert path.read_text().split("\n")[1:-1] == ["0\tentailment", "1\tneutral", "2\tcontradiction"]


def test_scores_stay_in_their_range(tmp_path):
    outputs = [[5.5], [-0.2], [2.34567]]
    path = write_submission("glue/stsb", examples("glue/stsb", [0, 1, 2]), outputs, tmp_path)
    assert path.name == "STS-B.tsv"
    assert path.read_text() == "index\tprediction\n0\t5.000\n1\t0.000\n2\t2.346\n"


@pytest.mark.parametrize(
    ("task", "name", "labels"),
    [
        ("super_glue/boolq", "BoolQ.jsonl", ["true", "false"]),
        ("super_glue/wic", "WiC.jsonl", ["true", "false"]),
        ("super_glue/wsc", "WSC.jsonl", ["True", "False"]),
        ("super_glue/rte", "RTE.jsonl", ["not_entailment", "entailment"]),
        ("super_glue/cb", "CB.jsonl", ["contradiction", "entailment"]),
    ],
)
def test_objects(tmp_path, task, name, labels):
    path = write(task, [0, 1], tmp_path)
    assert path.name == name
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"idx": 0, "label": labels[0]}, {"idx": 1, "label": labels[1]}]


def test_copa_has_the_number_of_the_choice(tmp_path):
    found = examples("super_glue/copa", [7, 7, 3, 3])._replace(groups=np.array([0, 0, 1, 1]))
    outputs = [[0, 1], [0, 2], [0, 5], [0, 1]]  # margins 1 2 and 5 1
    path = write_submission("super_glue/copa", found, outputs, tmp_path)
    assert path.read_text() == '{"idx": 3, "label": 0}\n{"idx": 7, "label": 1}\n'


def test_record_has_the_entity(tmp_path):
    ids = [(0, 5), (0, 5), (0, 4)]
    found = examples("super_glue/record", ids, candidates=["Ann", "José", "Cy"])
    found = found._replace(groups=np.array([0, 0, 1]))
    path = write_submission("super_glue/record", found, [[0, 1], [0, 2], [0, 0]], tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.name == "ReCoRD.jsonl"
    assert rows == [{"idx": 4, "label": "Cy"}, {"idx": 5, "label": "José"}]


def test_multirc_has_answers_in_questions_in_passages(tmp_path):
    ids = [(1, 2, 3), (0, 0, 1), (0, 0, 0), (0, 1, 2)]
    found = examples("super_glue/multirc", ids)._replace(groups=np.array([0, 1, 1, 2]))
    path = write_submission("super_glue/multirc", found, logits([1, 1, 0, 0]), tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    first = [{"idx": 0, "label": 0}, {"idx": 1, "label": 1}]
    questions = [
        {"idx": 0, "answers": first},
        {"idx": 1, "answers": [{"idx": 2, "label": 0}]},
    ]
    other = [{"idx": 2, "answers": [{"idx": 3, "label": 1}]}]
    assert rows == [
        {"idx": 0, "passage": {"questions": questions}},
        {"idx": 1, "passage": {"questions": other}},
    ]


@pytest.mark.parametrize(
    ("task", "ids", "said", "rows"),
    [
        ("super_glue/boolq", [1, 0], ["True", "?"], [("0", "false"), ("1", "true")]),
        ("super_glue/copa", [0, 1], ["choice2", "choice1"], [("0", 1), ("1", 0)]),
        ("super_glue/record", [(0, 3)], ["Ann Lee"], [("3", "Ann Lee")]),
        ("super_glue/wsc", [0, 1], ["a cat", "a dog"], [("0", "True"), ("1", "False")]),
    ],
)
def test_generated_texts(tmp_path, task, ids, said, rows):
    count = len(ids)
    found = TextExamples([""] * count, [], np.full(count, -1), None, ids, [("the cat",)] * count)
    path = write_submission(task, found, said, tmp_path)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [{"idx": int(idx), "label": label} for idx, label in rows]


def test_generated_scores(tmp_path):
    found = TextExamples([""] * 2, [], np.full(2, -1.0), None, [0, 1], [()] * 2)
    path = write_submission("glue/stsb", found, ["3.4", "none"], tmp_path)
    assert path.read_text() == "index\tprediction\n0\t3.400\n1\t0.000\n"


def test_every_task_of_a_suite_has_a_file(tmp_path):
    tasks = [(suite, TASKS[name]) for suite, names in SUITES.items() for name in names]
    splits = [(suite, task, split) for suite, task in tasks for split in task.test]
    paths = {submission_path(task, tmp_path / suite, split) for suite, task, split in splits}
    assert len(paths) == len(splits) and tmp_path not in paths


def test_an_older_file_survives_a_failure(tmp_path, monkeypatch):
    path = write("glue/rte", [0, 1], tmp_path)
    before = path.read_text()

    def fails(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        write("glue/rte", [1, 1], tmp_path)
    assert path.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["RTE.tsv"]


@pytest.mark.parametrize(
    ("task", "ids", "outputs", "message"),
    [
        ("acceptability", [0], [[0, 1]], "`task`.*task='acceptability'"),
        ("glue/mnli", [0], [[0, 1, 2]], "`split`.*'test_matched', .*split=None"),
        ("glue/rte", [0, 0], [[0, 1]] * 2, "`examples`.*'glue/rte'.*twice"),
        ("glue/rte", [0], [[0, 1]] * 2, r"`outputs`.*\(1, 2\).*\(2, 2\)"),
        ("glue/rte", [0], [[0, np.inf]], "`outputs`.*inf"),
    ],
)
def test_errors_write_nothing(tmp_path, task, ids, outputs, message):
    with pytest.raises(ValueError, match=message):
        write_submission(task, examples(task, ids), outputs, tmp_path)
    assert list(tmp_path.iterdir()) == []
