"""Who can see the future, and who another sequence: every router, edited after a token."""

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import (
    ExpertChoiceRouter,
    FeedForwardExperts,
    HashRouter,
    HierarchicalRouter,
    LossFreeRouter,
    MixtureOfExperts,
    NoisyTopKRouter,
    SoftmaxRouter,
    StrictlyBalancedRouter,
    SwitchRouter,
    TopKRouter,
)
from tests.backend import numpy

E, D, B, L = 4, 3, 2, 8


def future_edit(layer, where, edits=3, training=False, scale=3.0):
    """The largest change of each token's output when the tokens in `where` are others.

    Args:
        layer: a built `MixtureOfExperts`.
        where: index into `[batch, length]`, the tokens that are edited, their ids with them.
        edits: how many other contents are tried.
        training: whether the layer is called for training; its noise is the same each time.
        scale: standard deviation of the new contents.

    Returns:
        `[batch, length]` array.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, L, D)).astype("float32")
    ids = rng.integers(0, 50, (B, L)).astype("int32")
    state = [(v, numpy(v)) for v in layer.non_trainable_variables]

    def outputs(x, ids):
        for variable, value in state:
            variable.assign(value)
        tokens = {"token_ids": ids} if layer.router.needs_token_ids else {}
        return numpy(layer(keras.ops.convert_to_tensor(x), training=training, **tokens))

    before = outputs(x, ids)
    change = np.zeros((B, L))
    for _ in range(edits):
        other_x, other_ids = x.copy(), ids.copy()
        other_x[where] = scale * rng.normal(size=x[where].shape)
        other_ids[where] = rng.integers(0, 50, ids[where].shape)
        change = np.maximum(change, np.abs(outputs(other_x, other_ids) - before).max(axis=-1))
    return change


def built(router, group="sequence"):
    """A layer with weights large enough for clear decisions."""
    layer = MixtureOfExperts(FeedForwardExperts(E, 4), router, group)
    layer.build((None, None, D))
    rng = np.random.default_rng(1)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    if hasattr(router, "threshold"):
        router.threshold.assign([0.1, 0.3, 0.5, 0.2])
    return layer


TIGHT = {"capacity_factor": 0.75, "eval_capacity_factor": 0.75, "min_capacity": 1}
TIGHTER = {"capacity_factor": 0.5, "eval_capacity_factor": 0.5}
BOTH, TRAINING, NEVER = (False, True), (True,), ()
# How each is made, when it sees the future, and whether it drops tokens.
CASES = {
    "switch": (lambda: SwitchRouter(jitter=0.1, **TIGHT), NEVER, True),
    "switch, rerouted": (
        lambda: SwitchRouter(jitter=0.1, reroutes=1, **{**TIGHT, **TIGHTER}),
        BOTH,
        True,
    ),
    "k=2": (lambda: TopKRouter(2, **TIGHT), NEVER, True),
    "k=2, surest first": (lambda: TopKRouter(2, priority="probability", **TIGHT), BOTH, True),
    "loss-free": (lambda: LossFreeRouter(2, **TIGHT), NEVER, True),
    "k=2, dropless": (lambda: TopKRouter(2), NEVER, False),
    "noisy": (lambda: NoisyTopKRouter(2, **TIGHT), NEVER, True),
    "hierarchical": (lambda: HierarchicalRouter(2, secondary_k=1, **TIGHT), NEVER, True),
    "softmax": (lambda: SoftmaxRouter(), NEVER, False),
    "hash": (lambda: HashRouter(**TIGHT), NEVER, True),
    "expert choice": (lambda: ExpertChoiceRouter(capacity_factor=1.0), BOTH, False),
    "expert choice, capped": (
        lambda: ExpertChoiceRouter(
            capacity_factor=1.0, max_experts_per_token=1, linear_programme=True
        ),
        BOTH,
        False,
    ),
    "expert choice, threshold": (
        lambda: ExpertChoiceRouter(capacity_factor=1.0, inference="threshold"),
        TRAINING,
        False,
    ),
    "strict": (lambda: StrictlyBalancedRouter(capacity_factor=1.0), TRAINING, False),
}


def test_no_router_is_left_out():
    public = {getattr(keras_moe, name) for name in keras_moe.__all__ if name.endswith("Router")}
    assert public - {keras_moe.Router} == {type(make()) for make, *_ in CASES.values()}


@pytest.mark.parametrize("training", BOTH, ids=["inference", "training"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_within_a_sequence(case, training):
    """With groups of one sequence each; for a decoder only who never sees the future will do."""
    make, sees_when, drops = case
    layer = built(make())
    changed = future_edit(layer, np.s_[0, 4:], training=training)
    assert changed[0, 4:].max() > 0.1  # this test can see
    assert changed[1].max() < 1e-6  # the other sequence
    if training in sees_when:
        assert changed[0, :4].max() > 0.01
    else:
        assert changed[0, :4].max() < 1e-6
    assert layer.router.is_causal == (False not in sees_when)
    totals, _ = (numpy(v) for v in layer.statistics)
    assert (totals[3] < totals[2]) == drops  # kept, wanted


@pytest.mark.parametrize("name", ["switch", "hash", "expert choice"])
def test_between_sequences_if_the_batch_is_one_group(name):
    make, *_ = CASES[name]
    assert future_edit(built(make(), "batch"), np.s_[0, 4:])[1].max() > 0.01
