import gzip
import io

import numpy as np
import pytest

from zoo.pretraining.sources import check_apart, described, documents, size, sources


def texts(source, first=0):
    return [text for text, _ in documents(source, first)]


def test_sources(corpus, tmp_path, monkeypatch):
    assert [name.rpartition("/")[2] for name in corpus] == ["a.jsonl.gz", "b.txt", "c.jsonl"]
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
        ("none.txt", None, "`corpus`.*none.txt"),
        ("a.csv", "x", "`corpus`.*a.csv"),
        (
            "a.jsonl",
            '{"text": "ab"}\n{"t": 1}\n',
            "`text`.*a.jsonl, line 2: KeyError",
        ),
        ("a.jsonl", '\n{"text": null}\n', "`text`.*a.jsonl, line 2: TypeError.*None"),
        ("a.jsonl", '{"text": 3}\n', "`text`.*a.jsonl, line 1: TypeError.*3"),
        ("a.jsonl", "[]\n", "a.jsonl, line 1: TypeError"),
        ("a.jsonl", '{"text": "ab"}\n{"te', "a.jsonl, line 2: JSONDecodeError"),
        ("a.txt", b"a\n\xff\n", "UTF-8.*a.txt, line 2: UnicodeDecode"),
        ("a.txt.gz", "not gzip", "a.txt.gz: Not a gzipped"),
        (
            "a.txt.gz",
            gzip.compress(b"a\n" * 999, mtime=0)[:-9],
            "a.txt.gz: C",
        ),
    ],
)
def test_bad_input(tmp_path, name, content, message):
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        for source in sources([tmp_path / name]):
            size(source), texts(source)


def test_no_sources():
    with pytest.raises(ValueError, match=r"`heldout`.*\[\]"):
        sources([], "heldout")


def test_what_is_trained_on_is_not_held_out(corpus, tmp_path):
    check_apart(corpus[:2], corpus[2:])
    (tmp_path / "link.txt").symlink_to(corpus[1])
    with pytest.raises(ValueError, match="`heldout`.*link.txt"):
        check_apart(corpus, sources(tmp_path / "link.txt"))


def test_sources_are_known_by_name_and_size(tmp_path):
    """Wherever the folder is that they are all in."""
    for folder in ("here", "there"):
        for name in ("x/a.txt", "y/a.txt"):
            (tmp_path / folder / name).parent.mkdir(parents=True)
            (tmp_path / folder / name).write_text(name * 2)
        known = described("corpus", sources(tmp_path / folder / "*" / "*"))
        assert known == {"corpus x/a.txt": 14, "corpus y/a.txt": 14}
    assert described("heldout", sources(tmp_path / "here/x/a.txt")) == {"heldout a.txt": 14}
    assert described("heldout", []) == {}
