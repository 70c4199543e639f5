"""The official raw GLUE files, read as strictly as TensorFlow Datasets reads them loosely.

TFDS parses with no quoting and takes what it gets: a missing label column becomes -1, a short
row disappears. Here each file is checked first, with the same parser, so that what is prepared
is what the files say.
"""

import csv
import itertools
from pathlib import Path
from typing import NamedTuple

# The official files of these two come from scraped text whose stray line ends and tabs break a
# few rows in ten thousand (https://github.com/nyu-mll/GLUE-baselines/issues/5). TFDS leaves the
# short ones out; one row in a thousand is where a file stops being official.
_RAGGED = ("qqp", "mnli")
_TOLERANCE = 1000

TRAINING_FILES = ("train.tsv", "msr_paraphrase_train.txt")

_COLA_COLUMNS = ("source", "label", "mark", "sentence")
_MRPC_COLUMNS = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")


def check(config, folder, scratch):
    """Checks the raw files of one task.

    Args:
        config: The TFDS `GlueConfig`, which names the columns, classes and the sub-folder.
        folder: The folder that holds `CoLA/`, `SST-2/` and so on.
        scratch: An existing empty folder, for MRPC in the form that TFDS reads.

    Returns:
        A dict from split to its number of rows. Test splits without a file are left out.

    Raises:
        ValueError: If anything is not as in the official files; the sentence names the file,
            the line and what was expected there.
    """
    folder = Path(folder) / config.data_dir
    if not folder.is_dir():
        raise ValueError(
            f"`source` must hold the folder {config.data_dir!r} of the official GLUE files. "
            f"Received: source={str(folder.parent)!r}"
        )
    if config.name == "mrpc":
        return _check_mrpc(folder, Path(scratch))
    parts = ("_matched", "_mismatched") if config.name == "mnli" else ("",)
    counts = {"train": _count(config, folder / "train.tsv", labelled=True)}
    for split, stem in (("validation", "dev"), ("test", "test")):
        for part in parts:
            path = folder / f"{stem}{part}.tsv"
            if split == "validation" or path.exists():
                counts[split + part] = _count(config, path, labelled=split != "test")
    return counts


class _Row(NamedTuple):
    line: int
    values: list[str]


def _rows(path):
    """Yields the rows as TFDS parses them; a byte order mark is not part of the text."""
    if not path.is_file():
        raise ValueError(
            f"`source` must hold the file {path.name!r} of the official GLUE files. "
            f"Received: a folder {str(path.parent)!r} without it"
        )
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


def _wrong(path, line, expected, received):
    return ValueError(
        f"Line {line} of {str(path)!r} in `source` must have {expected}. Received: {received}"
    )


def _table(path, columns, header=True, ragged=False):
    """Returns the names of the columns and the rows, all of the right width.

    Where the file may be ragged a few rows can have another width; the short ones, which TFDS
    skips, are left out.
    """
    rows = _rows(path)
    names = next(rows, _Row(1, [])).values if header else list(columns)
    missing = [name for name in columns if name not in names]
    if missing:
        raise _wrong(path, 1, f"the column {missing[0]!r}", f"columns {names}")
    rows = list(rows)
    if not rows:
        raise _wrong(path, 1 + header, "a row of data", "the end of the file")
    broken = [row for row in rows if len(row.values) != len(names)]
    if broken and not (ragged and len(broken) * _TOLERANCE <= len(rows)):
        line, values = broken[0]
        raise _wrong(path, line, f"{len(names)} tab-separated columns", f"{len(values)} columns")
    return names, [row for row in rows if len(row.values) >= len(names)]


def _count(config, path, labelled):
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
    return len(rows)


def _check_labels(path, rows, column, classes, labelled):
    """Allows a class by name or number, or a score; a test file may say -1 for none."""
    expected = f"a label of {[*classes, *range(len(classes))]}" if classes else "a score in [0, 5]"
    allowed = {*(classes or ()), *map(str, range(len(classes or ())))}
    for line, values in rows:
        value = values[column]
        valid = value in allowed if classes else _is_score(value)
        if not valid and not (value == "-1" and not labelled):
            raise _wrong(path, line, expected, repr(value))


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
    if (folder / "msr_paraphrase_train.txt").exists() and (folder / "dev_ids.tsv").exists():
        rows, dev_ids = _mrpc_original(folder)
    elif (folder / "train.tsv").exists() and (folder / "dev.tsv").exists():
        train, dev = (_mrpc_pairs(folder / name) for name in ("train.tsv", "dev.tsv"))
        # Ids of our own: an original one might stand in both files.
        rows = [(row[0], str(n), str(n), *row[3:]) for n, row in enumerate(train + dev)]
        dev_ids = [row[1:3] for row in rows[len(train) :]]
    else:
        raise ValueError(
            "`source` must hold MRPC as 'msr_paraphrase_train.txt' and 'dev_ids.tsv', or as "
            f"'train.tsv' and 'dev.tsv'. Received: a folder {str(folder)!r} without them"
        )
    # The builder skips three bytes of the training file, which must be a byte order mark.
    _write(scratch / "train", [_MRPC_COLUMNS, *rows], encoding="utf-8-sig")
    _write(scratch / "dev_ids", dev_ids)
    counts = {"train": len(rows) - len(dev_ids), "validation": len(dev_ids)}
    for name in ("msr_paraphrase_test.txt", "test.tsv"):
        if (folder / name).exists():
            test = _mrpc_pairs(folder / name, labelled=False)
            _write(scratch / "test", [_MRPC_COLUMNS, *test])
            return counts | {"test": len(test)}
    return counts


def _mrpc_original(folder):
    path = folder / "dev_ids.tsv"
    _, dev_ids = _table(path, ("#1 ID", "#2 ID"), header=False)
    rows = _mrpc_pairs(folder / "msr_paraphrase_train.txt")
    known = {row[1:3] for row in rows}
    for line, pair in dev_ids:
        if tuple(pair) not in known:
            expected = "the two ids of a pair in 'msr_paraphrase_train.txt'"
            raise _wrong(path, line, expected, pair)
    chosen = {tuple(pair) for _, pair in dev_ids}
    if all(row[1:3] in chosen for row in rows):
        raise _wrong(path, 1, "pairs that leave some for training", "all pairs")
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
