import re
import subprocess
import sys

import pytest

from zoo.tasks.acceptability import SIZES, generate


@pytest.fixture(scope="module")
def rows():
    return [row for split in generate().values() for row in split]


def test_sizes():
    assert {split: len(rows) for split, rows in generate().items()} == SIZES


def test_no_sentence_occurs_twice(rows):
    assert len({row.sentence for row in rows}) == len(rows)


@pytest.fixture(scope="module")
def pairs():
    """Each corrupted sentence for training, after the one that it was made of."""
    train = generate()["train"]
    return [train[i - 1 : i + 1] for i, row in enumerate(train) if row.label == 0]


def words(row):
    """The words before the article is spelt."""
    return re.sub(r"\ban\b", "a", row.sentence[:-1].lower()).split()


def test_pairs_stand_together(pairs):
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
    drawn = [
        row for seed in range(6) for rows in generate.__wrapped__(seed).values() for row in rows
    ]
    good, bad = ({row.sentence for row in drawn if row.label == label} for label in (1, 0))
    assert len(good) > 20_000 and len(bad) > 12_000
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


def test_spelling_of_the_article(rows):
    found = [
        (article.lower(), following[0].lower() in "aeiou")
        for row in rows
        for article, following in re.findall(r"\b(an?) (\w+)", row.sentence, re.IGNORECASE)
    ]
    assert set(found) == {("a", False), ("an", True)}


def test_an_edit_changes_the_form_of_one_word(pairs):
    irregular = [{"is", "are"}, {"was", "were"}, {"has", "have"}, {"does", "do"}]
    changed = []
    for good, bad in pairs:
        if bad.phenomenon == "agreement":
            (forms,) = (
                {before, after}
                for before, after in zip(words(good), words(bad), strict=True)
                if before != after
            )
            changed.append(forms)
            base, third = sorted(forms, key=len)
            regular = third in (f"{base}s", f"{base}es", f"{base[:-1]}ies")
            assert regular or forms in irregular, (good, bad)
    assert all(forms in changed for forms in irregular)


def test_a_swap_exchanges_neighbours(pairs):
    for good, bad in pairs:
        if bad.phenomenon in ("noun order", "verb order"):
            before, after = words(good), words(bad)
            i = next(i for i, word in enumerate(before) if word != after[i])
            assert after == [*before[:i], before[i + 1], before[i], *before[i + 2 :]]
