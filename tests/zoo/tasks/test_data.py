import numpy as np
import pytest

from tests.zoo.tasks import raw_glue
from zoo.tasks import get, load, prepare
from zoo.tasks.acceptability import SIZES

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


def test_tfds_load_is_the_door(monkeypatch, tmp_path):
    calls = []

    def fake(name, **kwargs):
        calls.append((name, kwargs))
        return {"sentence": np.array([b"one", b"two"]), "label": np.array([1, 0]), "idx": [0, 1]}

    monkeypatch.setattr("tensorflow_datasets.load", fake)
    examples = load("glue/sst2", "validation", str(tmp_path))
    assert examples.texts == (["one", "two"],)
    assert examples.labels.tolist() == [1, 0]
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
        return {"sentence": np.array([b"one"]), "label": np.array([1])}

    monkeypatch.setattr("tensorflow_datasets.load", fake)
    monkeypatch.setattr("socket.getaddrinfo", lambda *args: [])
    assert load("glue/sst2", "train", tmp_path).texts == (["one"],)
    assert downloads == [False, True]


@pytest.mark.parametrize("data_dir", [None, "somewhere"])
def test_neither_data_nor_network(no_network, monkeypatch, tmp_path, data_dir):
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    path = None if data_dir is None else tmp_path / data_dir
    with pytest.raises(FileNotFoundError) as error:
        load("glue/rte", "train", path)
    message = str(error.value)
    assert "`data_dir` must hold 'glue/rte'" in message
    assert "`python -m zoo prepare --from DIR --data-dir OUT`" in message
    assert f"Received: data_dir={None if path is None else repr(str(path))}" in message
    assert "\n" not in message
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
    with pytest.raises(FileNotFoundError, match="could not be downloaded") as error:
        load("glue/rte", "train", tmp_path)
    assert str(error.value.__cause__) == "checksum"


def test_a_proxy_may_know_more_than_the_resolver(no_network, monkeypatch, tmp_path):
    def fake(name, **kwargs):
        if not kwargs["download"]:
            raise AssertionError
        return {"sentence": np.array([b"one"]), "label": np.array([1])}

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
    with pytest.raises(ValueError, match=f"`split` must be one of .*Received: split='{split}'"):
        load(task, split)


def test_unknown_task():
    with pytest.raises(ValueError, match="did you mean 'glue/cola'"):
        load("glue/coal", "train")
