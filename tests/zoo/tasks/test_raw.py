import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.zoo.tasks import raw_glue
from zoo.tasks import raw

tfds = pytest.importorskip("tensorflow_datasets")


def config(task):
    return tfds.text.Glue.builder_configs[task.removeprefix("glue/")]


def check(task, root, scratch=None):
    scratch = scratch or root / "scratch"
    scratch.mkdir(exist_ok=True)
    return raw.check(config(task), root, scratch)


def counts(task, root, scratch=None):
    return {split: file.rows for split, file in check(task, root, scratch).items()}


@pytest.mark.parametrize("task", raw_glue.GLUE)
def test_counts(tmp_path, task):
    raw_glue.make(tmp_path, task)
    found = check(task, tmp_path)
    assert {split: file.rows for split, file in found.items()} == dict.fromkeys(
        raw_glue.TASKS[task].splits, 4
    )
    assert not any(file.partial or file.repeated for file in found.values())


@pytest.mark.parametrize("task", raw_glue.GLUE)
def test_test_files_may_be_missing(tmp_path, task):
    raw_glue.make(tmp_path, task, tests=False)
    assert not any(split.startswith("test") for split in check(task, tmp_path))


@pytest.mark.parametrize("task", raw_glue.GLUE)
def test_training_files_may_be_missing(tmp_path, task):
    folder = raw_glue.make(tmp_path, task)
    (folder / "train.tsv").unlink()
    assert list(check(task, tmp_path)) == list(raw_glue.TASKS[task].splits[1:])


@pytest.mark.parametrize("task", raw_glue.GLUE)
def test_folder_without_the_task(tmp_path, task):
    message = f"`source`.*'{raw_glue.FOLDERS[task]}'.*source='{tmp_path}'"
    with pytest.raises(ValueError, match=message):
        check(task, tmp_path)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("glue/cola", "dev.tsv"),
        ("glue/rte", "dev.tsv"),
        ("glue/mnli", "dev_mismatched.tsv"),
    ],
)
def test_missing_file(tmp_path, task, name):
    folder = raw_glue.make(tmp_path, task)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"`source`.*'{name}'.*'{folder}'"):
        check(task, tmp_path)


def edited(path, line, old, new):
    lines = path.read_text(encoding="utf-8").split("\n")
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new)
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("task", "name", "line", "old", "new", "message"),
    [
        ("glue/rte", "train.tsv", 1, "label", "lable", "'label'.*'lable'"),
        ("glue/sst2", "dev.tsv", 1, "sentence", "text", "'sentence'.*'text'"),
        ("glue/stsb", "test.tsv", 1, "sentence2", "s2", "'sentence2'.*'s2'"),
        ("glue/mrpc", "train.tsv", 1, "#1 ID", "id", "'#1 ID'.*'id'"),
        ("glue/rte", "train.tsv", 3, "\tit's", " it's", "4 .*columns.* 3"),
        ("glue/rte", "dev.tsv", 2, "it's", "it\t's", "4 .*columns.* 5"),
        ("glue/cola", "train.tsv", 1, "gj04\t", "", "4 .*columns.* 3"),
        ("glue/cola", "test.tsv", 4, "2\t", "", "2 .*columns.* 1"),
        ("glue/qqp", "train.tsv", 2, "\tit's", " it's", "6 .*columns.* 5"),
        ("glue/mrpc", "dev.tsv", 2, "\tit's", " it's", "5 .*columns.* 4"),
        ("glue/cola", "dev.tsv", 2, "\t1\t", "\t2\t", "label.*'2'"),
        ("glue/sst2", "train.tsv", 5, "\t1", "\t", "label.*''"),
        ("glue/rte", "train.tsv", 2, "entailment", "Entailment", "label.*'Entailment'"),
        ("glue/wnli", "train.tsv", 2, "\t0", "\t-1", "label.*'-1'"),
        ("glue/mnli", "train.tsv", 2, "entailment", "-", "label.*'-'"),
        ("glue/mrpc", "train.tsv", 3, "1\t", "x\t", "label.*'x'"),
        ("glue/stsb", "train.tsv", 2, "0.0", "5.1", r"\[0, 5\].*'5.1'"),
        ("glue/stsb", "train.tsv", 2, "0.0", "nan", r"\[0, 5\].*'nan'"),
        ("glue/stsb", "dev.tsv", 2, "0.0", "high", r"\[0, 5\].*'high'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, task, name, line, old, new, message):
    folder = raw_glue.make(tmp_path, task)
    if name == "train.tsv" and task == "glue/mrpc" and line == 3:
        # Only the first field, the label.
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("\n1\t", "\nx\t", 1), encoding="utf-8")
    else:
        edited(folder / name, line, old, new)
    where = f"^Line {line} .*'{folder / name}'.*`source`"
    with pytest.raises(ValueError, match=f"{where}.*{message}"):
        check(task, tmp_path)


@pytest.mark.parametrize(("task", "line"), [("glue/rte", 2), ("glue/cola", 1)])
def test_a_file_without_rows(tmp_path, task, line):
    folder = raw_glue.make(tmp_path, task)
    raw_glue.write(folder / "train.tsv", task, [])
    text = (folder / "train.tsv").read_text().strip("\n")
    (folder / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match=f"Line {line} .*train.tsv'.*row"):
        check(task, tmp_path)


def test_an_empty_file_lacks_its_columns(tmp_path):
    folder = raw_glue.make(tmp_path, "glue/rte")
    (folder / "train.tsv").write_text("")
    with pytest.raises(ValueError, match=r"Line 1 .*train.tsv'.*'sentence1'.*\[\]"):
        check("glue/rte", tmp_path)


def test_text_that_is_not_utf8(tmp_path):
    folder = raw_glue.make(tmp_path, "glue/rte")
    (folder / "train.tsv").write_bytes(b"index\tsentence1\tsentence2\tlabel\n0\t\xff\ta\t0\n")
    with pytest.raises(ValueError, match="`source`.*UTF-8.*train.tsv'"):
        check("glue/rte", tmp_path)


def test_an_unlabelled_test_file_may_say_so(tmp_path):
    folder = raw_glue.make(tmp_path, "glue/rte")
    (folder / "test.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t-1\n")
    assert counts("glue/rte", tmp_path)["test"] == 1


@pytest.mark.parametrize("task", ["glue/qqp", "glue/mnli"])
def test_one_broken_row_in_a_thousand_is_official(tmp_path, task):
    folder = raw_glue.make(tmp_path, task)
    path = folder / "train.tsv"
    raw_glue.write(path, task, raw_glue.examples(task, "train", count=1999))
    short = '"\tonly this\t0\n'
    with path.open("a") as file:
        file.write(short * 2)
    assert counts(task, tmp_path)["train"] == 1999
    with path.open("a") as file:
        file.write(short)
    with pytest.raises(ValueError, match="Line 2001 .*train.tsv'.*columns.* 3 "):
        check(task, tmp_path)


def mrpc_original(folder, rows, dev_ids):
    folder.mkdir(parents=True, exist_ok=True)
    header = "\t".join(("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"))
    lines = [header, *("\t".join(row) for row in rows)]
    text = "\n".join(lines) + "\n"
    (folder / "msr_paraphrase_train.txt").write_text(text, encoding="utf-8-sig")
    (folder / "dev_ids.tsv").write_text("\n".join("\t".join(pair) for pair in dev_ids))


MRPC_ROWS = [("1", "10", "20", "a", "b"), ("0", "11", "21", "c", "d"), ("1", "12", "22", "e", "f")]


def test_mrpc_as_microsoft_has_it(tmp_path):
    mrpc_original(tmp_path / "MRPC", MRPC_ROWS, [("11", "21")])
    scratch = tmp_path / "scratch"
    assert counts("glue/mrpc", tmp_path, scratch) == {"train": 2, "validation": 1}
    assert (scratch / "train").read_bytes().startswith(b"\xef\xbb\xbfQuality\t#1 ID")
    assert (scratch / "dev_ids").read_text() == "11\t21\n"


def test_mrpc_dev_id_of_no_pair(tmp_path):
    mrpc_original(tmp_path / "MRPC", MRPC_ROWS, [("11", "21"), ("11", "22")])
    message = r"Line 2 .*dev_ids.tsv'.*'msr_paraphrase_train.txt'.*\['11', '22'\]"
    with pytest.raises(ValueError, match=message):
        check("glue/mrpc", tmp_path)


def test_mrpc_dev_ids_of_all_pairs(tmp_path):
    mrpc_original(tmp_path / "MRPC", MRPC_ROWS, [row[1:3] for row in MRPC_ROWS])
    with pytest.raises(ValueError, match="dev_ids.tsv'.*all pairs"):
        check("glue/mrpc", tmp_path)


def test_mrpc_in_neither_form(tmp_path):
    (tmp_path / "MRPC").mkdir()
    with pytest.raises(ValueError, match="`source`.*'msr_paraphrase_train.txt'.*'dev_ids.tsv'"):
        check("glue/mrpc", tmp_path)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_characters="\t\r\n", codec="utf-8"), max_size=40))
@example(text='"a quote')
def test_any_text_without_tabs_and_line_ends_is_read_back(tmp_path_factory, text):
    """As the copy shows that is made of MRPC's training file."""
    root = tmp_path_factory.mktemp("text")
    rows = [("1", "10", "20", text, "b"), ("0", "11", "21", "c", text)]
    mrpc_original(root / "MRPC", rows, [("11", "21")])
    scratch = root / "scratch"
    assert counts("glue/mrpc", root, scratch) == {"train": 1, "validation": 1}
    before = (root / "MRPC" / "msr_paraphrase_train.txt").read_bytes()
    assert (scratch / "train").read_bytes() == before
