"""One model that holds every router and every kind of expert bank, trained by `model.fit`.

Compiling is what costs time, so the model is compiled once for `fit`, once for `evaluate` and once
for `predict`; every test here looks at the same run.
"""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers
from keras_hub.layers import TokenAndPositionEmbedding

import keras_moe
from keras_moe import FeedForwardExperts, LayerExperts, LinearExperts, MixtureOfExperts
from tests.backend import numpy, outputs
from tests.zoo.traces import counted_traces

pytestmark = pytest.mark.every_backend

VOCABULARY, LENGTH, DIM, EXPERTS, HIDDEN, EPOCHS = 12, 8, 6, 4, 5, 10


def bank(**options):
    return FeedForwardExperts(EXPERTS, HIDDEN, seed=1, **options)


def networks():
    """Experts of several layers each, one with dropout."""
    deep = keras.Sequential([layers.Dense(HIDDEN, "relu"), layers.Dropout(0.1), layers.Dense(DIM)])
    return LayerExperts([layers.Dense(DIM), deep, layers.Dense(DIM, "tanh"), layers.Dense(DIM)])


# name: router, experts, group of tokens
MIXTURES = {
    "softmax": (keras_moe.SoftmaxRouter, bank, "sequence"),
    "noisy": (lambda: keras_moe.NoisyTopKRouter(2), lambda: bank(gated=True), "sequence"),
    "top2": (
        lambda: keras_moe.TopKRouter(2, EXPERTS, 0.75, 0.75, min_capacity=1, router_z_weight=0.01),
        lambda: bank(use_bias=True, implementation="batched"),
        "batch",
    ),
    "surest": (
        lambda: keras_moe.TopKRouter(
            2, capacity_factor=0.5, min_capacity=1, priority="probability"
        ),
        lambda: LinearExperts(EXPERTS, DIM, seed=1),
        "sequence",
    ),
    "switch": (
        lambda: keras_moe.SwitchRouter(capacity_factor=0.5, min_capacity=1, reroutes=1),
        lambda: bank(dropout=0.1),
        "sequence",
    ),
    "networks": (lambda: keras_moe.TopKRouter(2), networks, "sequence"),
    "loss_free": (
        lambda: keras_moe.LossFreeRouter(2, num_groups=2, top_groups=1, bias_update_rate=0.1),
        bank,
        "sequence",
    ),
    "hashed": (keras_moe.HashRouter, bank, "sequence"),
    "choice": (lambda: keras_moe.ExpertChoiceRouter(inference="threshold"), bank, "sequence"),
    "capped": (
        lambda: keras_moe.ExpertChoiceRouter(max_experts_per_token=2, linear_programme=True),
        bank,
        4,
    ),
    "strict": (keras_moe.StrictlyBalancedRouter, bank, "sequence"),
    "hierarchical": (lambda: keras_moe.HierarchicalRouter(2, 1, 2), bank, "sequence"),
}


def model_of(mixtures, scope=None):
    """Embeddings of token ids, 0 for padding; an MoE layer for each entry; logits of the ids.

    The MoE layers are made within `scope`.
    """
    keras.utils.set_random_seed(0)
    ids = keras.Input((LENGTH,), dtype="int32")
    # Positions tell equal ids apart: a tie is broken by rounding, which differs when compiled.
    x = TokenAndPositionEmbedding(VOCABULARY, LENGTH, DIM, mask_zero=True, name="embedding")(ids)
    for name, (router, experts, group) in mixtures.items():
        shared = layers.Dense(DIM, name="shared") if name == "switch" else None
        with scope or contextlib.nullcontext():
            layer = MixtureOfExperts(experts(), router(), group, shared, name=name)
        given = {"token_ids": ids} if name == "hashed" else {}
        x = layers.Add()([x, layer(layers.LayerNormalization()(x), **given)])
    soft = keras_moe.SoftMoE(bank(name="soft_experts"), slots_per_expert=2, name="soft")
    x = layers.Add()([x, soft(x)])
    return keras.Model(ids, layers.Dense(VOCABULARY, name="logits")(x))


def examples(number=32):
    """Sequences of several lengths; each token's label is the id before it."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCABULARY, (number, LENGTH))
    ids[np.arange(LENGTH) >= rng.integers(4, LENGTH + 1, (number, 1))] = 0
    return ids.astype("int32"), ((ids + 1) % VOCABULARY).astype("int32")


class Run:
    """A trained model, what `fit` returned, and the weights before."""

    def __init__(self, mixtures, scope=None):
        x, y = examples()
        self.model = model_of(mixtures, scope)
        self.before = {v.path: numpy(v) for v in self.model.variables}
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(keras.optimizers.Adam(0.03), loss)
        # TensorFlow would build the optimizer while it traces the step, and trace it again.
        self.model.optimizer.build(self.model.trainable_variables)
        with counted_traces() as self.traces:
            self.history = self.model.fit(
                x,
                y,
                batch_size=16,
                epochs=EPOCHS,
                validation_data=(x[:16], y[:16]),
                callbacks=[keras_moe.callbacks.RoutingMetrics()],
                verbose=0,
            ).history
        self.tokens = {  # of the last validation
            name: numpy(self.model.get_layer(name).statistics[0])[1] for name in mixtures
        }


@pytest.fixture(scope="module")
def run():
    return Run(MIXTURES)


def test_learns(run):
    loss = run.history["val_loss"]
    assert loss[-1] < 0.7 * loss[0]


def test_every_weight_learns(run):
    still = [
        v.path for v in run.model.trainable_variables if np.all(numpy(v) == run.before[v.path])
    ]
    assert not still


def test_padding_does_not_learn(run):
    embeddings = run.model.get_layer("embedding").token_embedding.embeddings
    np.testing.assert_array_equal(numpy(embeddings)[0], run.before[embeddings.path][0])


def test_a_step_is_traced_once(run):
    steps = EPOCHS * 2  # each of which is a call on PyTorch
    assert len(run.traces) == (steps if keras.backend.backend() == "torch" else 1)


def test_routing_metrics_of_every_layer(run):
    for name in MIXTURES:
        dropped = run.history[f"{name}/dropped"]
        assert len(dropped) == len(run.history[f"val_{name}/dropped"]) == EPOCHS
        assert (dropped[0] > 0) == (name in ("top2", "surest", "switch")), name
        if name != "hashed":  # which computes no probabilities
            assert 0 < run.history[f"{name}/entropy"][0] <= 1 + 1e-5, name


def test_padding_is_not_counted(run):
    tokens = np.count_nonzero(examples()[0][:16])
    assert run.tokens == dict.fromkeys(MIXTURES, tokens)


def test_evaluate_is_the_last_validation(run):
    x, y = examples()
    loss = run.model.evaluate(x[:16], y[:16], 16, verbose=0)
    assert loss == pytest.approx(run.history["val_loss"][-1], rel=1e-5)


def test_predict_ignores_padding(run):
    x, _ = examples()
    before = run.model.predict(x, 16, verbose=0)
    embeddings = run.model.get_layer("embedding").token_embedding.embeddings
    value = numpy(embeddings).copy()
    try:
        embeddings.assign(np.where(np.arange(VOCABULARY)[:, None] == 0, 50.0, value))
        after = run.model.predict(x, 16, verbose=0)
    finally:
        embeddings.assign(value)
    np.testing.assert_allclose(after[x > 0], before[x > 0], rtol=1e-5, atol=1e-5)
    assert np.abs(after[x == 0] - before[x == 0]).max() > 1


def test_comes_back_from_a_file(run, tmp_path):
    """A call of the loaded model is what `predict` of the saved one returns."""
    x, _ = examples()
    run.model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = run.model.predict(x[:16], 16, verbose=0)
    np.testing.assert_allclose(outputs(loaded, x[:16]), expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(loaded.optimizer.variables, run.model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(numpy(ours), numpy(theirs))


FEW = {name: MIXTURES[name] for name in ("surest", "switch", "choice")}


@pytest.fixture(scope="module")
def plain():
    return Run(FEW)


def test_rematerialization_changes_nothing(plain):
    again = Run(FEW, keras.RematScope("full"))
    for name, values in plain.history.items():
        assert again.history[name] == pytest.approx(values, rel=1e-4), name


def test_mixed_bfloat16(plain):
    """It learns as float32 does, with float32 weights and the same statistics."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = Run(FEW)
    finally:
        keras.config.set_dtype_policy("float32")
    first, *_, last = half.history["val_loss"]
    assert first == pytest.approx(plain.history["val_loss"][0], rel=0.02)
    assert last < 0.85 * first
    assert half.model.compute_dtype == "bfloat16"
    assert {v.dtype for v in half.model.trainable_variables} == {"float32"}
    assert half.tokens == plain.tokens
