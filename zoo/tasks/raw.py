"""The official raw GLUE files, read as strictly as TensorFlow Datasets reads them loosely.

TFDS parses with no quoting and takes what it gets: a missing label column becomes -1, a short
row disappears. Here each file is checked first, with the same parser, so that what is prepared
is what the files say.
"""

import csv
import itertools
from pathlib import Path
from typing import NamedTuple

from zoo.tasks import raw_files
from zoo.tasks.raw_files import RawFile, wrong

# The official files of these two come from scraped text whose stray line ends and tabs break a
# few rows in ten thousand (https://github.com/nyu-mll/GLUE-baselines/issues/5). TFDS leaves the
# short ones out; one row in a thousand is where a file stops being official.
_RAGGED = ("qqp", "mnli")
_TOLERANCE = 1000

_HELD_OUT = {"validation": "dev", "test": "test"}

_MICROSOFT = "msr_paraphrase_train.txt"
OTHER_NAMES = {"mrpc": (_MICROSOFT,)}

_COLA_COLUMNS = ("source", "label", "mark", "sentence")
_MRPC_COLUMNS = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")


def names(config):
    """The official names of the files of a task.

    Args:
        config: The TFDS `GlueConfig`.

    Returns:
        A dict from split to the name of its file. MRPC's have other names in Microsoft's form.
    """
    parts = ("_matched", "_mismatched") if config.name == "mnli" else ("",)
    stems = {split + part: stem + part for split, stem in _HELD_OUT.items() for part in parts}
    return {split: f"{stem}.tsv" for split, stem in {"train": "train", **stems}.items()}


def check(config, source, scratch, partial=False):
    """Checks the raw files of one task.

    Args:
        config: The TFDS `GlueConfig`, which names the columns, classes and the sub-folder.
        source: The folder that holds `CoLA/`, `SST-2/` and so on.
        scratch: An existing empty folder, for MRPC in the form that TFDS reads.
        partial: Whether files of the sub-folder `partial/`, with the same columns and perhaps
            others, stand in for official ones that are not there.

    Returns:
        A dict from split to its `RawFile`. Training and test splits without a file are left out.

    Raises:
        ValueError: If anything is not as in the official files; the sentence names the file,
            the line and what was expected there.
    """
    folder = raw_files.folder_of(source, config.data_dir, "GLUE")
    if config.name == "mrpc":
        return _check_mrpc(folder, Path(scratch))
    return raw_files.check(
        folder, names(config), partial, "GLUE", lambda *file: _read(config, *file)
    )


class _Row(NamedTuple):
    line: int
    values: list[str]


def _rows(path):
    """Yields the rows as TFDS parses them; a byte order mark is not part of the text."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            for values in reader:
                yield _Row(reader.line_num, values)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"`source` must hold UTF-8 text of tab-separated columns. Received: {str(path)!r}, "
            f"where {error}"
        ) from error


def _table(path, columns, header=True, ragged=False):
    """Returns the names of the columns and the rows, all of the right width.

    Where the file may be ragged a few rows can have another width; the short ones, which TFDS
    skips, are left out.
    """
    rows = _rows(path)
    names = next(rows, _Row(1, [])).values if header else list(columns)
    missing = [name for name in columns if name not in names]
    if missing:
        raise wrong(path, 1, f"the column {missing[0]!r}", f"columns {names}")
    rows = list(rows)
    if not rows:
        raise wrong(path, 1 + header, "a row of data", "the end of the file")
    broken = [row for row in rows if len(row.values) != len(names)]
    if broken and not (ragged and len(broken) * _TOLERANCE <= len(rows)):
        line, values = broken[0]
        raise wrong(path, line, f"{len(names)} tab-separated columns", f"{len(values)} columns")
    return names, [row for row in rows if len(row.values) >= len(names)]


def _read(config, path, labelled):
    """Checks one file of a task other than MRPC."""
    if config.name == "cola" and labelled:
        names, rows = _table(path, _COLA_COLUMNS, header=False)
        label = "label"
    else:
        label = config.label_column
        columns = [*config.text_features.values(), *([label] if labelled else [])]
        names, rows = _table(path, columns, ragged=config.name in _RAGGED)
    if label in names:
        _check_labels(path, rows, names.index(label), config.label_classes, labelled)
    return RawFile(path, len(rows))


def _check_labels(path, rows, column, classes, labelled):
    """Allows a class by name or number, or a score; a test file may say -1 for none."""
    expected = f"a label of {[*classes, *range(len(classes))]}" if classes else "a score in [0, 5]"
    allowed = {*(classes or ()), *map(str, range(len(classes or ())))}
    for line, values in rows:
        value = values[column]
        valid = value in allowed if classes else _is_score(value)
        if not valid and not (value == "-1" and not labelled):
            raise wrong(path, line, expected, repr(value))


def _is_score(text):
    try:
        return 0 <= float(text) <= 5
    except ValueError:
        return False


def _check_mrpc(folder, scratch):
    """Checks MRPC in either form and writes it to `scratch` in Microsoft's.

    That form is one training file and a list of the pairs that are for validation. The other,
    which the GLUE download script writes, has been split into train.tsv and dev.tsv.
    """
    if (folder / _MICROSOFT).exists() and (folder / "dev_ids.tsv").exists():
        path = folder / _MICROSOFT
        rows, dev_ids = _mrpc_original(folder)
    elif (folder / "dev.tsv").exists():
        path = folder / "dev.tsv"
        dev = _mrpc_pairs(path)
        train = _mrpc_pairs(folder / "train.tsv") if (folder / "train.tsv").exists() else []
        # Ids of our own: an original one might stand in both files.
        rows = [(row[0], str(n), str(n), *row[3:]) for n, row in enumerate(train + dev)]
        dev_ids = [row[1:3] for row in rows[len(train) :]]
    else:
        raise ValueError(
            f"`source` must hold MRPC as {_MICROSOFT!r} and 'dev_ids.tsv', or as "
            f"'train.tsv' and 'dev.tsv'. Received: a folder {str(folder)!r} without them"
        )
    # The builder skips three bytes of the training file, which must be a byte order mark.
    _write(scratch / "train", [_MRPC_COLUMNS, *rows], encoding="utf-8-sig")
    _write(scratch / "dev_ids", dev_ids)
    found = {"train": RawFile(path, len(rows) - len(dev_ids))} if len(rows) > len(dev_ids) else {}
    found["validation"] = RawFile(path, len(dev_ids))
    for name in ("msr_paraphrase_test.txt", "test.tsv"):
        if (folder / name).exists():
            test = _mrpc_pairs(folder / name, labelled=False)
            _write(scratch / "test", [_MRPC_COLUMNS, *test])
            return found | {"test": RawFile(folder / name, len(test))}
    return found


def _mrpc_original(folder):
    path = folder / "dev_ids.tsv"
    _, dev_ids = _table(path, ("#1 ID", "#2 ID"), header=False)
    rows = _mrpc_pairs(folder / _MICROSOFT)
    known = {row[1:3] for row in rows}
    for line, pair in dev_ids:
        if tuple(pair) not in known:
            expected = f"the two ids of a pair in {_MICROSOFT!r}"
            raise wrong(path, line, expected, pair)
    chosen = {tuple(pair) for _, pair in dev_ids}
    if all(row[1:3] in chosen for row in rows):
        raise wrong(path, 1, "pairs that leave some for training", "all pairs")
    return rows, [row[1:3] for row in rows if row[1:3] in chosen]


def _mrpc_pairs(path, labelled=True):
    """Reads a file of pairs; returns `(Quality, #1 ID, #2 ID, #1 String, #2 String)` rows."""
    columns = _MRPC_COLUMNS if labelled else _MRPC_COLUMNS[3:]
    names, rows = _table(path, columns)
    if labelled:
        _check_labels(path, rows, names.index("Quality"), ("0", "1"), labelled)
    places = [names.index(name) if name in columns else None for name in _MRPC_COLUMNS]
    return [tuple("0" if i is None else row.values[i] for i in places) for row in rows]


def _write(path, rows, encoding="utf-8"):
    with path.open("w", encoding=encoding) as file:
        file.writelines(itertools.chain.from_iterable(("\t".join(row), "\n") for row in rows))
