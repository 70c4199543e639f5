import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.zoo.tasks import raw_glue, raw_superglue
from zoo.tasks import TASKS, load, prepare, prepared_in, validation_splits
from zoo.tasks.prepare import tasks_in
from zoo.tasks.raw_files import RawFile

tfds = pytest.importorskip("tensorflow_datasets")

DATA = Path(__file__).parents[4] / "shared" / "data"
REAL = DATA / "glue"
REAL_SUPERGLUE = DATA / "superglue"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing here may look for the network."""

    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.getaddrinfo", refuse)


def contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("task", raw_glue.GLUE)
def test_what_tfds_load_reads_is_what_the_files_say(tmp_path, task):
    raw_glue.make(tmp_path / "raw", task)
    out = tmp_path / "out"
    prepared = prepare(task, tmp_path / "raw", out)
    assert prepared.rows == dict.fromkeys(TASKS[task].splits, 4)
    assert prepared.fresh and not prepared.missing
    assert Path(prepared.directory) == out / task / "2.0.0"
    tables = tfds.load(task, data_dir=str(out), download=False)
    assert set(tables) == set(TASKS[task].splits)
    for split, table in tables.items():
        rows = sorted(tfds.as_numpy(table), key=lambda row: row["idx"])
        found = [([row[k].decode() for k in TASKS[task].inputs], row["label"]) for row in rows]
        assert found == raw_glue.examples(task, split)


def test_nothing_is_said(tmp_path, capfd, caplog):
    """No bars, and no warnings of folders that are not there yet."""
    raw_glue.make(tmp_path / "raw", "glue/wnli")
    prepare("glue/wnli", tmp_path / "raw", tmp_path / "out")
    load("glue/wnli", "train", tmp_path / "out")
    out, err = capfd.readouterr()
    assert out == ""
    assert not any(word in err for word in ("Generating", "Shuffling", "Variant folder"))
    assert not [record for record in caplog.records if record.name == "absl"]


def test_tasks_in_a_folder(tmp_path):
    for task in raw_glue.GLUE:
        raw_glue.make(tmp_path, task)
    assert tasks_in(tmp_path) == (raw_glue.GLUE, {})
    (tmp_path / "QNLI" / "train.tsv").unlink()
    (tmp_path / "RTE" / "train.tsv").unlink()
    (tmp_path / "RTE" / "dev.tsv").unlink()
    (tmp_path / "MRPC" / "dev.tsv").unlink()
    (tmp_path / "MRPC" / "train.tsv").rename(tmp_path / "MRPC" / "msr_paraphrase_train.txt")
    found, left_out = tasks_in(tmp_path)
    assert found == [task for task in raw_glue.GLUE if task != "glue/rte"]
    assert left_out == {"glue/rte": "RTE/train.tsv"}


def test_the_files_tell_which_suite_a_folder_is_of(tmp_path):
    raw_superglue.make(tmp_path, "super_glue/rte")
    found, left_out = tasks_in(tmp_path)
    assert found == ["super_glue/rte"]
    assert "super_glue/cb" in left_out and not any(name.startswith("glue/") for name in left_out)
    raw_glue.make(tmp_path, "glue/rte")  # into the same folder
    assert tasks_in(tmp_path)[0] == ["glue/rte", "super_glue/rte"]
    for task, rows in (("glue/rte", 4), ("super_glue/rte", 3)):
        assert prepare(task, tmp_path, tmp_path / "out").rows["train"] == rows


def test_no_tasks_in_a_folder(tmp_path):
    (tmp_path / "CoLA").mkdir()
    message = f"`source`.*GLUE.*SuperGLUE.*source='{tmp_path}'"
    with pytest.raises(ValueError, match=message):
        tasks_in(tmp_path)


@pytest.mark.parametrize("task", raw_superglue.SUPERGLUE)
def test_superglue(tmp_path, task):
    raw_superglue.make(tmp_path / "raw", task)
    prepared = prepare(task, tmp_path / "raw", tmp_path / "out")
    assert prepared.rows == dict.fromkeys(TASKS[task].splits, raw_superglue.EXAMPLES[task])
    assert prepared.fresh and not prepared.missing and not prepared.partial
    dataset = TASKS[task].dataset
    assert Path(prepared.directory) == tmp_path / "out" / dataset / "1.0.2"
    tables = tfds.load(dataset, data_dir=str(tmp_path / "out"), download=False)
    assert set(tables) == set(TASKS[task].splits)


@pytest.mark.parametrize("task", ["super_glue/cb", "glue/qnli", "glue/mrpc"])
def test_without_training_files(tmp_path, task):
    maker = raw_glue if task in raw_glue.GLUE else raw_superglue
    folder = maker.make(tmp_path / "raw", task, tests=False)
    next(folder.glob("train.*")).unlink()
    prepared = prepare(task, tmp_path / "raw", tmp_path / "out")
    assert list(prepared.rows) == ["validation"]
    assert prepared.missing == ("train", "test")
    assert re.search("  train: left out.*evaluated", str(prepared))
    assert len(load(task, "validation", tmp_path / "out").labels) == prepared.rows["validation"]
    with pytest.raises(ValueError, match=f"`split`.*'{task}'.*split='train'"):
        load(task, "train", tmp_path / "out")


def test_partial_files_stand_in_where_the_official_ones_are_missing(tmp_path):
    folder = raw_superglue.make(tmp_path / "raw", "super_glue/boolq", tests=False)
    (folder / "partial").mkdir()
    (folder / "train.jsonl").rename(folder / "partial" / "train_some.jsonl")
    rows = [row | {"source": "some"} for row in raw_superglue.lines("super_glue/boolq", "x", 5)]
    raw_superglue.write(folder / "partial" / "val_not_used.jsonl", rows)
    official = prepare("super_glue/boolq", tmp_path / "raw", tmp_path / "official")
    assert list(official.rows) == ["validation"] and not official.partial
    prepared = prepare("super_glue/boolq", tmp_path / "raw", tmp_path / "out", partial=True)
    assert prepared.rows == {"train": 3, "validation": 3}
    assert prepared.partial == ("train",)
    assert "  train: 3 rows (partial" in str(prepared)
    assert "  validation: 3 rows\n" in str(prepared)
    again = prepare("super_glue/boolq", tmp_path / "raw", tmp_path / "out")
    assert again == prepared._replace(fresh=False)
    assert prepared_in("super_glue/boolq", tmp_path / "out") == again


def test_partial_tables(tmp_path):
    """MNLI's folder has one of two validation sets, and columns of its own."""
    folder = tmp_path / "raw" / "MNLI" / "partial"
    folder.mkdir(parents=True)
    header = "index\tsentence1\tsentence2\tgold_label"
    (folder / "train_some.tsv").write_text(header + "\tsource\n0\ta\tb\tneutral\tx\n")
    (folder / "dev_matched_4columns.tsv").write_text(header + "\n0\tc\td\tentailment\n")
    raw_glue.make(tmp_path / "raw", "glue/rte")
    found, left_out = tasks_in(tmp_path / "raw")
    assert found == ["glue/rte"]
    assert re.match("MNLI/train.tsv.*`partial`", left_out["glue/mnli"])
    assert tasks_in(tmp_path / "raw", partial=True)[0] == ["glue/mnli", "glue/rte"]
    with pytest.raises(ValueError, match="`source`.*'dev_matched.tsv'.*MNLI'"):
        prepare("glue/mnli", tmp_path / "raw", tmp_path / "out")
    prepared = prepare("glue/mnli", tmp_path / "raw", tmp_path / "out", partial=True)
    assert prepared.rows == {"train": 1, "validation_matched": 1}
    assert prepared.partial == ("train", "validation_matched")
    assert prepared.missing == ("validation_mismatched", "test_matched", "test_mismatched")
    assert load("glue/mnli", "validation_matched", tmp_path / "out").texts == (["c"], ["d"])
    both = ("validation_matched", "validation_mismatched")
    assert validation_splits("glue/mnli", tmp_path / "out") == (both[:1], prepared.partial)
    assert validation_splits("glue/mnli", tmp_path) == (both, ())  # nothing is prepared there


def test_two_partial_files_of_a_split_are_refused(tmp_path):
    folder = raw_superglue.make(tmp_path / "raw", "super_glue/cb")
    (folder / "partial").mkdir()
    (folder / "train.jsonl").rename(folder / "partial" / "train_a.jsonl")
    (folder / "partial" / "train_b.jsonl").write_text("")
    message = "`source`.*'train.jsonl'.*'train_a.jsonl'.*'train_b.jsonl'"
    with pytest.raises(ValueError, match=message):
        prepare("super_glue/cb", tmp_path / "raw", tmp_path / "out", partial=True)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_nothing_partial_is_refused_as_before(tmp_path):
    (tmp_path / "raw" / "CB").mkdir(parents=True)
    with pytest.raises(ValueError, match="`source`.*'val.jsonl'.*CB'"):
        prepare("super_glue/cb", tmp_path / "raw", tmp_path / "out", partial=True)


def test_a_repeated_line_is_left_out_and_said(tmp_path):
    folder = raw_superglue.make(tmp_path / "raw", "super_glue/wic")
    path = folder / "train.jsonl"
    path.write_text(path.read_text() + path.read_text().split("\n")[1] + "\n")
    before = path.read_bytes()
    prepared = prepare("super_glue/wic", tmp_path / "raw", tmp_path / "out")
    assert prepared.rows["train"] == 3
    assert prepared.repeated == {"train": 1}
    assert re.search("  train: 3 rows .*1 repeated", str(prepared))
    assert prepared_in("super_glue/wic", tmp_path / "out").repeated == {"train": 1}
    assert path.read_bytes() == before


def test_what_is_not_there_is_not_prepared(tmp_path):
    assert prepared_in("glue/rte", tmp_path) is None
    assert prepared_in("acceptability", tmp_path) is None


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_in_the_place_of_the_output(tmp_path, out):
    raw_glue.make(tmp_path / "raw", "glue/wnli")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=f"^`data_dir`.*data_dir='.*{out}'$"):
        prepare("glue/wnli", tmp_path / "raw", tmp_path / out)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_that_cannot_be_written_to(tmp_path, monkeypatch):
    raw_glue.make(tmp_path / "raw", "glue/wnli")
    prepare("glue/wnli", tmp_path / "raw", tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="`data_dir`.*data_dir='.*out'"):
        prepare("glue/wnli", tmp_path / "raw", tmp_path / "out", force=True)
    assert not prepare("glue/wnli", tmp_path / "raw", tmp_path / "out").fresh  # nothing to write


def test_only_the_finished_directory_is_left(tmp_path):
    raw_glue.make(tmp_path / "raw", "glue/wnli")
    prepare("glue/wnli", tmp_path / "raw", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["glue"]
    assert [path.name for path in (tmp_path / "out/glue/wnli").iterdir()] == ["2.0.0"]
    assert not any(b".prepare-" in data for data in contents(tmp_path / "out").values())


def test_without_test_files(tmp_path):
    raw_glue.make(tmp_path / "raw", "glue/mnli", tests=False)
    prepared = prepare("glue/mnli", tmp_path / "raw", tmp_path / "out")
    assert prepared.missing == ("test_matched", "test_mismatched")
    assert "  test_matched: left out" in str(prepared)
    assert len(load("glue/mnli", "validation_matched", tmp_path / "out").labels) == 4
    with pytest.raises(ValueError, match="`split`.*'glue/mnli'.*split='test_matched'"):
        load("glue/mnli", "test_matched", tmp_path / "out")


def test_mrpc_as_microsoft_has_it(tmp_path):
    folder = tmp_path / "raw" / "MRPC"
    folder.mkdir(parents=True)
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    train = '1\t1\t2\t"a\tb\n0\t3\t4\tc\td\n1\t5\t6\te\tf\n'
    (folder / "msr_paraphrase_train.txt").write_text(header + train, encoding="utf-8-sig")
    (folder / "msr_paraphrase_test.txt").write_text(header + "1\t7\t8\tg\th\n", "utf-8-sig")
    (folder / "dev_ids.tsv").write_text("3\t4\n")
    prepared = prepare("glue/mrpc", tmp_path / "raw", tmp_path / "out")
    assert prepared.rows == {"train": 2, "validation": 1, "test": 1}
    found = load("glue/mrpc", "train", tmp_path / "out")
    assert sorted(zip(*found.texts, found.labels, strict=True)) == [('"a', "b", 1), ("e", "f", 1)]
    assert load("glue/mrpc", "validation", tmp_path / "out").texts == (["c"], ["d"])
    assert load("glue/mrpc", "test", tmp_path / "out").labels.tolist() == [-1]


def test_preparing_again_does_nothing_and_says_so(tmp_path):
    folder = raw_glue.make(tmp_path / "raw", "glue/rte")
    first = prepare("glue/rte", tmp_path / "raw", tmp_path / "out")
    assert str(first).startswith("glue/rte: prepared in ")
    assert "  train: 4 rows" in str(first)
    before = contents(tmp_path / "out")
    (folder / "train.tsv").unlink()
    again = prepare("glue/rte", tmp_path / "raw", tmp_path / "out")
    assert again == first._replace(fresh=False)
    assert "already prepared" in str(again)
    assert contents(tmp_path / "out") == before


def test_force_prepares_again(tmp_path):
    folder = raw_glue.make(tmp_path / "raw", "glue/rte")
    prepare("glue/rte", tmp_path / "raw", tmp_path / "out")
    raw_glue.write(folder / "train.tsv", "glue/rte", raw_glue.examples("glue/rte", "train", 7))
    prepared = prepare("glue/rte", tmp_path / "raw", tmp_path / "out", force=True)
    assert prepared.fresh and prepared.rows["train"] == 7
    assert len(load("glue/rte", "train", tmp_path / "out").labels) == 7
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["glue"]


def test_a_refused_source_writes_nothing(tmp_path):
    folder = raw_glue.make(tmp_path / "raw", "glue/rte")
    (folder / "dev.tsv").write_text("nothing\n")
    with pytest.raises(ValueError, match="dev.tsv'.*'sentence1'"):
        prepare("glue/rte", tmp_path / "raw", tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("where", ["build", "move"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_things_as_they_were(tmp_path, monkeypatch, where, error):
    folder = raw_glue.make(tmp_path / "raw", "glue/rte")
    prepare("glue/rte", tmp_path / "raw", tmp_path / "out")
    before = contents(tmp_path / "out")
    raw_glue.write(folder / "train.tsv", "glue/rte", raw_glue.examples("glue/rte", "train", 7))

    def interrupt(*args, **kwargs):
        raise error("stopped")

    if where == "build":
        monkeypatch.setattr("tensorflow_datasets.core.DatasetInfo.write_to_directory", interrupt)
    else:
        replace = os.replace

        def moving_in_fails(source, target):
            # TensorFlow Datasets moves files within the folder that it builds, too.
            leaves = ".prepare-" in str(source) and ".prepare-" not in str(target)
            new = leaves and Path(source).name != "replaced"
            interrupt() if new else replace(source, target)

        monkeypatch.setattr(os, "replace", moving_in_fails)
    for out in (tmp_path / "out", tmp_path / "fresh" / "out"):
        with pytest.raises(error, match="stopped"):
            prepare("glue/rte", tmp_path / "raw", out, force=True)
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "fresh").exists()


def test_rows_that_tfds_reads_otherwise_are_an_error(tmp_path, monkeypatch):
    raw_glue.make(tmp_path / "raw", "glue/rte")
    folder = tmp_path / "raw" / "RTE"
    miscounted = {"train": RawFile(folder / "train.tsv", 5)}
    monkeypatch.setattr("zoo.tasks.raw.check", lambda *_: miscounted)
    with pytest.raises(ValueError, match="`source`.*TensorFlow Datasets.*5.*4"):
        prepare("glue/rte", tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_embedded_task_needs_no_preparing(tmp_path):
    with pytest.raises(ValueError, match="`task`.*task='acceptability'"):
        prepare("acceptability", tmp_path, tmp_path)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    texts=st.lists(
        st.text(st.characters(exclude_characters="\t\r\n", codec="utf-8"), max_size=30),
        min_size=30,
        max_size=30,
    )
)
def test_any_text_survives(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("any")
    raw_glue.make(root / "raw", "glue/sst2")
    # Not by `write`, whose format strings would read the braces.
    lines = ["sentence\tlabel", *(f"{text}\t{n % 2}" for n, text in enumerate(texts))]
    (root / "raw/SST-2/train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prepare("glue/sst2", root / "raw", root / "out")
    found = load("glue/sst2", "train", root / "out")
    expected = [(text, n % 2) for n, text in enumerate(texts)]
    assert sorted(zip(found.texts[0], found.labels.tolist(), strict=True)) == sorted(expected)


@pytest.mark.skipif(not (REAL / "WNLI").exists(), reason="the real GLUE files are not here")
@pytest.mark.parametrize(
    ("task", "train", "validation"),
    [("glue/mrpc", 3668, 408), ("glue/rte", 2490, 277), ("glue/wnli", 635, 71)],
)
def test_real_files(tmp_path, task, train, validation):
    prepared = prepare(task, REAL, tmp_path)
    assert (prepared.rows["train"], prepared.rows["validation"]) == (train, validation)
    labels = load(task, "train", tmp_path).labels
    assert len(labels) == train and set(np.unique(labels)) == {0, 1}


@pytest.mark.skipif(not REAL_SUPERGLUE.exists(), reason="the real SuperGLUE files are not here")
@pytest.mark.parametrize(
    ("task", "train", "validation"),
    [("super_glue/cb", 250, 56), ("super_glue/copa", 400, 100), ("super_glue/wsc", 554, 104)],
)
def test_real_superglue_files(tmp_path, task, train, validation):
    prepared = prepare(task, REAL_SUPERGLUE, tmp_path)
    assert (prepared.rows["train"], prepared.rows["validation"]) == (train, validation)


@pytest.mark.skipif(not (REAL / "QNLI").exists(), reason="the real GLUE files are not here")
def test_a_real_folder_without_training_data(tmp_path):
    prepared = prepare("glue/qnli", REAL, tmp_path)
    assert prepared.rows == {"validation": 5463, "test": 5463}
    assert prepared.missing == ("train",)
