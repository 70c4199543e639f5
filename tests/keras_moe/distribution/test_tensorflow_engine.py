"""Runs on a mesh of TensorFlow's eight virtual devices, against the same runs on one device.

The run on one device is eager: it compiles nothing, and computes the same.
"""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("TensorFlow's engine", allow_module_level=True)

import tensorflow as tf
from tensorflow.dtensor.python import api

import keras_moe
import zoo
from keras_moe.distribution import ExpertParallel
from keras_moe.distribution.active import active
from tests.keras_moe.distribution.several import MESH

pytestmark = pytest.mark.every_backend

DIM, LENGTH, EXPERTS, HIDDEN = 8, 8, 8, 16
ROUTERS = {
    "switch": lambda: keras_moe.SwitchRouter(jitter=0.1, min_capacity=1, seed=1),
    "top2": lambda: keras_moe.TopKRouter(
        2, capacity_factor=1.0, eval_capacity_factor=2.0, min_capacity=1, router_z_weight=0.1
    ),
    "dropless": lambda: keras_moe.TopKRouter(2),
    "choice": lambda: keras_moe.ExpertChoiceRouter(inference="threshold"),
}


def compiled(model, optimizer=None, loss="mse"):
    # With Adam's own epsilon a gradient of rounding errors alone would make a whole step.
    optimizer = optimizer or keras.optimizers.Adam(1e-2, epsilon=1e-3)
    model.compile(optimizer, loss, run_eagerly=active() is None)
    return model


def model_of(*kinds, group="sequence", optimizer=None):
    """Two dense layers, and an MoE layer of every kind between them."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((LENGTH, DIM))
    x = keras.layers.Dense(DIM, activation="relu")(inputs)
    for kind in kinds:
        experts = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN, use_bias=True, seed=1)
        x = x + keras_moe.MixtureOfExperts(experts, ROUTERS[kind](), group=group, name=kind)(x)
    return compiled(keras.Model(inputs, keras.layers.Dense(DIM)(x)), optimizer)


def data(batches, batch=16):
    x = np.random.default_rng(0).normal(size=(batches * batch, LENGTH, DIM)).astype("float32")
    return x, np.roll(x, 1, axis=-1)


class Losses(keras.callbacks.Callback):
    """The mean loss of the epoch after each step."""

    def on_train_begin(self, logs=None):
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(float(logs["loss"]))


def trained(model, x, y):
    """Trains a model, and returns its losses and routing metrics."""
    losses = Losses()
    model.fit(x, y, 16, shuffle=False, verbose=0, callbacks=[losses])
    return {"losses": losses.values, **metrics(model)}


def metrics(model):
    return {
        f"{layer.name}/{name}": float(value)
        for layer in model.layers
        if isinstance(layer, keras_moe.MixtureOfExperts)
        for name, value in keras_moe.metrics.read(layer).items()
    }


def compare(many, one):
    assert one.keys() == many.keys()
    for name, value in one.items():
        atol = 1e-4 if name in ("losses", "evaluated", "predicted") else 1e-5
        np.testing.assert_allclose(many[name], value, rtol=0, atol=atol, err_msg=name)


def shards(model):
    """Path -> size of an expert weight or moment, and of its smallest and largest part."""
    variables = [v for v in [*model.weights, *model.optimizer.variables] if "experts_" in v.path]
    variables += [v for v in model.weights if "/experts/" in v.path]
    result = {}
    for variable in variables:
        parts = tf.experimental.dtensor.unpack(variable.value.read_value())
        sizes = [int(np.prod(part.shape)) for part in parts]
        result[variable.path] = int(np.prod(variable.shape)), min(sizes), max(sizes)
    return result


@pytest.fixture(scope="module")
def every_kind():
    """A model with an MoE layer of every kind, trained on a mesh, and results without and with."""

    def run():
        model = model_of(*ROUTERS)
        x, y = data(6)
        results = trained(model, x, y)
        return model, {**results, "evaluated": model.evaluate(x[:16], y[:16], 16, verbose=0)}

    _, one = run()
    with ExpertParallel(**MESH).scope():
        model, many = run()
    return model, one, many


def test_devices_change_nothing(every_kind):
    """An MoE layer of every kind: Switch, top-2 with a capacity and without, expert choice."""
    _, one, many = every_kind
    assert len(one["losses"]) == 6
    assert one["losses"][-1] < 0.97 * one["losses"][0]
    compare(many, one)


def test_each_device_has_its_share_of_experts_and_moments(every_kind):
    found = shards(every_kind[0])
    assert len(found) == 4 * 3 * 4  # two kernels, two biases, and two moments of each
    for path, (total, least, most) in found.items():
        share = MESH["experts"] * (1 if "bias_out" in path else MESH["model"])
        assert least == most == total // share, path


def test_batch_that_devices_cannot_share():
    """On more data than experts: a last batch of 13 sequences, and one of 8, of 8 devices."""
    x, y = (array[:-3] for array in data(2))

    def run():
        model = model_of("switch")
        results = trained(model, x, y)
        results["evaluated"] = model.evaluate(x[:8], y[:8], 16, verbose=0)
        return {**results, "predicted": model.predict(x[:24], 16, verbose=0)}

    one = run()
    with ExpertParallel(data=4, experts=2).scope():
        many = run()
    assert len(many["predicted"]) == 24
    compare(many, one)


@pytest.fixture(scope="module")
def one_group():
    """A mesh, a model whose group is the whole batch, trained with Adafactor, and results."""

    def run():
        optimizer = keras_moe.optimizers.Adafactor(1e-2)
        model = model_of("choice", group="batch", optimizer=optimizer)
        x, y = data(4)
        results = trained(model, x, y)
        return model, {**results, "predicted": model.predict(x[:16], 16, verbose=0)}

    _, one = run()
    parallel = ExpertParallel(data=2, experts=4)
    with parallel.scope():
        model, many = run()
    return parallel, model, one, many


def test_group_that_devices_cannot_share(one_group):
    *_, one, many = one_group
    compare(many, one)


def test_adafactor_keeps_its_factors_with_their_experts(one_group):
    factors = {
        path: sizes for path, sizes in shards(one_group[1]).items() if "experts_kernel" in path
    }
    assert len(factors) > 2
    for path, (total, least, most) in factors.items():
        assert total == 1 or least == most == total // 4, path


def test_saved_model_comes_back_on_the_mesh(one_group, tmp_path):
    parallel, model, *_ = one_group
    with parallel.scope():
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        for mine, its in zip(model.trainable_weights, loaded.trainable_weights, strict=True):
            np.testing.assert_array_equal(its.numpy(), mine.numpy())
    found = shards(loaded)
    assert any(path.endswith("experts/kernel_in") for path in found)
    for path, (total, least, most) in found.items():
        assert least == most == total // 4, path


def test_table_shows_layouts_and_bytes_per_device(one_group):
    parallel, model, *_ = one_group
    lines = parallel.describe(model).splitlines()
    line = next(line for line in lines if line.startswith("choice/experts/kernel_in"))
    # 8 experts of 8 x 16 numbers of 4 bytes, a fourth of them on each device
    assert " ".join(line.split()[1:]) == "(8, 8, 16) expert, None, model 1,024"


def test_model_of_the_mesh_raises_outside(one_group):
    with pytest.raises(ValueError, match=r"`ExpertParallel.scope\(\)`.*`train`"):
        one_group[1].fit(*data(1), 16, verbose=0)


def test_padding():
    x, y = data(3)
    x[:, 5:] = 0

    def run():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((LENGTH, DIM))
        h = keras.layers.Masking()(inputs)
        experts = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN, seed=1)
        h = keras_moe.MixtureOfExperts(experts, ROUTERS["top2"]())(h)
        model = compiled(keras.Model(inputs, keras.layers.Dense(DIM)(h)), "sgd")
        return model.fit(x, y, 16, shuffle=False, verbose=0, epochs=2).history["loss"]

    one = run()
    with ExpertParallel(data=1, experts=4).scope():
        np.testing.assert_allclose(run(), one, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "blocks",
    [
        # A sparse block that reads padded texts, and a dense one that attends to its outputs.
        {"num_layers": 1, "sparse_blocks": (1,), "decoder_sparse_blocks": ()},
        pytest.param({"num_layers": 2}, marks=pytest.mark.full),  # every second one is sparse
    ],
    ids=["one", "two"],
)
def test_encoder_and_decoder_of_the_zoo(blocks):
    ids = np.random.default_rng(0).integers(1, 20, (32, LENGTH))
    mask = (np.arange(LENGTH) < ids[:, :1] % 8 + 1).astype("int32")
    x = {"encoder_token_ids": ids, "encoder_padding_mask": mask}
    x |= {"decoder_token_ids": ids[:, ::-1], "decoder_padding_mask": np.ones_like(mask)}

    def run():
        keras.utils.set_random_seed(0)
        backbone = zoo.EncoderDecoderBackbone(
            vocabulary_size=20,
            num_heads=2,
            hidden_dim=DIM,
            key_dim=4,
            intermediate_dim=HIDDEN,
            router=keras_moe.SwitchRouter(),
            num_experts=EXPERTS,
            **blocks,
            dropout=0.0,
            expert_dropout=0.0,
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model = compiled(zoo.Seq2SeqLM(backbone), loss=loss)
        return model.fit(x, ids, 16, shuffle=False, verbose=0, epochs=3).history["loss"]

    one = run()
    with ExpertParallel(data=1, experts=2, model=2).scope():
        np.testing.assert_allclose(run(), one, rtol=0, atol=1e-5)


class Fails(keras.layers.Layer):
    def call(self, inputs):
        return tf.debugging.check_numerics(inputs, "fails on purpose")


def test_failure_on_one_device_is_an_error_of_its_step():
    """A layer that fails in the third step, on the last device alone."""
    x, y = data(4)
    x[3 * 16 - 1] = np.nan
    losses = Losses()
    with ExpertParallel(data=1, experts=4).scope():
        inputs = keras.Input((LENGTH, DIM))
        model = keras.Model(inputs, keras.layers.Dense(DIM)(Fails()(inputs)))
        model.compile("sgd", "mse")
        with pytest.raises(tf.errors.InvalidArgumentError, match="fails on purpose"):
            model.fit(x, y, 16, shuffle=False, verbose=0, callbacks=[losses])
    assert len(losses.values) == 2
    assert min(losses.values) > 0.1


class TestRefusals:
    def test_experts_that_devices_cannot_share(self):
        with (
            ExpertParallel(data=1, experts=3).scope(),
            pytest.raises(ValueError, match="`experts`.*experts=3.*8.*'switch'"),
        ):
            model_of("switch")

    def test_model_made_outside(self):
        model = model_of("switch")
        with (
            ExpertParallel(experts=4).scope(),
            pytest.raises(ValueError, match="'switch/experts/kernel_in'"),
        ):
            model.fit(*data(1), 16, verbose=0)

    def test_router_without_a_rule(self):
        experts = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN)
        layer = keras_moe.MixtureOfExperts(experts, keras_moe.LossFreeRouter(2))
        with (
            ExpertParallel(experts=4).scope(),
            pytest.raises(ValueError, match="`router`.*LossFreeRouter"),
        ):
            layer.build((4, 8, DIM))

    def test_soft_routing(self):
        with ExpertParallel(experts=4).scope():
            inputs = keras.Input((LENGTH, DIM))
            experts = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN)
            model = keras.Model(inputs, keras_moe.SoftMoE(experts, slots_per_expert=2)(inputs))
            model.compile("sgd", "mse")
            with pytest.raises(ValueError, match="`SoftMoE`.*8 experts"):
                model.fit(*data(1), 16, verbose=0)

    def test_generation(self):
        options = {"num_experts": EXPERTS, "intermediate_dim": HIDDEN, "hidden_dim": DIM}
        ids = np.ones((2, LENGTH), "int32")
        with ExpertParallel(experts=4).scope():
            lm = zoo.CausalLM(zoo.DecoderBackbone(20, 2, 2, key_dim=4, **options))
            with pytest.raises(ValueError, match="`generate`"):
                lm.generate({"token_ids": ids, "padding_mask": ids}, stop_token_ids=None)

    def test_dtensor_that_another_program_started(self, monkeypatch):
        monkeypatch.setattr(api, "_dtensor_singleton", object())
        with pytest.raises(ValueError, match="`ExpertParallel`.*a device already"):
            ExpertParallel(experts=4)
