import numpy as np
import pytest

import zoo
from tests.zoo.finetuning.small import load
from zoo.finetuning import batches
from zoo.finetuning.batches import TokenisedTask
from zoo.tasks.task import get


@pytest.fixture(scope="module")
def preprocessor():
    return zoo.EncoderTextClassifierPreprocessor(zoo.default_tokenizer(), 10)


def test_splits_are_read_and_tokenised_once(preprocessor, monkeypatch):
    read, made = [], []

    def counted(task, split, data_dir):
        read.append((split, data_dir))
        return load(task, split)

    def noted(*arguments, **options):
        made.append(arguments)
        return preprocessor(*arguments, **options)

    monkeypatch.setattr(batches.data, "load", counted)
    data = TokenisedTask(get("glue/cola"), "folder", 10)
    one, two = (data.batches("train", noted, 16, shuffle_seed=seed) for seed in (0, 1))
    assert read == [("train", "folder")] and len(made) == 1
    assert one.order.tolist() != two.order.tolist()  # the seed's own
    np.testing.assert_array_equal(one.token_ids, two.token_ids)


def test_few_examples_of_the_training_data_alone(preprocessor):
    data = TokenisedTask(get("glue/rte"), None, 10, max_examples=7)
    assert len(data.batches("train", preprocessor, 7).labels) == 7
    assert [len(column) for column in data.examples("train").texts] == [7, 7]
    assert len(data.batches("validation", preprocessor, 7).labels) == 21


def test_batches_are_as_long_as_their_longest_example(preprocessor):
    """Five tokens each: two ends, and three words."""
    batch = TokenisedTask(get("glue/cola"), None, 10).batches("train", preprocessor, 4)
    assert batch.lengths == [5] and batch.token_ids.shape == batch.padding_mask.shape == (64, 5)
    assert batch.padding_mask.all()
