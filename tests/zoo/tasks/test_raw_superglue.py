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
    message = f"`source`.*'{made.FOLDERS[task]}'.*source='{tmp_path}'"
    with pytest.raises(ValueError, match=message):
        check(task, tmp_path)


def test_missing_file(tmp_path):
    (made.make(tmp_path, "super_glue/cb") / "val.jsonl").unlink()
    with pytest.raises(ValueError, match="`source`.*'val.jsonl'.*CB'"):
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
        ("boolq", ("passage",), None, "'passage'.*None"),
        ("boolq", ("question",), 3, "'question'.* 3"),
        ("boolq", ("question",), "\ud800", r"'question'.*ud800"),
        ("boolq", ("label",), 1, r"\[false, true\].* 1"),
        ("boolq", ("label",), None, r"\[false, true\].*None"),
        ("boolq", ("idx",), None, "'idx'.*None"),
        ("boolq", ("idx",), True, "'idx'.*True"),
        ("boolq", ("idx",), -1, "'idx'.*2147483647.*-1"),
        ("boolq", ("idx",), 2**31, "'idx'.*2147483647.*2147483648"),
        ("boolq", ("idx",), 0, "`idx`.* 0"),
        ("cb", ("label",), "Neutral", r"\[\"entailment\", .*'Neutral'"),
        ("rte", ("label",), 0, r"\[\"entailment\", \"not_entailment\"\].* 0"),
        ("copa", ("label",), False, r"\[0, 1\].*False"),
        ("copa", ("question",), "reason", "'cause'.*'effect'.*'reason'"),
        ("multirc", ("passage",), "text", "'passage'.*'text'"),
        ("multirc", ("passage", "questions"), [], r"'questions'.*\[\]"),
        ("multirc", (*QUESTION, "question"), None, "'question'.*None"),
        ("multirc", (*QUESTION, "idx"), "3", "'idx'.*question.*'3'"),
        ("multirc", (*QUESTION, "answers"), [], r"'answers'.*question 3.*\[\]"),
        ("multirc", (*QUESTION, "answers", 0, "label"), 2, r"question 3.*\[0, 1\].* 2"),
        ("multirc", (*QUESTION, "answers", 0, "text"), None, "'text'.*question 3.*None"),
        ("multirc", ("passage", "questions", 0, "answers", 1, "idx"), 3, "`idx`.*answer.*twice"),
        ("record", (*ENTITY, "end"), 10**6, "entities.*34 to 1000000"),
        ("record", (*ENTITY, "start"), -1, "entities.*-1 to 36"),
        ("record", ("passage", "entities"), [], r"'entities'.*\[\]"),
        ("record", ("qas", 1, "query"), "who?", r"'@placeholder'.*query 3.*'who\?'"),
        ("record", ("qas", 1, "answers"), [], r"'answers'.*query 3.*\[\]"),
        ("record", ("qas", 1, "answers", 0, "text"), 1, "'text'.*query 3.* 1"),
        ("record", ("qas", 1, "idx"), 2, "`idx`.*query.*twice"),
        ("wic", ("start1",), "3", "'start1'.*'3'"),
        ("wic", ("end2",), 99, "'start2'.*'end2'.*'sentence2'.*2 and 99"),
        ("wic", ("end1",), 3, "'start1'.*'end1'.*'sentence1'.*3 and 3"),
        ("wsc", ("target",), None, "'target'.*None"),
        ("wsc", ("target", "span1_index"), None, "'span1_index'.*None"),
        ("wsc", ("target", "span2_index"), 9, "'span2_index'.* 8 .* 9"),
        ("wsc", ("target", "span1_text"), " ", "'span1_text'.*empty"),
        ("wsc", ("target", "span1_text"), "a dog", "spans.*'a dog'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, task, place, value, message):
    task = f"super_glue/{task}"
    path = made.make(tmp_path, task) / "train.jsonl"
    rows = made.lines(task, "train")
    made.write(path, [rows[0], changed(rows[1], place, value), rows[2]])
    where = f"^Line 2 .*'{path}'.*`source`"
    with pytest.raises(ValueError, match=f"{where}.*{message}") as error:
        check(task, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "line", "received"),
    [
        ("", 1, "end"),
        ("{", 1, "'{'"),
        ("[1]\n", 1, r"'\[1\]"),
        ('{"premise": "a"', 1, '\'{"premise": "a"\''),
    ],
)
def test_what_is_no_object(tmp_path, text, line, received):
    (made.make(tmp_path, "super_glue/cb") / "train.jsonl").write_text(text)
    with pytest.raises(ValueError, match=f"Line {line} .*train.jsonl'.*JSON.*{received}"):
        check("super_glue/cb", tmp_path)


def test_an_empty_line_is_no_object(tmp_path):
    path = made.make(tmp_path, "super_glue/cb") / "train.jsonl"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=r"Line 4 .*train.jsonl'.*JSON.*'\\n'"):
        check("super_glue/cb", tmp_path)


def test_text_that_is_not_utf8(tmp_path):
    (made.make(tmp_path, "super_glue/cb") / "train.jsonl").write_bytes(b'{"premise": "\xff"}\n')
    with pytest.raises(ValueError, match="`source`.*UTF-8.*train.jsonl'"):
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
