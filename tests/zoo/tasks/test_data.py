import numpy as np
import pytest

from tests.zoo.tasks import raw_glue, raw_superglue
from zoo.tasks import TASKS, get, load, prepare
from zoo.tasks.acceptability import SIZES
from zoo.tasks.data import features, group

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)


@pytest.mark.parametrize("split", SIZES)
def test_the_embedded_task_needs_nothing(no_network, split):
    examples = load("acceptability", split)
    assert len(examples.texts) == 1
    assert len(examples.texts[0]) == len(examples.labels) == SIZES[split]
    assert examples.labels.dtype == np.int32
    assert set(examples.labels) == {0, 1}


@pytest.mark.parametrize(
    ("task", "dtype"), [("glue/cola", np.int32), ("glue/stsb", np.float32), ("glue/qnli", np.int32)]
)
def test_texts_and_labels(no_network, tmp_path, task, dtype):
    raw_glue.make(tmp_path / "raw", task)
    prepare(task, tmp_path / "raw", tmp_path / "out")
    for split in get(task).splits:
        examples = load(get(task), split, tmp_path / "out")
        assert examples.labels.dtype == dtype
        assert examples.labels.shape == (4,)
        assert all(type(text) is str for texts in examples.texts for text in texts)
        found = sorted(zip(*examples.texts, examples.labels, strict=True))
        assert found == sorted((*texts, y) for texts, y in raw_glue.examples(task, split))


# Rows and questions of the files of three lines.
ROWS = raw_superglue.EXAMPLES | {"super_glue/copa": 6, "super_glue/record": 12}
QUESTIONS = raw_superglue.EXAMPLES | {"super_glue/multirc": 6}


@pytest.mark.parametrize("task", raw_superglue.SUPERGLUE)
def test_rows_and_questions(no_network, tmp_path, task):
    raw_superglue.make(tmp_path / "raw", task)
    prepare(task, tmp_path / "raw", tmp_path / "out")
    for split in get(task).splits:
        found = load(task, split, tmp_path / "out")
        count = ROWS[task]
        assert len(found.texts) == len(TASKS[task].inputs)
        assert all(len(texts) == count for texts in found.texts)
        assert found.labels.shape == found.groups.shape == (count,)
        assert found.labels.dtype == found.groups.dtype == np.int32
        assert found.groups[0] == 0 and set(np.diff(found.groups)) <= {0, 1}
        assert found.groups[-1] + 1 == QUESTIONS[task]
        assert all(type(text) is str for texts in found.texts for text in texts)
        assert (set(found.labels) == {-1}) is (split == "test")


def test_multirc_in_groups(no_network, tmp_path):
    raw_superglue.make(tmp_path / "raw", "super_glue/multirc")
    prepare("super_glue/multirc", tmp_path / "raw", tmp_path / "out")
    found = load("super_glue/multirc", "train", tmp_path / "out")
    assert sorted(found.ids) == [(n // 3, 2 * (n // 3) + (n % 3) // 2, n) for n in range(9)]
    assert found.candidates is None and found.answers is None
    for row, (paragraph, question, answer) in enumerate(found.ids):
        expected = "Who? she" if answer % 3 == 2 else f"Which? {('this', 'that')[answer % 3]}"
        assert found.texts[0][row] == expected
        assert found.texts[1][row] == f"Sent 1: train {paragraph}. "
        assert found.labels[row] == (1, 0, paragraph % 2)[answer % 3]
        if answer % 3 == 1:
            assert found.ids[row - 1] == (paragraph, question, answer - 1)  # in their order


def test_record_has_candidates_and_answers(no_network, tmp_path):
    raw_superglue.make(tmp_path / "raw", "super_glue/record")
    prepare("super_glue/record", tmp_path / "raw", tmp_path / "out")
    found = load("super_glue/record", "validation", tmp_path / "out")
    assert found.candidates == ["Ann", "Bob"] * 6
    assert len(found.answers) == 6
    for row, (_, query) in enumerate(found.ids):
        right = ("Ann",) if query % 2 == 0 else ("Ann", "Bob")
        assert found.answers[found.groups[row]] == right
        assert found.labels[row] == (found.candidates[row] in right)
    assert load("super_glue/record", "test", tmp_path / "out").answers == [()] * 6


def test_features_are_those_of_tensorflow_datasets(no_network, tmp_path):
    raw_superglue.make(tmp_path / "raw", "super_glue/wic")
    prepare("super_glue/wic", tmp_path / "raw", tmp_path / "out")
    found = sorted(features("super_glue/wic", "train", tmp_path / "out"), key=lambda x: x["idx"])
    raw = raw_superglue.lines("super_glue/wic", "train")
    assert found == [{k: v for k, v in row.items() if k != "version"} for row in raw]


def test_group_brings_questions_together():
    ids = [(0, 1, 5), (0, 0, 2), (0, 1, 4), (0, 0, 1)]
    groups, order = group(ids, get("super_glue/multirc"))
    assert groups.tolist() == [0, 0, 1, 1]
    assert order == [2, 0, 3, 1]
    groups, order = group([3, 3, 1, 1], get("super_glue/copa"))
    assert (groups.tolist(), order) == ([0, 0, 1, 1], [0, 1, 2, 3])
    groups, order = group([3, 1, 3], get("glue/rte"))
    assert (groups.tolist(), order) == ([0, 1, 2], [0, 1, 2])


def test_tfds_load_is_the_door(monkeypatch, tmp_path):
    calls = []

    def fake(name, **kwargs):
        calls.append((name, kwargs))
        return {
            "sentence": np.array([b"one", b"two"]),
            "label": np.array([1, 0]),
            "idx": np.array([7, 3]),
        }

    monkeypatch.setattr("tensorflow_datasets.load", fake)
    examples = load("glue/sst2", "validation", str(tmp_path))
    assert examples.texts == (["one", "two"],)
    assert examples.labels.tolist() == [1, 0]
    assert examples.ids == [7, 3]
    assert examples.groups.tolist() == [0, 1]
    [(name, kwargs)] = calls
    assert name == "glue/sst2"
    assert kwargs["split"] == "validation"
    assert kwargs["data_dir"] == str(tmp_path)
    assert kwargs["download"] is False


def test_what_is_not_prepared_is_downloaded(monkeypatch, tmp_path):
    real, downloads = tfds.load, []

    def fake(name, **kwargs):
        downloads.append(kwargs["download"])
        if not kwargs["download"]:
            return real(name, **kwargs)
        return {"sentence": np.array([b"one"]), "label": np.array([1]), "idx": np.array([0])}

    monkeypatch.setattr("tensorflow_datasets.load", fake)
    monkeypatch.setattr("socket.getaddrinfo", lambda *args: [])
    assert load("glue/sst2", "train", tmp_path).texts == (["one"],)
    assert downloads == [False, True]


@pytest.mark.parametrize("data_dir", [None, "somewhere"])
def test_neither_data_nor_network(no_network, monkeypatch, tmp_path, data_dir):
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    path = None if data_dir is None else tmp_path / data_dir
    command = "`python -m zoo prepare --from DIR --data-dir OUT`"
    received = f"data_dir={None if path is None else repr(str(path))}"
    message = f"^`data_dir`.*'glue/rte'.*{command}.*{received}$"
    with pytest.raises(FileNotFoundError, match=message) as error:
        load("glue/rte", "train", path)
    assert isinstance(error.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails_keeps_its_cause(monkeypatch, tmp_path):
    real = tfds.load

    def fake(name, **kwargs):
        if kwargs["download"]:
            raise RuntimeError("checksum")
        return real(name, **kwargs)

    monkeypatch.setattr("tensorflow_datasets.load", fake)
    monkeypatch.setattr("socket.getaddrinfo", lambda *args: [])
    message = "`data_dir`.*'glue/rte'.*`python -m zoo prepare "
    with pytest.raises(FileNotFoundError, match=message) as error:
        load("glue/rte", "train", tmp_path)
    assert str(error.value.__cause__) == "checksum"


def test_a_proxy_may_know_more_than_the_resolver(no_network, monkeypatch, tmp_path):
    def fake(name, **kwargs):
        if not kwargs["download"]:
            raise AssertionError
        return {"sentence": np.array([b"one"]), "label": np.array([1]), "idx": np.array([0])}

    monkeypatch.setattr("tensorflow_datasets.load", fake)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    assert load("glue/sst2", "train", tmp_path).labels.tolist() == [1]


def test_other_errors_of_tfds_pass(monkeypatch, tmp_path):
    def fake(name, **kwargs):
        raise ValueError("something else")

    monkeypatch.setattr("tensorflow_datasets.load", fake)
    with pytest.raises(ValueError, match="^something else$"):
        load("glue/sst2", "train", tmp_path)


@pytest.mark.parametrize(("task", "split"), [("glue/mnli", "validation"), ("acceptability", "dev")])
def test_unknown_split(task, split):
    with pytest.raises(ValueError, match=f"`split`.*'{task}'.*split='{split}'"):
        load(task, split)


def test_unknown_task():
    with pytest.raises(ValueError, match="`task`.*task='glue/coal'"):
        load("glue/coal", "train")
