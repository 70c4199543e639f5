"""Scripts as notebooks: cells that begin with `# %%`, in nbformat 4.5.

A line `# %% [markdown]` begins a cell of text, each line of which is a comment, and `# %%` a cell
of code. Nothing stands before the first cell. Notebooks have no outputs: what they come to is told
in the text, and the pictures are files in `figures/`.
"""

import json
import re

MARK = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


def cells(script):
    """The cells of a script.

    Args:
        script: the text of the script.

    Returns:
        List of tuples `(kind, text)`, "markdown" or "code", and the text without blank ends.

    Raises:
        ValueError: if something stands before the first cell, a cell is empty, or a line of a cell
            of text is no comment.
    """
    before, *rest = MARK.split(script)
    if before or not rest:
        raise ValueError(f"A script must begin with a cell, '# %%'. Received: {before[:60]!r}")
    result = []
    for mark, text in zip(rest[::2], rest[1::2], strict=True):
        kind, text = ("markdown" if mark else "code"), text.strip("\n")
        if not text:
            raise ValueError(f"An empty cell, after {len(result)} others, must have text or code.")
        if kind == "markdown":
            text = "\n".join(map(_uncommented, text.split("\n")))
        result.append((kind, text))
    return result


def _uncommented(line):
    if line != "#" and not line.startswith("# "):
        raise ValueError(f"A line of text must begin with '# '. Received: {line!r}")
    return line[2:]


def notebook(script):
    """The notebook of a script, as the text of its file.

    Args:
        script: the text of the script.

    Returns:
        JSON; the same script gives the same text.

    Raises:
        ValueError: see `cells`.
    """
    document = {
        "cells": [_cell(number, *cell) for number, cell in enumerate(cells(script), 1)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _cell(number, kind, text):
    cell = {
        "cell_type": kind,
        "id": f"cell-{number}",
        "metadata": {},
        "source": text.splitlines(keepends=True),
    }
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})
