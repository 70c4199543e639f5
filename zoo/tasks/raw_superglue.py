"""The official raw SuperGLUE files: JSON, one object a line, checked before TFDS reads them.

Where TFDS would stop with a KeyError or an AssertionError, or take a label for what it is not, the
sentence here names the file, the line and what was expected there.
"""

import json
from pathlib import Path

from zoo.extras import require
from zoo.files import parse_json
from zoo.tasks import raw_files
from zoo.tasks.forms import PLACEHOLDER
from zoo.tasks.raw_files import RawFile, wrong

FILES = {"train": "train.jsonl", "validation": "val.jsonl", "test": "test.jsonl"}

_LARGEST = 2**31 - 1  # of the int32 that TFDS keeps


def folder_name(config):
    """The name of the folder of a task, as in its zip file: that of BoolQ.zip is BoolQ."""
    return config.data_url.rpartition("/")[2].removesuffix(".zip")


def check(config, source, scratch, partial=False):
    """Checks the raw files of one task.

    A line that is there twice, word for word, is harmless, but TFDS would refuse the file: it is
    left out, and counted.

    Args:
        config: The TFDS `SuperGlueConfig`.
        source: The folder that holds `BoolQ/`, `CB/` and so on.
        scratch: An existing empty folder, for copies without repeated lines.
        partial: Whether files of the sub-folder `partial/` stand in for official ones that are
            not there.

    Returns:
        A dict from split to its `RawFile`. Training and test splits without a file are left out.

    Raises:
        ValueError: If anything is not as in the official files; the sentence names the file,
            the line and what was expected there.
    """
    folder = raw_files.folder_of(source, folder_name(config), "SuperGLUE")
    return raw_files.check(
        folder, FILES, partial, "SuperGLUE", lambda *file: _read(config, Path(scratch), *file)
    )


class _Wrong(Exception):
    """What a line must have, and what it has."""


def _read(config, scratch, path, labelled):
    """Checks one file."""
    keys, repeated = set(), set()
    seen = set()  # of lines, as numbers: the largest file has hundreds of megabytes
    examples = _EXAMPLES.get(config.name, _one_example)
    for number, line in _lines(path):
        try:
            new = examples(_object(line), config, labelled)
            if not keys.isdisjoint(new):
                _require(hash(line) in seen, "an `idx` of its own", f"{new[0]} again")
                repeated.add(number)
        except _Wrong as error:
            raise wrong(path, number, *error.args) from None
        keys.update(new)
        seen.add(hash(line))
    if not keys:
        raise wrong(path, 1, "a JSON object", "the end of the file")
    if repeated:
        lines = (line for number, line in _lines(path) if number not in repeated)
        path = scratch / path.name
        with path.open("w", encoding="utf-8") as file:
            file.writelines(lines)
    return RawFile(path, len(keys), repeated=len(repeated))


def _lines(path):
    """Yields the numbers of lines and the lines, as TFDS divides the file."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from enumerate(file, 1)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`source` must hold UTF-8 text. Received: {str(path)!r}, where {error}"
        ) from error


def _require(condition, expected, received):
    if not condition:
        raise _Wrong(expected, received)


def _object(line):
    try:
        row = parse_json(line)
    except ValueError:
        row = None
    _require(isinstance(row, dict), "a JSON object", repr(line[:40]))
    return row


def _get(row, name, kind, where=""):
    """A value of a kind: `str`, `int`, `list` or `dict`."""
    value = row.get(name) if isinstance(row, dict) else None
    right = isinstance(value, kind) and not isinstance(value, bool)
    kinds = {str: "a text", int: "a number", list: "a list that is not empty", dict: "an object"}
    _require(
        right and not (kind is list and not value), f"{kinds[kind]} {name!r}{where}", _short(value)
    )
    if kind is str:
        _require(_encodes(value), f"a text {name!r}{where} of whole characters", _short(value))
    return value


def _encodes(text):
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:  # Half a surrogate pair, which JSON can spell.
        return False


def _idx(row, where=""):
    value = _get(row, "idx", int, where)
    _require(0 <= value <= _LARGEST, f"an 'idx'{where} from 0 to {_LARGEST}", value)
    return value


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _label(row, classes, labelled, where=""):
    """The label, which must be there where the file is labelled, is one of the classes."""
    if not labelled and row.get("label") is None:
        return
    value = row.get("label")
    fits = any(type(value) is type(known) and value == known for known in classes)
    _require(fits, f"a label{where} of {json.dumps(classes)}", _short(value))


def _one_example(row, config, labelled):
    """A line that is one example; returns its key."""
    name = config.name.partition(".")[0]
    source = _get(row, "target", dict) if name == "wsc" else row
    for feature in config.features:
        number = feature.startswith(("start", "end")) or feature.endswith("_index")
        place = row if feature == "text" else source
        _get(place, feature, int if number else str)
    classes = {"copa": [0, 1], "cb": config.label_classes, "rte": config.label_classes}
    _label(row, classes.get(name, [False, True]), labelled)
    if name in _MORE:
        _MORE[name](row)
    return [_idx(row)]


def _copa(row):
    _require(
        row["question"] in ("cause", "effect"),
        "the question 'cause' or 'effect'",
        repr(row["question"]),
    )


def _wic(row):
    for n in (1, 2):
        start, end = row[f"start{n}"], row[f"end{n}"]
        _require(
            0 <= start < end <= len(row[f"sentence{n}"]),
            f"'start{n}' and 'end{n}' within 'sentence{n}'",
            f"{start} and {end}",
        )


def _wsc(row):
    """The spans must stand in the text once TFDS has corrected them."""
    words = len(row["text"].split())
    for n in (1, 2):
        index = row["target"][f"span{n}_index"]
        _require(0 <= index < words, f"'span{n}_index' below its {words} words", index)
        _require(row["target"][f"span{n}_text"].strip(), f"a 'span{n}_text'", "an empty one")
    fix = require("tensorflow_datasets.text.super_glue")._fix_wst
    try:
        fix({"text": row["text"], **row["target"]})
    except (AssertionError, IndexError):
        spans = [row["target"][f"span{n}_text"] for n in (1, 2)]
        raise _Wrong("spans that stand in the text", spans) from None


_MORE = {"copa": _copa, "wic": _wic, "wsc": _wsc}


def _multirc(row, config, labelled):
    """A line that is a paragraph with questions with answers."""
    passage, keys = _get(row, "passage", dict), []
    _get(passage, "text", str)
    for question in _get(passage, "questions", list):
        _get(question, "question", str)
        where = f" of question {_idx(question, ' of each question')}"
        for answer in _get(question, "answers", list, where):
            _get(answer, "text", str, f" of each answer{where}")
            _label(answer, [0, 1], labelled, where)
            keys.append((_idx(row), question["idx"], _idx(answer, f" of each answer{where}")))
    _require(len(set(keys)) == len(keys), "an `idx` of its own for each answer", "one twice")
    return keys


def _record(row, config, labelled):
    """A line that is a passage with entities and queries."""
    passage, keys = _get(row, "passage", dict), []
    _idx(row)
    text = _get(passage, "text", str)
    for entity in _get(passage, "entities", list):
        start, end = (_get(entity, name, int, " of each entity") for name in ("start", "end"))
        _require(0 <= start <= end < len(text), "entities within the text", f"{start} to {end}")
    for query in _get(row, "qas", list):
        keys.append(_idx(query, " of each query"))
        where = f" of query {keys[-1]}"
        asked = _get(query, "query", str, where)
        _require(PLACEHOLDER in asked, f"{PLACEHOLDER!r} in the text{where}", _short(asked))
        if labelled:
            for answer in _get(query, "answers", list, where):
                _get(answer, "text", str, f" of each answer{where}")
    _require(len(set(keys)) == len(keys), "an `idx` of its own for each query", "one twice")
    return keys


_EXAMPLES = {"multirc": _multirc, "record": _record}
