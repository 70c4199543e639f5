import gzip
import itertools
import json

import numpy as np
import pytest

from zoo.pretraining.objectives import Causal
from zoo.pretraining.text import Blocks, documents, interleaved, sources

END = 1


def tokenizer(text):
    """A token for each letter, from 2."""
    return [ord(letter) - ord("a") + 2 for letter in text]


@pytest.fixture
def corpus(tmp_path):
    """Three sources of 26, 13 and 6 documents, of 9, 9 and 19 letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": letter * 9, "title": "t"}) + "\n" for letter in letters)
    lines = (letter + "x" * 8 + "\n" for letter in letters[:13])
    (tmp_path / "b.txt").write_text("".join(lines))
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"text": letter + "y" * 18}) + "\n" for letter in letters[:6])
    )
    return sources([tmp_path / "*.jsonl*", tmp_path / "b.txt"])


def blocks(corpus, **options):
    options = {"batch_size": 2, "window": 5, "seed": 3, **options}
    return Blocks(corpus, tokenizer, END, Causal(6), **options)


def taken(batches, number):
    """Tokens of so many batches, and the place after the last."""
    rows, place = [], None
    for (x, labels, _), after in itertools.islice(batches, number):
        rows.append(np.concatenate([x["token_ids"], labels[:, -1:]], axis=1).tolist())
        place = after
    return rows, place


def test_sources(corpus, tmp_path):
    assert [name.rpartition("/")[2] for name in corpus] == ["a.jsonl.gz", "b.txt", "c.jsonl"]
    assert sources(["tfds:c4/en"]) == ["tfds:c4/en"]
    assert list(documents(corpus[1], 11)) == ["lxxxxxxxx", "mxxxxxxxx"]
    assert list(documents(corpus[2], 5)) == ["f" + "y" * 18]


def test_sources_end_together(corpus):
    texts = list(interleaved(corpus))
    assert len(texts) == 26 + 13 + 6
    assert sorted(texts) == sorted(text for name in corpus for text in documents(name))
    for half in (texts[:23], texts[23:]):
        assert sum("xx" in text for text in half) > 2 and sum("yy" in text for text in half) > 0


def test_an_epoch_is_the_packed_text(corpus):
    """45 documents of 26*10 + 13*10 + 6*20 = 510 tokens are 72 blocks of 7, and 6 tokens more.

    Windows of 5 blocks make 2 batches of 2 each, one block is left out; the last has 2 blocks.
    """
    packed = [t for text in interleaved(corpus) for t in [*tokenizer(text), END]]
    assert len(packed) == 510
    rows, _ = taken(blocks(corpus).batches(), 14 * 2 + 1)
    found = [tuple(row) for batch in rows for row in batch]
    windows = [
        [tuple(packed[i : i + 7]) for i in range(first, min(first + 35, 504), 7)]
        for first in range(0, 504, 35)
    ]
    assert [len(window) for window in windows] == [5] * 14 + [2]
    for number, window in enumerate(windows[:14]):
        of_window = found[4 * number : 4 * number + 4]
        assert all(window.count(row) >= of_window.count(row) for row in of_window)
    assert sorted(found[56:]) == sorted(windows[14])
    assert found[:20] != [row for window in windows[:5] for row in window[:4]]  # shuffled


def test_goes_on_from_any_place(corpus):
    """Across windows and epochs, of which each has 29 batches."""
    made = blocks(corpus)
    whole, _ = taken(made.batches(), 64)
    for number in (1, 2, 3, 28, 29, 30, 61):
        rows, place = taken(made.batches(), number)
        assert rows == whole[:number]
        place = json.loads(json.dumps(place))
        rest, _ = taken(blocks(corpus).batches(place), 64 - number)
        assert rest == whole[number:], number


def test_a_document_longer_than_windows(tmp_path):
    """One of 200 tokens, more than 5 windows of 35; the second one begins where it ends."""
    (tmp_path / "long.txt").write_text("a" * 199 + "\n" + "b" * 30 + "\n")
    made = blocks([str(tmp_path / "long.txt")])
    whole, _ = taken(made.batches(), 12)
    for number in range(1, 12):
        _, place = taken(made.batches(), number)
        assert taken(made.batches(place), 12 - number)[0] == whole[number:]


def test_epochs_and_seeds_have_orders_of_their_own(corpus):
    whole, _ = taken(blocks(corpus).batches(), 58)
    assert whole[:29] != whole[29:]
    assert taken(blocks(corpus, seed=4).batches(), 29)[0] != whole[:29]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "`corpus` must name files that are there. Received: .*none.txt"),
        ("a.csv", "x", "`corpus` must name files that end in .jsonl, .jsonl.gz, .txt, .txt.gz"),
        (
            "a.jsonl",
            '{"text": "ab"}\n{"t": 1}\n',
            "must be readable text. Received: .*, line 2: 'text'",
        ),
        ("a.txt.gz", "not gzip", "must be readable text. Received: .*a.txt.gz, line 1: Not a gzi"),
        ("a.txt", "ab\n", "`corpus` must hold 2 blocks of 7 tokens or more. Received: .*a.txt"),
    ],
)
def test_bad_input(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        next(blocks(sources([tmp_path / name])).batches())


def test_bad_arguments(corpus):
    with pytest.raises(ValueError, match="`corpus` must name one file or more"):
        sources([])
    with pytest.raises(ValueError, match="`window` must be at least the batch size, 6"):
        blocks(corpus, batch_size=6)
