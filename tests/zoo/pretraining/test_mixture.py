import gzip
import json
import resource

import numpy as np
import pytest

from zoo.pretraining.mixture import READERS, mixture, start
from zoo.pretraining.sources import documents, size, sources


def mixed(names, read=None):
    return list(mixture(names, {name: size(name) for name in names}, read))


def test_sources_end_together(corpus):
    found = [text for _, text in mixed(corpus)]
    assert sorted(found) == sorted(text for name in corpus for text, _ in documents(name))
    assert len(found) == 26 + 13 + 6
    for half in (found[:23], found[23:]):
        assert sum("x" in text[1:] for text in half) > 5
        assert sum("y" in text[1:] for text in half) > 2


def test_gzipped_text_ends_with_plain_text(tmp_path):
    """Of the last tenth of all documents, either source has its part, 1 in 5 and 4 in 5."""
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("etaoin "), 400)) + "\n" for _ in range(5000)]
    (tmp_path / "plain.txt").write_text("".join("p" + line for line in lines[:1000]))
    with gzip.open(tmp_path / "packed.txt.gz", "wt") as file:
        file.write("".join("g" + line for line in lines[1000:]))
    found = [text[0] for _, text in mixed(sources([tmp_path / "p*"]))]
    assert sum(kind == "p" for kind in found[-500:]) == pytest.approx(100, abs=10)
    assert sum(kind == "p" for kind in found[:500]) == pytest.approx(100, abs=10)


def test_goes_on_from_any_document(corpus, monkeypatch):
    for readers in (READERS, 2):  # of 2 one has two sources
        monkeypatch.setattr("zoo.pretraining.mixture.READERS", readers)
        assert len(start(corpus)) == min(3, readers)
        found = mixed(corpus)
        for number, (read, _) in enumerate(found):
            assert mixed(corpus, json.loads(json.dumps(read))) == found[number:]


def test_a_bounded_number_of_files_is_open(tmp_path):
    for number in range(100):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n" * 3)
    names = sources(tmp_path / "*.txt")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(tmp_path / "0.txt") as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 50, hard))
    try:
        found = mixed(names)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(found) == 300 and len(found[0][0]) == 32
