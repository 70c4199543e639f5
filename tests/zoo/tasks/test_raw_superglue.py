import json

import pytest

from tests.zoo.tasks import raw_superglue as made
from zoo.tasks import TASKS, raw_superglue

tfds = pytest.importorskip("tensorflow_datasets")


def check(task, root, partial=False):
    config = tfds.text.SuperGlue.builder_configs[TASKS[task].dataset.partition("/")[2]]
    scratch = root / "scratch"
    scratch.mkdir(exist_ok=True)
    return raw_superglue.check(config, root, scratch, partial)


@pytest.mark.parametrize("task", made.SUPERGLUE)
def test_files(tmp_path, task):
    folder = made.make(tmp_path, task)
    found = check(task, tmp_path)
    assert {split: file.path for split, file in found.items()} == {
        split: folder / name for split, name in made.FILES.items()
    }
    assert {file.rows for file in found.values()} == {made.EXAMPLES[task]}


@pytest.mark.parametrize("task", made.SUPERGLUE)
@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_training_and_test_files_may_be_missing(tmp_path, task, name):
    (made.make(tmp_path, task) / name).unlink()
    assert len(check(task, tmp_path)) == 2


@pytest.mark.parametrize("task", made.SUPERGLUE)
def test_folder_without_the_task(tmp_path, task):
    with pytest.raises(ValueError, match="`source` must hold the folder") as error:
        check(task, tmp_path)
    assert repr(made.FOLDERS[task]) in str(error.value)


def test_missing_file(tmp_path):
    (made.make(tmp_path, "super_glue/cb") / "val.jsonl").unlink()
    with pytest.raises(ValueError, match="`source` must hold the file 'val.jsonl'"):
        check("super_glue/cb", tmp_path)


def changed(row, place, value):
    """A row with another value in a place such as ("passage", "questions", 0)."""
    row = json.loads(json.dumps(row))
    *path, last = place
    target = row
    for step in path:
        target = target[step]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return row


QUESTION = ("passage", "questions", 1)
ENTITY = ("passage", "entities", 2)


@pytest.mark.parametrize(
    ("task", "place", "value", "message"),
    [
        ("boolq", ("passage",), None, "a text 'passage'. Received: None"),
        ("boolq", ("question",), 3, "a text 'question'. Received: 3"),
        ("boolq", ("question",), "\ud800", "a text 'question' of whole characters"),
        ("boolq", ("label",), 1, r"a label of \[false, true\]. Received: 1"),
        ("boolq", ("label",), None, r"a label of \[false, true\]. Received: None"),
        ("boolq", ("idx",), None, "a number 'idx'. Received: None"),
        ("boolq", ("idx",), True, "a number 'idx'. Received: True"),
        ("boolq", ("idx",), -1, "an 'idx' from 0 to 2147483647. Received: -1"),
        ("boolq", ("idx",), 2**31, "an 'idx' from 0 to 2147483647"),
        ("boolq", ("idx",), 0, "an `idx` of its own. Received: 0 again"),
        ("cb", ("label",), "Neutral", r"a label of \[\"entailment\", .*Received: 'Neutral'"),
        ("rte", ("label",), 0, r"a label of \[\"entailment\", \"not_entailment\"\]"),
        ("copa", ("label",), False, r"a label of \[0, 1\]. Received: False"),
        ("copa", ("question",), "reason", "the question 'cause' or 'effect'. Received: 'reason'"),
        ("multirc", ("passage",), "text", "an object 'passage'. Received: 'text'"),
        ("multirc", ("passage", "questions"), [], "a list that is not empty 'questions'"),
        ("multirc", (*QUESTION, "question"), None, "a text 'question'"),
        ("multirc", (*QUESTION, "idx"), "3", "a number 'idx' of each question. Received: '3'"),
        ("multirc", (*QUESTION, "answers"), [], "'answers' of question 3. Received: "),
        ("multirc", (*QUESTION, "answers", 0, "label"), 2, r"a label of question 3 of \[0, 1\]"),
        ("multirc", (*QUESTION, "answers", 0, "text"), None, "'text' of each answer of question 3"),
        ("multirc", ("passage", "questions", 0, "answers", 1, "idx"), 3, "own for each answer"),
        ("record", (*ENTITY, "end"), 10**6, "entities within the text. Received: .* to 1000000"),
        ("record", (*ENTITY, "start"), -1, "entities within the text. Received: -1 to"),
        ("record", ("passage", "entities"), [], "a list that is not empty 'entities'"),
        ("record", ("qas", 1, "query"), "who?", "'@placeholder' in the text of query 3"),
        ("record", ("qas", 1, "answers"), [], "'answers' of query 3"),
        ("record", ("qas", 1, "answers", 0, "text"), 1, "'text' of each answer of query 3"),
        ("record", ("qas", 1, "idx"), 2, "an `idx` of its own for each query"),
        ("wic", ("start1",), "3", "a number 'start1'. Received: '3'"),
        ("wic", ("end2",), 99, "'start2' and 'end2' within 'sentence2'. Received: 2 and 99"),
        ("wic", ("end1",), 3, "'start1' and 'end1' within 'sentence1'. Received: 3 and 3"),
        ("wsc", ("target",), None, "an object 'target'"),
        ("wsc", ("target", "span1_index"), None, "a number 'span1_index'"),
        ("wsc", ("target", "span2_index"), 9, "'span2_index' below its 8 words. Received: 9"),
        ("wsc", ("target", "span1_text"), " ", "a 'span1_text'. Received: an empty one"),
        ("wsc", ("target", "span1_text"), "a dog", r"spans that stand in the text. .*'a dog'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, task, place, value, message):
    task = f"super_glue/{task}"
    path = made.make(tmp_path, task) / "train.jsonl"
    rows = made.lines(task, "train")
    made.write(path, [rows[0], changed(rows[1], place, value), rows[2]])
    with pytest.raises(ValueError, match=message) as error:
        check(task, tmp_path)
    assert str(error.value).startswith(f"Line 2 of {str(path)!r} in `source` must have ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "line", "received"),
    [
        ("", 1, "the end of the file"),
        ("{", 1, "'{'"),
        ("[1]\n", 1, r"'\[1\]"),
        ('{"premise": "a"', 1, '\'{"premise": "a"\''),
    ],
)
def test_what_is_no_object(tmp_path, text, line, received):
    (made.make(tmp_path, "super_glue/cb") / "train.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"Line {line} .* a JSON object. Received: {received}"):
        check("super_glue/cb", tmp_path)


def test_an_empty_line_is_no_object(tmp_path):
    path = made.make(tmp_path, "super_glue/cb") / "train.jsonl"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=r"Line 4 .* a JSON object. Received: '\\n'"):
        check("super_glue/cb", tmp_path)


def test_text_that_is_not_utf8(tmp_path):
    (made.make(tmp_path, "super_glue/cb") / "train.jsonl").write_bytes(b'{"premise": "\xff"}\n')
    with pytest.raises(ValueError, match="`source` must hold UTF-8 text. Received: .*train.jsonl"):
        check("super_glue/cb", tmp_path)


def test_test_files_may_have_labels(tmp_path):
    folder = made.make(tmp_path, "super_glue/cb")
    made.write(folder / "test.jsonl", made.lines("super_glue/cb", "train"))
    assert check("super_glue/cb", tmp_path)["test"].rows == 3


@pytest.mark.parametrize("task", made.SUPERGLUE)
def test_a_repeated_line_is_left_out(tmp_path, task):
    path = made.make(tmp_path, task) / "train.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, *others, first]))
    found = check(task, tmp_path)["train"]
    assert (found.rows, found.repeated) == (made.EXAMPLES[task], 1)
    assert found.path == tmp_path / "scratch" / "train.jsonl"
    assert found.path.read_text() == "".join([first, *others])
