import gzip
import io
import json
import resource

import numpy as np
import pytest

from zoo.pretraining.sources import READERS, documents, mixture, size, sources, start


def texts(source, first=0):
    return [text for text, _ in documents(source, first)]


def mixed(names, read=None):
    return list(mixture(names, {name: size(name) for name in names}, read))


def test_sources(corpus, tmp_path, monkeypatch):
    assert [name.rpartition("/")[2] for name in corpus] == ["a.jsonl.gz", "b.txt", "c.jsonl"]
    assert sources(["tfds:c4/en", tmp_path / "b.txt"]) == [corpus[1], "tfds:c4/en"]
    assert sources(str(tmp_path / "b.txt")) == sources(tmp_path / "b.txt") == [corpus[1]]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").symlink_to(tmp_path / "b.txt")
    assert sources(["b.txt", "./b.txt", "other.txt"]) == [corpus[1]]
    (tmp_path / "b[1].txt").write_text("c\n")
    assert sources(["b[1].txt"]) == [str(tmp_path / "b[1].txt")]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "b.txt", "c.jsonl"])
def test_documents_go_on_from_any_place(corpus, tmp_path, name):
    found = list(documents(str(tmp_path / name)))
    for number, (_, place) in enumerate(found):
        assert list(documents(str(tmp_path / name), place)) == found[number + 1 :]


def test_forms(tmp_path):
    """By the end of a name, not by what is in the folder's; letters of any kind; empty lines."""
    folder = tmp_path / "x.jsonl"
    folder.mkdir()
    (folder / "a.txt").write_bytes("é\u2028b\n\n  \r\nc d\r\nlast".encode())
    assert texts(str(folder / "a.txt")) == ["é\u2028b", "c d", "last"]
    for name in ("a.json", "a.jsonl"):
        lines = ['{"text": "\\ud800x\\n"}', "", '{"text": " "}', '{"text": "b"}']
        (folder / name).write_text("\n".join(lines))
        assert texts(str(folder / name)) == ["?x\n", "b"]
    with gzip.open(folder / "a.json.gz", "wt") as file:
        file.write('{"text": "b"}\n')
    assert texts(str(folder / "a.json.gz")) == ["b"]


class TestMixture:
    def test_sources_end_together(self, corpus):
        found = [text for _, text in mixed(corpus)]
        assert sorted(found) == sorted(text for name in corpus for text in texts(name))
        assert len(found) == 26 + 13 + 6
        for half in (found[:23], found[23:]):
            assert sum("x" in text[1:] for text in half) > 5
            assert sum("y" in text[1:] for text in half) > 2

    def test_gzipped_text_ends_with_plain_text(self, tmp_path):
        """Of the last tenth of all documents, either source has its part, 1 in 5 and 4 in 5."""
        rng = np.random.default_rng(0)
        lines = ["".join(rng.choice(list("etaoin "), 400)) + "\n" for _ in range(5000)]
        (tmp_path / "plain.txt").write_text("".join("p" + line for line in lines[:1000]))
        with gzip.open(tmp_path / "packed.txt.gz", "wt") as file:
            file.write("".join("g" + line for line in lines[1000:]))
        found = [text[0] for _, text in mixed(sources([tmp_path / "p*"]))]
        assert sum(kind == "p" for kind in found[-500:]) == pytest.approx(100, abs=10)
        assert sum(kind == "p" for kind in found[:500]) == pytest.approx(100, abs=10)

    def test_goes_on_from_any_document(self, corpus, monkeypatch):
        for readers in (READERS, 2):  # of 2 one has two sources
            monkeypatch.setattr("zoo.pretraining.sources.READERS", readers)
            assert len(start(corpus)) == min(3, readers)
            found = mixed(corpus)
            for number, (read, _) in enumerate(found):
                assert mixed(corpus, json.loads(json.dumps(read))) == found[number:]

    def test_a_bounded_number_of_files_is_open(self, tmp_path):
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


def test_the_size_of_gzipped_text_is_told_by_its_head(tmp_path):
    for copies in (1, 40):  # 40 of 100 kB are more than the head
        part = np.random.default_rng(0).integers(0, 16, 100_000, "uint8") + 65
        packed = io.BytesIO()
        with gzip.open(packed, "wb") as file:
            file.write(part.tobytes())
        (tmp_path / "a.txt.gz").write_bytes(packed.getvalue() * copies)
        assert size(str(tmp_path / "a.txt.gz"))[0] == pytest.approx(100_000 * copies, rel=0.02)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "`corpus` must name files that are there. Received: .*none.txt"),
        ("a.csv", "x", "`corpus` must name files that end in .txt, .txt.gz, .jsonl, .jsonl.gz, "),
        (
            "a.jsonl",
            '{"text": "ab"}\n{"t": 1}\n',
            "an object with a string `text`. Received: .*, line 2: KeyError: 'text'",
        ),
        ("a.jsonl", '\n{"text": null}\n', "line 2: TypeError: `text` is None"),
        ("a.jsonl", '{"text": 3}\n', "line 1: TypeError: `text` is 3"),
        ("a.jsonl", "[]\n", "line 1: TypeError"),
        ("a.jsonl", '{"text": "ab"}\n{"te', "line 2: JSONDecodeError"),
        ("a.txt", b"a\n\xff\n", "Each line must be UTF-8. Received: .*, line 2: UnicodeDecode"),
        ("a.txt.gz", "not gzip", "A text must be readable. Received: .*a.txt.gz: Not a gzipped"),
        ("a.txt.gz", gzip.compress(b"a\n" * 999)[:-9], "A text must be readable. Received: .*: C"),
    ],
)
def test_bad_input(tmp_path, name, content, message):
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        mixed(sources([tmp_path / name]))


def test_no_sources():
    with pytest.raises(ValueError, match="`heldout` must name one file or more"):
        sources([], "heldout")
