import gzip
import json

import pytest

from zoo.pretraining.sources import sources

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def corpus(tmp_path):
    """Three sources of 26, 13 and 6 documents, of 9, 9 and 19 letters."""
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": letter * 9, "title": "t"}) + "\n" for letter in LETTERS)
    lines = (letter + "x" * 8 + "\n" for letter in LETTERS[:13])
    (tmp_path / "b.txt").write_text("".join(lines))
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"text": letter + "y" * 18}) + "\n" for letter in LETTERS[:6])
    )
    return sources([tmp_path / "*.jsonl*", tmp_path / "b.txt"])
