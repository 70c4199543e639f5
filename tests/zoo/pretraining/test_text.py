import itertools
import json

import numpy as np
import pytest

from zoo.pretraining.mixture import mixture
from zoo.pretraining.objectives import Causal
from zoo.pretraining.sources import documents, size, sources
from zoo.pretraining.text import Blocks

END = 1


def tokenizer(texts):
    """A token for each letter, from 2."""
    return [[ord(letter) - ord("a") + 2 for letter in text] for text in texts]


def blocks(corpus, **options):
    options = {"batch_size": 2, "window": 4, "seed": 3, **options}
    return Blocks(corpus, tokenizer, END, Causal(6), **options)


def taken(batches, number):
    """Tokens of so many batches, and the place after the last."""
    rows, place = [], None
    for (x, labels, _), after in itertools.islice(batches, number):
        rows.append(np.concatenate([x["token_ids"], labels[:, -1:]], axis=1).tolist())
        place = after
    return rows, place


def packed(names):
    """The text in the order of one epoch, one token after another."""
    texts = [text for _, text in mixture(names, {name: size(name) for name in names})]
    return [token for tokens in tokenizer(texts) for token in [*tokens, END]]


def test_an_epoch_is_the_packed_text(corpus):
    """45 documents of 26*10 + 13*10 + 6*20 = 510 tokens are 72 blocks of 7, and 6 tokens more.

    They are 18 windows of 2 batches; the order of the sources, which matters where two have read
    the same share, is an epoch's own.
    """
    rows, place = taken(blocks(corpus).batches(), 36)
    assert (place["epoch"], place["window"], place["batch"]) == (0, 17, 2)
    found = [tuple(row) for batch in rows for row in batch]
    orders = []
    for names in itertools.permutations(corpus):
        text = packed(names)
        assert len(text) == 510
        whole = [tuple(text[first : first + 7]) for first in range(0, 504, 7)]
        orders.append([sorted(whole[n : n + 4]) for n in range(0, 72, 4)])
        assert found != whole
    assert [sorted(found[n : n + 4]) for n in range(0, 72, 4)] in orders


def test_what_makes_no_batch_is_left_out(tmp_path):
    """50 tokens are 7 blocks of 7: a window of 4, one of 3 with one batch of 2."""
    (tmp_path / "a.txt").write_text("aaaa\n" * 10)
    rows, place = taken(blocks(sources(tmp_path / "a.txt")).batches(), 4)
    assert np.shape(rows) == (4, 2, 7)
    assert [place[name] for name in ("epoch", "window", "batch")] == [1, 0, 1]


def test_goes_on_from_any_place(corpus):
    """Across windows and epochs, of which each has 36 batches."""
    whole, _ = taken(blocks(corpus).batches(), 80)
    for number, (_, place) in enumerate(itertools.islice(blocks(corpus).batches(), 79), 1):
        place = json.loads(json.dumps(place))
        made = blocks(corpus).batches(place)
        assert taken(made, min(8, 80 - number))[0] == whole[number : number + 8], number


def test_a_place_does_not_read_what_is_before_it(corpus, monkeypatch):
    _, place = taken(blocks(corpus).batches(), 30)
    begun = []

    def noted(name, first=0):
        begun.append(first)
        return documents(name, first)

    monkeypatch.setattr("zoo.pretraining.mixture.documents", noted)
    taken(blocks(corpus).batches(place), 1)
    assert len(begun) == 3 and min(begun) > 50


@pytest.mark.parametrize("lengths", [(199, 30), (30, 199), (199,), (199, 5, 299, 13, 14)])
def test_documents_longer_than_windows(tmp_path, lengths):
    """One of 200 tokens has 7 windows of 28, and 4 tokens of the next."""
    lines = [letter * length for letter, length in zip("abcde", lengths, strict=False)]
    (tmp_path / "long.txt").write_text("\n".join(lines))
    names = sources(tmp_path / "long.txt")
    per_epoch = (sum(lengths) + len(lengths)) // 14
    whole, _ = taken(blocks(names).batches(), 2 * per_epoch)
    found = sorted(row for batch in whole[:per_epoch] for row in batch)
    text = packed(names)
    cut = [text[first : first + 7] for first in range(0, 14 * per_epoch, 7)]
    assert found == sorted(cut)
    for number in range(1, 2 * per_epoch):
        _, place = taken(blocks(names).batches(), number)
        rest, _ = taken(blocks(names).batches(place), 2 * per_epoch - number)
        assert rest == whole[number:], number


def test_texts_are_tokenised_together(corpus, monkeypatch):
    whole, _ = taken(blocks(corpus).batches(), 40)
    groups = []
    made = blocks(corpus)
    made.tokenizer = lambda texts: groups.append(len(texts)) or tokenizer(texts)
    assert taken(made.batches(), 36)[0] == whole[:36] and groups == [45]
    monkeypatch.setattr("zoo.pretraining.text.LETTERS", 1)
    assert taken(blocks(corpus).batches(), 40)[0] == whole


def test_epochs_and_seeds_have_orders_of_their_own(corpus):
    whole, _ = taken(blocks(corpus).batches(), 72)
    assert whole[:36] != whole[36:]
    assert taken(blocks(corpus, seed=4).batches(), 36)[0] != whole[:36]


def test_random_streams_differ(corpus, monkeypatch):
    """NumPy's generators of (seed, 0, 0) and of (seed, 0, 0, 0) are the same."""
    streams, original = [], np.random.default_rng

    def noted(seed):
        streams.append(original(seed).integers(2**63))
        return original(seed)

    monkeypatch.setattr(np.random, "default_rng", noted)
    taken(blocks(corpus).batches(), 72)
    # In each of two epochs: the order of the files, that of 18 windows, and noise of 36 batches.
    assert len(streams) == len(set(streams)) == 2 * (1 + 18 + 36)


def test_bad_arguments(corpus, tmp_path):
    with pytest.raises(ValueError, match="`window`.*3.*window=4"):
        blocks(corpus, batch_size=3)
    with pytest.raises(ValueError, match="`batch_size`.*batch_size=0"):
        blocks(corpus, batch_size=0)
    (tmp_path / "a.txt").write_text("ab\n")
    with pytest.raises(ValueError, match="2.*7.*a.txt"):
        next(blocks(sources(tmp_path / "a.txt")).batches())
