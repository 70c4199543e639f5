from typing import NamedTuple

import keras
import numpy as np
import pytest

from zoo.batches import TokenBatches
from zoo.finetuning import scores
from zoo.tasks.task import get


class Grouped(NamedTuple):
    texts: tuple
    labels: np.ndarray
    groups: np.ndarray | None


@pytest.fixture(scope="module")
def batches():
    """Seven examples of 1 to 7 tokens, in batches of two lengths; each is its number, repeated."""
    count = np.array([7, 1, 6, 2, 5, 3, 4])
    mask = np.arange(8) < count[:, None]
    token_ids = np.where(mask, np.arange(7)[:, None], 0)
    return TokenBatches(token_ids, mask, np.array([0, 1, 1, 0, 1, 0, 1]), 2, (4, 8))


def network():
    """Its outputs are an example's number, and minus that."""
    inputs = {name: keras.Input((None,), dtype="int32") for name in ("token_ids", "padding_mask")}
    number = keras.ops.cast(keras.ops.max(inputs["token_ids"], axis=1, keepdims=True), "float32")
    return keras.Model(inputs, keras.ops.concatenate([number, -number], axis=1))


def test_outputs_are_in_the_order_of_the_examples(batches):
    outputs = scores.predict(network(), batches)
    assert outputs.tolist() == [[n, -n] for n in range(7)]
    assert sorted(batches.order[batches.order >= 0]) != batches.order.tolist()


def test_groups_reach_the_metrics(monkeypatch):
    given = []
    monkeypatch.setattr(
        scores.metrics, "evaluate", lambda *arguments, **options: given.append(options) or {"f1": 1}
    )
    labels, outputs = np.array([0, 1]), np.zeros((2, 2))
    task = get("glue/cola")
    scores.score(task, Grouped((["a", "b"],), labels, None), outputs)
    grouped = Grouped((["a", "b"],), labels, np.array([3, 3]))
    scores.score(task, grouped, outputs)
    assert given[0] == {} and given[1]["groups"].tolist() == [3, 3]
    assert given[1]["examples"] is grouped


def test_official_metrics_of_every_split(batches):
    """All seven are taken to be of class 0; the third output is the smallest."""
    task = get("glue/mnli")
    callback = scores.OfficialMetrics(
        task,
        {
            "validation_matched": (Grouped((), np.zeros(7, int), None), batches),
            "validation_mismatched": (Grouped((), np.array([0, 1, 1, 0, 0, 0, 0]), None), batches),
        },
    )
    model = network()
    third = model.output[:, :1] - 100
    callback.set_model(
        keras.Model(model.input, keras.ops.concatenate([model.output, third], axis=1))
    )
    logs = {}
    callback.on_epoch_end(0, logs)
    assert logs == {"val_accuracy": 1.0, "validation_mismatched_accuracy": pytest.approx(5 / 7)}
