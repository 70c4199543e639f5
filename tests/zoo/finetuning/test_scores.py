import keras
import numpy as np
import pytest

from zoo.batches import TokenBatches
from zoo.finetuning import scores
from zoo.tasks import Examples, get


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


def test_metrics_of_questions(batches):
    """Rows of the first question: 0 and 1, which is the likelier one and right; all others: one."""
    labels, groups = np.array([0, 1, 1, 1, 1, 1, 0]), np.array([0, 0, 1, 2, 3, 4, 5])
    callback = scores.OfficialMetrics(
        get("super_glue/copa"), {"validation": (Examples((), labels, groups), batches)}
    )
    model = network()
    callback.set_model(keras.Model(model.input, keras.ops.flip(model.output, axis=1)))
    logs = {}
    callback.on_epoch_end(0, logs)
    assert logs == {"val_accuracy": pytest.approx(5 / 6)}


def test_official_metrics_of_every_split(batches):
    """All seven are taken to be of class 0; the third output is the smallest."""
    task = get("glue/mnli")
    callback = scores.OfficialMetrics(
        task,
        {
            "validation_matched": (Examples((), np.zeros(7, int)), batches),
            "validation_mismatched": (Examples((), np.array([0, 1, 1, 0, 0, 0, 0])), batches),
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
