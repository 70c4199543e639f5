import numpy as np
import pytest

from benchmarks import bag_of_words
from benchmarks.bag_of_words import Words, fitted
from zoo.tasks import get
from zoo.tasks.data import Examples

ALIKE = ["a cat sat", "the dog ran", "one bird sang", "some fish swam"] * 10


def scores(monkeypatch, task, train, validation, **options):
    """What the baseline reaches on a task of these examples."""
    splits = {"train": train}
    monkeypatch.setattr(
        bag_of_words, "load", lambda task, split, data_dir: splits.get(split, validation)
    )
    monkeypatch.setattr(bag_of_words, "validation_splits", lambda *_: (task.validation, ()))
    return bag_of_words.scores(task, **options)


def test_words_tell_classes(monkeypatch):
    texts = [f"a {word} film" for word in ("good", "bad")] * 10
    examples = Examples((texts,), np.array([1, 0] * 10))
    assert scores(monkeypatch, get("glue/sst2"), examples, examples) == {"val_accuracy": 1.0}


def test_all_validation_splits_and_classes_in_their_columns(monkeypatch):
    """Of the three classes 1 has no example: its column is as unlikely as can be."""
    texts = ["yes indeed", "no never"] * 10
    examples = Examples((texts, texts), np.array([2, 0] * 10))
    assert scores(monkeypatch, get("glue/mnli"), examples, examples) == {
        "val_accuracy": 1.0,
        "validation_mismatched_accuracy": 1.0,
    }


def test_scores_are_regressed(monkeypatch):
    texts = ["awful", "bad", "fine", "great"] * 10
    examples = Examples((texts, texts), np.array([0.0, 1.0, 3.0, 5.0] * 10, "float32"))
    found = scores(monkeypatch, get("glue/stsb"), examples, examples)
    assert found["val_spearman"] == pytest.approx(1.0)


@pytest.mark.parametrize("overlap", [False, True])
def test_only_overlap_knows_what_two_texts_share(monkeypatch, overlap):
    """Every sentence is as often with itself as with another."""
    other = ALIKE[1:] + ALIKE[:1]
    examples = Examples(
        (ALIKE + ALIKE, ALIKE + other), np.repeat([1, 0], len(ALIKE)).astype("int32")
    )
    accuracy = scores(monkeypatch, get("glue/mrpc"), examples, examples, overlap=overlap)
    assert (accuracy["val_accuracy"] == 1.0) == overlap


def test_counts_of_what_is_shared():
    words = Words((["a b c", "a b", "c"], ["a b c", "a", "a"]), overlap=True)
    alike = words((["a b c", "b", "z"], ["a b c", "a", "a"])).toarray()[:, -3:]
    np.testing.assert_allclose(alike, [[1, 1, 1], [0, 0, 0], [0, 0, 0]], atol=1e-6)


def test_the_primary_metric_chooses_how_strong_the_regularization_is():
    """Where most are of one class, saying so of all is accurate, and its Matthews is 0."""
    rng = np.random.default_rng(0)
    labels = (np.arange(200) % 5 == 0).astype("int32")
    x = rng.normal(size=(200, 3)) + 0.3 * labels[:, None]
    by_matthews = fitted(x, labels, get("glue/cola")).best_params_["C"]
    assert fitted(x, labels, get("glue/sst2")).best_params_["C"] < by_matthews
