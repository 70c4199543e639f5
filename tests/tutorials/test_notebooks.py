import json

import pytest

from tests.tutorials.test_tutorials import NAMES, SCRIPTS
from tutorials.__main__ import FOLDER
from tutorials.notebooks import cells, notebook

SCRIPT = """\
# %% [markdown]
# # Title
#
#     a command

# %%
import os

x = 1  # %% no mark

# %%
print("é")
"""


def test_cells():
    assert cells(SCRIPT) == [
        ("markdown", "# Title\n\n    a command"),
        ("code", "import os\n\nx = 1  # %% no mark"),
        ("code", 'print("é")'),
    ]


def test_notebook():
    assert json.loads(notebook(SCRIPT)) == {
        "cells": [
            {
                "cell_type": "markdown",
                "id": "cell-1",
                "metadata": {},
                "source": ["# Title\n", "\n", "    a command"],
            },
            {
                "cell_type": "code",
                "execution_count": None,
                "id": "cell-2",
                "metadata": {},
                "outputs": [],
                "source": ["import os\n", "\n", "x = 1  # %% no mark"],
            },
            {
                "cell_type": "code",
                "execution_count": None,
                "id": "cell-3",
                "metadata": {},
                "outputs": [],
                "source": ['print("é")'],
            },
        ],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    assert "é" in notebook(SCRIPT)


@pytest.mark.parametrize(
    "script, message",
    [
        ("import os\n", r"'# %%'.*'import os\\n'"),
        ("import os\n# %%\nimport sys\n", r"'# %%'.*'import os\\n'"),
        ("# %%\nimport os\n# %%\n\n", "empty cell.* 1 "),
        ("# %% [markdown]\n# text\nx = 1\n", "'# '.*'x = 1'"),
        ("# %% [markdown]\n# text\n#text\n", "'# '.*'#text'"),
    ],
)
def test_what_is_no_script_of_cells(script, message):
    with pytest.raises(ValueError, match=message):
        cells(script)


def test_there_is_a_notebook_for_every_script_and_no_other():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
class TestNotebook:
    def test_is_what_its_script_gives(self, path):
        """If it is not: `python -m tutorials`."""
        assert path.with_suffix(".ipynb").read_text() == notebook(path.read_text())

    def test_is_valid(self, path):
        """By the schema of the format, where the package that has it is installed."""
        nbformat = pytest.importorskip("nbformat")
        nbformat.validate(json.loads(path.with_suffix(".ipynb").read_text()))
