"""Runs on a mesh of JAX's eight virtual devices, against the same runs on one device."""

import contextlib
import re

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("JAX's engine", allow_module_level=True)

import jax
from keras.src.backend.jax.trainer import _distribute_data

import keras_moe
import zoo
from keras_moe.distribution import ExpertParallel
from tests.keras_moe.distribution.several import MESH

pytestmark = pytest.mark.every_backend

DIM, LENGTH, EXPERTS, HIDDEN = 16, 8, 8, 32
ROUTERS = {
    "switch": lambda: keras_moe.SwitchRouter(jitter=0.1, min_capacity=1, seed=1),
    "argmax": lambda: keras_moe.SwitchRouter(exploration="argmax", min_capacity=1),
    "dropless_argmax": lambda: keras_moe.SwitchRouter(
        capacity_factor=None, eval_capacity_factor=None, exploration="argmax"
    ),
    "top2": lambda: keras_moe.TopKRouter(
        2, capacity_factor=1.25, min_capacity=1, router_z_weight=0.1
    ),
    "top2_by_probability": lambda: keras_moe.TopKRouter(
        2, capacity_factor=1.0, eval_capacity_factor=2.0, min_capacity=1, priority="probability"
    ),
    "dropless_top2": lambda: keras_moe.TopKRouter(2),
    "capped_choice": lambda: keras_moe.ExpertChoiceRouter(max_experts_per_token=3),
    "choice": lambda: keras_moe.ExpertChoiceRouter(),
    "threshold": lambda: keras_moe.ExpertChoiceRouter(inference="threshold", router_z_weight=0.1),
}


def moe_layers(groups, **options):
    """An MoE layer for each router of a dictionary, with its groups; the second one is gated."""
    return [
        keras_moe.MixtureOfExperts(
            keras_moe.FeedForwardExperts(
                EXPERTS, HIDDEN, use_bias=True, gated=number == 1, seed=number, **options
            ),
            ROUTERS[name](),
            group,
            name=f"moe_{number}",
        )
        for number, (name, group) in enumerate(groups.items())
    ]


def model_of(layers, dim=DIM, length=LENGTH, attention=True):
    """A model of a dense layer, attention, what `layers()` makes, and another dense layer."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((length, dim))
    x = keras.layers.Dense(dim)(inputs)
    if attention:
        x = x + keras.layers.MultiHeadAttention(2, 8, name="attention")(x, x)
    for layer in layers():
        x = x + layer(x)
    return keras.Model(inputs, keras.layers.Dense(4)(x))


def examples(number=16, length=LENGTH, dim=DIM):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(number, length, size)).astype("float32") for size in (dim, 4))
    return x, y


def on_one_and_on(mesh, run):
    """What a function returns on one device, and what it returns on a mesh."""
    one = run()
    with ExpertParallel(**mesh).scope():
        return one, run()


def shards(model):
    """Path -> bytes of an expert weight or moment, and of its smallest and largest part."""
    found = {}
    for variable in [*model.trainable_variables, *model.optimizer.variables]:
        if re.search("experts[/_](kernel|bias)", variable.path):
            value = variable.value
            local = [shard.data.nbytes for shard in value.addressable_shards]
            found[variable.path] = (value.nbytes, min(local), max(local))
    return found


CURVES = {
    "one_of_each": {
        "switch": "sequence",
        "top2_by_probability": "batch",
        "dropless_top2": "sequence",
        "threshold": "sequence",
    },
    "switch": {"switch": "sequence", "argmax": "batch", "dropless_argmax": "sequence"},
    "top2": {"top2": "sequence", "top2_by_probability": "batch", "dropless_top2": "sequence"},
    "choice": {"capped_choice": "sequence", "choice": "batch", "threshold": "sequence"},
}


@pytest.fixture(
    scope="module",
    params=[
        "one_of_each",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("switch", "top2", "choice")),
    ],
)
def curves(request):
    """Results of a run on one device and on a mesh, and the model that lies there."""
    x, y = examples()
    models = []

    def run():
        model = model_of(lambda: moe_layers(CURVES[request.param]))
        models.append(model)
        model.compile(keras.optimizers.Adam(1e-2), "mse")
        callbacks = [keras_moe.callbacks.RoutingMetrics()]
        options = {"batch_size": 16, "verbose": 0}
        history = model.fit(x, y, epochs=20, shuffle=False, callbacks=callbacks, **options).history
        return {
            "losses": history.pop("loss"),
            "metrics": {name: values[0] for name, values in history.items()},
            "auxiliary": model.evaluate(x, y, sample_weight=np.zeros(y.shape[:2]), **options),
            "evaluated": model.evaluate(x, y, sample_weight=np.ones(y.shape[:2]), **options),
        }

    return *on_one_and_on(MESH, run), models[-1]


def test_devices_do_not_change_losses(curves):
    one, many, _ = curves
    assert len(one["losses"]) == 20
    assert one["losses"][-1] < 0.7 * one["losses"][0]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(many["evaluated"], one["evaluated"], rtol=0, atol=1e-4)


def test_devices_do_not_change_metrics_and_auxiliary_losses(curves):
    one, many, _ = curves
    assert one["metrics"].keys() == many["metrics"].keys()
    assert len(one["metrics"]) > 10
    for name, value in one["metrics"].items():
        np.testing.assert_allclose(many["metrics"][name], value, rtol=0, atol=1e-5, err_msg=name)
    assert one["auxiliary"] > 0
    np.testing.assert_allclose(many["auxiliary"], one["auxiliary"], rtol=0, atol=1e-5)


def test_each_device_has_its_share_of_experts_and_moments(curves):
    found = shards(curves[2])
    # Two kernels and two biases, of the gated layer three kernels; and two moments of each.
    layers = len([layer for layer in curves[2].layers if "moe" in layer.name])
    assert len(found) == 3 * (4 * layers + 1)
    for path, (total, least, most) in found.items():
        share = MESH["experts"] * (1 if "bias_out" in path else MESH["model"])
        assert least == most == total // share, path


BYTES = {"pred": 1, "s8": 1, "u8": 1, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8}
COLLECTIVES = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|ragged-all-to-all"


def collectives(text):
    """Bytes of the result of each kind of collective on one device, those among one left out."""
    total = dict.fromkeys(COLLECTIVES.split("|"), 0)
    for line in text.splitlines():
        found = re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line)
        if not found or re.search(r"replica_groups=\{(\{\d+\},?)+\}", line):
            continue
        for dtype, shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", found[1]):
            size = int(np.prod([int(n) for n in shape.split(",") if n], initial=1))
            total[found[2]] += size * BYTES.get(dtype, 4)
    return total


def compiled_step(model, x, y):
    """The train step's program, as the compiler left it for one device."""
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model._symbolic_build(data_batch=(x, y))
    names = ("trainable", "non_trainable", "optimizer", "metrics")
    state = model._get_jax_state(**{f"{name}_variables": True for name in names})
    step = jax.jit(model.train_step, out_shardings=(None, model._get_state_sharding_spec()))
    return step.lower(state, _distribute_data((x, y))).compile().as_text()


def test_only_slots_travel():
    """Of a train step on data 1 x expert 8, whatever grows with the tokens.

    16 sequences more are 16 * 32 / 8 = 64 tokens more per device, of 64 numbers of 4 bytes. Three
    MoE layers send them to 1 * 1.25, 2 * 1.25 and 2 experts each (groups of 32 tokens: 5, 10 and 8
    slots in each of 8 experts, nothing rounded), there and back, forward and backward.
    """

    def layers():
        routers = [
            keras_moe.SwitchRouter(),
            keras_moe.TopKRouter(2, capacity_factor=1.25, router_z_weight=0.1),
            keras_moe.ExpertChoiceRouter(),
        ]
        for number, router in enumerate(routers):
            gated = number == 1
            experts = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN, use_bias=True, gated=gated)
            yield keras_moe.MixtureOfExperts(experts, router)

    with ExpertParallel(data=1, experts=8).scope():
        few, many = (
            collectives(
                compiled_step(model_of(layers, dim=64, length=32), *examples(batch, 32, 64))
            )
            for batch in (16, 32)
        )
    growth = {name: many[name] - few[name] for name in few}
    ideal = 4 * 64 * (1.25 + 2.5 + 2.0) * 64 * 4
    assert growth.pop("all-to-all") == ideal
    assert set(growth.values()) == {0}
    assert sum(many.values()) > 0


def test_batch_that_devices_cannot_share():
    """11 examples in batches of 8, of which 3 are left, on more data than experts."""
    x, y = examples(11)

    def run():
        model = model_of(lambda: moe_layers({"top2": "sequence"}), attention=False)
        model.compile(keras.optimizers.Adam(1e-2), "mse")
        fit = model.fit(x, y, batch_size=8, epochs=3, verbose=0, shuffle=False)
        return {
            "losses": fit.history["loss"],
            "predicted": model.predict(x, batch_size=8, verbose=0),
            "predicted on batch": np.asarray(model.predict_on_batch(x[:8])),
            "evaluated": model.evaluate(x[8:], y[8:], verbose=0),
            "tested on batch": float(model.test_on_batch(x[8:], y[8:])),
            "trained on batch": [float(model.train_on_batch(x[:8], y[:8])) for _ in range(3)],
        }

    one, many = on_one_and_on({"data": 4, "experts": 2}, run)
    assert len(many["predicted"]) == 11
    assert one["trained on batch"][2] < one["trained on batch"][0]
    for name, value in one.items():
        atol = 1e-5 if name in ("losses", "evaluated") else 1e-4
        np.testing.assert_allclose(many[name], value, rtol=0, atol=atol, err_msg=name)


def soft():
    return keras_moe.SoftMoE(keras_moe.FeedForwardExperts(EXPERTS, HIDDEN, seed=3), 2)


def test_tokens_and_groups_that_devices_cannot_share():
    """3 groups of 7 tokens on 8 devices, for routers without a capacity and soft routing."""

    def layers():
        return [*moe_layers({"dropless_top2": "batch"}), soft()]

    def run():
        model = model_of(layers, length=7, attention=False)
        model.compile(keras.optimizers.Adam(1e-2), "mse")
        return model.fit(*examples(3, 7), epochs=3, verbose=0, shuffle=False).history["loss"]

    one, many = on_one_and_on({"data": 4, "experts": 2}, run)
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-4)


def test_other_banks_of_experts():
    """Linear, recomputed and shared experts, soft routing, and groups across sequences."""

    def layers():
        with keras.RematScope("full"):
            recomputed = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN, seed=1)
        return [
            keras_moe.MixtureOfExperts(
                keras_moe.LinearExperts(EXPERTS, DIM, seed=0),
                keras_moe.TopKRouter(2, capacity_factor=1.25),
            ),
            keras_moe.MixtureOfExperts(
                recomputed,
                keras_moe.SwitchRouter(reroutes=1, min_capacity=1, exploration="argmax"),
                group=16,
                shared=keras_moe.FeedForwardExperts(1, HIDDEN, seed=2, name="shared"),
            ),
            soft(),
        ]

    def run():
        model = model_of(layers, attention=False)
        model.compile(keras.optimizers.Adam(1e-2), "mse")
        fit = model.fit(*examples(), batch_size=16, epochs=3, verbose=0, shuffle=False)
        return model, fit.history["loss"]

    (_, one), (model, many) = on_one_and_on(MESH, run)
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-4)
    found = shards(model)
    assert len(found) == 3 * (1 + 2 + 2)
    for path, (total, least, most) in found.items():
        assert least == most == total // 4, path


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 1, "experts": 4, "model": 2},
        pytest.param(MESH, marks=pytest.mark.full),
        pytest.param({"data": 1, "experts": 8}, marks=pytest.mark.full),
    ],
)
def test_bfloat16(mesh):
    """The largest difference of outputs, relative to them, with and without drops."""
    x, _ = examples()

    def run():
        keras.utils.set_random_seed(0)
        inputs = keras.Input(x.shape[1:])
        outputs = []
        for factor in (1.25, None):
            experts = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN, seed=0, dtype="bfloat16")
            router = keras_moe.TopKRouter(2, capacity_factor=factor)
            layer = keras_moe.MixtureOfExperts(experts, router, dtype="mixed_bfloat16")
            outputs.append(layer(inputs))
        model = keras.Model(inputs, outputs)
        return model.predict(x, batch_size=len(x), verbose=0)

    for one, many in zip(*on_one_and_on(mesh, run), strict=True):
        assert one.dtype == many.dtype == "bfloat16"
        one, many = one.astype("float32"), many.astype("float32")
        assert np.abs(many - one).max() < 2**-7 * np.abs(one).max()


class Late(keras.Model):
    """A model whose weights are made when `fit` has seen the data."""

    def __init__(self):
        super().__init__(name="late")
        experts = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN, dropout=0.5, seed=1)
        router = keras_moe.SwitchRouter(kernel_initializer=keras.initializers.RandomNormal(seed=1))
        self.moe = keras_moe.MixtureOfExperts(experts, router, name="moe")
        self.out = keras.layers.Dense(4, name="out")

    def call(self, x, training=False):
        return self.out(x + self.moe(x, training=training))


def test_weights_made_late_and_moments_in_factors():
    parallel = ExpertParallel(data=2, experts=4)
    with parallel.scope():
        model = Late()
        model.compile(keras_moe.optimizers.Adafactor(0.05), "mse")
        losses = model.fit(*examples(), batch_size=16, epochs=5, verbose=0).history["loss"]
        table = parallel.describe(model)
    assert losses[-1] < losses[0]
    found = shards(model)
    assert len(found) == 2 + 4
    for path, (total, least, most) in found.items():
        assert least == most == total // 4, path
    # 8 * 16 * 32 numbers of 4 bytes on 4 devices; rows 8 * 16.
    lines = {line.split()[0]: line.split()[-1] for line in table.splitlines()}
    assert lines["late/moe/experts/kernel_in"] == "4,096"
    assert lines["adafactor/late_moe_experts_kernel_in_rows"] == "128"
    assert lines["late/out/kernel"] == "256"
    assert table.split()[:4] == ["weight", "shape", "layout", "bytes"]


def test_devices_drop_different_hidden_units():
    """Kernels of ones: a token is 16 in, and half of 16 / (1 - 0.5) out for each unit kept."""
    with ExpertParallel(data=1, experts=2, model=4).scope():
        experts = keras_moe.FeedForwardExperts(2, 64, dropout=0.5, activation="linear", seed=0)
        router = keras_moe.TopKRouter(2, capacity_factor=1.0, kernel_initializer="zeros")
        layer = keras_moe.MixtureOfExperts(experts, router)
        layer.build((None, 4, DIM))
        for kernel in (experts.kernel_in, experts.kernel_out):
            kernel.assign(np.ones(kernel.shape))
        weights = [
            [v.value for v in variables]
            for variables in (layer.trainable_variables, layer.non_trainable_variables)
        ]
        call = jax.jit(lambda x: layer.stateless_call(*weights, x, training=True)[0])
        y = call(np.ones((2, 4, DIM), "float32"))
    kept = np.asarray(y[..., 0]).ravel() / 16
    np.testing.assert_allclose(kept, kept.round(), atol=1e-3)
    assert len(set(kept.round())) > 3  # of 8 tokens
    assert (kept.round() % 4 != 0).any()  # as it would be if 4 devices kept the same units
    assert 48 < kept.mean() < 80  # of 64 units of either expert


def test_language_model_of_the_zoo(tmp_path):
    """A decoder, trained and saved on eight devices, and loaded on one and on four."""

    def build():
        keras.utils.set_random_seed(0)
        backbone = zoo.DecoderBackbone(
            vocabulary_size=40,
            num_layers=2,
            num_heads=4,
            num_key_value_heads=2,
            hidden_dim=16,
            key_dim=4,
            intermediate_dim=32,
            num_experts=4,
            router=keras_moe.TopKRouter(2),
            positions="rotary",
            gated=True,
            dropout=0.0,
            expert_dropout=0.0,
        )
        return zoo.CausalLM(backbone)

    rng = np.random.default_rng(0)
    token_ids = rng.integers(2, 40, (8, 9))
    mask = np.ones((8, 8), "int32")
    x, y = {"token_ids": token_ids[:, :-1], "padding_mask": mask}, token_ids[:, 1:]
    prompt = {"token_ids": token_ids[:2, :8], "padding_mask": mask[:2] * (np.arange(8) < 3)}

    def use(model):
        model.compile(
            keras.optimizers.Adam(1e-2),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            sampler="greedy",
        )
        losses = model.fit(x, y, batch_size=8, epochs=10, verbose=0).history["loss"]
        return losses, model.generate(prompt, stop_token_ids=None)["token_ids"]

    losses, written = use(build())
    path = tmp_path / "model.weights.h5"
    parallel = ExpertParallel(data=2, experts=2, model=2)
    with parallel.scope():
        model = build()
        many_losses, many_written = use(model)
        table = parallel.describe(model)
        model.save_weights(path)
    np.testing.assert_allclose(many_losses, losses, rtol=0, atol=1e-4)
    assert many_losses[-1] < 0.8 * many_losses[0]
    np.testing.assert_array_equal(many_written, written)
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert "None, model" in lines["block_1/attention/query/kernel"]
    assert "model, None" in lines["block_1/attention/output/kernel"]
    assert "replicated" in lines["block_1/attention_norm/scale"]
    for scope in (contextlib.nullcontext(), ExpertParallel(experts=4).scope()):
        with scope:
            loaded = build()
            loaded.load_weights(path)
        for mine, its in zip(model.trainable_weights, loaded.trainable_weights, strict=True):
            np.testing.assert_array_equal(its.numpy(), mine.numpy())


class TestRefusals:
    @pytest.mark.parametrize(
        ("bank", "mesh", "received"),
        [
            (
                lambda: keras_moe.FeedForwardExperts(6, 8),
                {"experts": 4},
                "`experts`.*experts=4.* 6 experts.*'moe'",
            ),
            (
                lambda: keras_moe.FeedForwardExperts(4, 9),
                {"experts": 4, "model": 2},
                "`model`.*model=2.*hidden_dim=9.*'moe'",
            ),
            (
                lambda: keras_moe.LayerExperts([keras.layers.Dense(DIM) for _ in range(4)]),
                {"experts": 4},
                "`experts`.*LayerExperts.*'moe'",
            ),
            (
                lambda: keras_moe.FeedForwardExperts(4, 8, activity_regularizer="l2", name="bank"),
                {"experts": 4},
                "`activity_regularizer`.*'bank'",
            ),
        ],
        ids=["experts", "hidden", "layers", "activity"],
    )
    def test_experts_that_devices_cannot_share(self, bank, mesh, received):
        layer = keras_moe.MixtureOfExperts(bank(), keras_moe.TopKRouter(2), name="moe")
        with ExpertParallel(**mesh).scope(), pytest.raises(ValueError, match=received):
            layer.build((None, 4, DIM))

    def test_model_made_outside(self):
        model = model_of(lambda: moe_layers({"top2": "sequence"}), attention=False)
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
        parallel = ExpertParallel(experts=8)
        with pytest.raises(ValueError, match="'moe_0/experts/kernel_in'.*1/8"):
            parallel.assert_sharded(model)
        with parallel.scope(), pytest.raises(ValueError, match="'moe_0/experts/kernel_in'.*1/8"):
            model.fit(*examples(), batch_size=16, verbose=0)
