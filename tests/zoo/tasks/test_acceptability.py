import random
import subprocess
import sys

import pytest

from zoo.tasks.acceptability import SIZES, Word, _corrupt, _sentence, _spell, generate


@pytest.fixture(scope="module")
def rows():
    return [row for split in generate().values() for row in split]


def test_sizes():
    assert {split: len(rows) for split, rows in generate().items()} == SIZES


def test_no_sentence_occurs_twice(rows):
    assert len({row.sentence for row in rows}) == len(rows)


def test_pairs_stand_together():
    train = generate()["train"]
    pairs = [train[i - 1 : i + 1] for i, row in enumerate(train) if row.label == 0]
    for good, bad in pairs:
        assert good.label == 1
        assert abs(len(good.sentence.split()) - len(bad.sentence.split())) <= 2


def test_a_seed_is_a_data_set():
    again = generate.__wrapped__(0)
    assert again == generate()
    assert generate.__wrapped__(1) != again


def test_hash_randomisation_changes_nothing():
    code = "from zoo.tasks import acceptability; print(acceptability.generate()['test'][-1])"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert seen == {f"{generate()['test'][-1]}\n"}


@pytest.mark.parametrize("split", SIZES)
def test_between_half_and_two_thirds_are_acceptable(split):
    labels = [row.label for row in generate()[split]]
    assert 0.5 < sum(labels) / len(labels) < 0.67


def test_sentences_look_like_sentences(rows):
    for row in rows:
        assert row.sentence[0].isupper()
        assert row.sentence[-1] in ".?"
        assert "  " not in row.sentence
        assert row.sentence.strip() == row.sentence
        assert (row.label == 0) == bool(row.phenomenon)


def test_every_phenomenon_is_there(rows):
    assert {row.phenomenon for row in rows} == {
        "",
        "agreement",
        "case",
        "determiner",
        "double determiner",
        "double verb",
        "extra object",
        "filled gap",
        "missing determiner",
        "missing object",
        "missing verb",
        "noun order",
        "reflexive",
        "relative pronoun",
        "tense",
        "verb form",
        "verb order",
    }


def test_no_corruption_is_a_sentence_of_the_grammar():
    rng = random.Random(7)
    drawn = [_sentence(rng) for _ in range(20_000)]
    good = {_spell(*sentence) for sentence in drawn}
    bad = {_spell(_corrupt(rng, words)[0], mark) for words, mark in drawn}
    assert not good & bad


def test_words_alone_do_not_tell():
    # Logistic regression on the bag of words stays near the majority class.
    sklearn = pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    assert sklearn
    train, held_out = (generate()[split] for split in ("train", "validation"))
    counts = CountVectorizer(token_pattern=r"\w+").fit([row.sentence for row in train])
    model = LogisticRegression(max_iter=300)
    model.fit(counts.transform([r.sentence for r in train]), [r.label for r in train])
    score = model.score(
        counts.transform([r.sentence for r in held_out]), [r.label for r in held_out]
    )
    assert score < 0.66


def test_spelling_of_the_article():
    words = [Word("a"), Word("old"), Word("boy"), Word("takes"), Word("a"), Word("box")]
    assert _spell(words, ".") == "An old boy takes a box."


def test_an_edit_is_what_the_word_says():
    words = [Word("the"), Word("boys"), Word("sleep", (("agreement", "sleeps"),))]
    edited, phenomenon = _corrupt(random.Random(0), words)
    assert (_spell(edited, "."), phenomenon) == ("The boys sleeps.", "agreement")


def test_a_swap_exchanges_neighbours():
    words = [Word("the", (), "noun order"), Word("boys"), Word("sleep")]
    edited, phenomenon = _corrupt(random.Random(0), words)
    assert (_spell(edited, "."), phenomenon) == ("Boys the sleep.", "noun order")
