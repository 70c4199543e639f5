"""What needs several devices: `python -m tests.keras_moe.distribution.jax_checks NAME` prints JSON.

JAX counts its devices when it starts, so a process of its own has eight that share one CPU.
"""

import contextlib
import itertools
import json
import re
import sys
import tempfile

import jax
import keras
import numpy as np

import keras_moe
from keras_moe.distribution import ExpertParallel
from tests.keras_moe.distribution.several import MESH

DIM, LENGTH, EXPERTS, HIDDEN = 16, 8, 8, 32
ROUTERS = {
    "switch": [
        lambda: keras_moe.SwitchRouter(jitter=0.1, min_capacity=1, seed=1),
        lambda: keras_moe.SwitchRouter(exploration="argmax", min_capacity=1),
        lambda: keras_moe.SwitchRouter(
            capacity_factor=None, eval_capacity_factor=None, exploration="argmax"
        ),
    ],
    "top2": [
        lambda: keras_moe.TopKRouter(2, capacity_factor=1.25, min_capacity=1, router_z_weight=0.1),
        lambda: keras_moe.TopKRouter(
            2, capacity_factor=1.0, eval_capacity_factor=2.0, min_capacity=1, priority="probability"
        ),
        lambda: keras_moe.TopKRouter(2),
    ],
    "choice": [
        lambda: keras_moe.ExpertChoiceRouter(max_experts_per_token=3),
        lambda: keras_moe.ExpertChoiceRouter(),
        lambda: keras_moe.ExpertChoiceRouter(inference="threshold", router_z_weight=0.1),
    ],
}
GROUPS = ("sequence", "batch", "sequence")


def no_devices():
    return contextlib.nullcontext()


def model_of(routers, groups=GROUPS, dim=DIM, length=LENGTH, **options):
    """Attention, and a mixture for every router."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((length, dim))
    x = keras.layers.Dense(dim)(inputs)
    x = x + keras.layers.MultiHeadAttention(2, 8, name="attention")(x, x)
    for number, (router, group) in enumerate(zip(routers, groups, strict=True)):
        kind = {"use_bias": True, "gated": number == 1, **options}
        experts = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN, seed=number, **kind)
        layer = keras_moe.MixtureOfExperts(experts, router(), group, name=f"moe_{number}")
        x = x + layer(x)
    return keras.Model(inputs, keras.layers.Dense(4)(x))


def examples(number=16, length=LENGTH, dim=DIM):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(number, length, size)).astype("float32") for size in (dim, 4))
    return x, y


def run(model, x, y, steps=20, batch_size=16, predicts=False):
    """A run of `steps` epochs, and what Keras makes of the model afterwards."""
    model.compile(keras.optimizers.Adam(1e-2), "mse", metrics=["mae"])
    figures = [keras_moe.callbacks.RoutingMetrics()]
    options = {"batch_size": batch_size, "verbose": 0}
    fit = model.fit(x, y, epochs=steps, shuffle=False, callbacks=figures, **options)
    auxiliary, _ = model.evaluate(x, y, sample_weight=np.zeros(y.shape[:2]), **options)
    evaluated, mae = model.evaluate(x, y, sample_weight=np.ones(y.shape[:2]), **options)
    return {
        "losses": fit.history["loss"],
        "figures": {k: v[0] for k, v in fit.history.items() if k != "loss"},
        "auxiliary": auxiliary,
        "evaluated": evaluated,
        "mae": mae,
        "predicted": model.predict(x, **options).tolist() if predicts else None,
    }


def curves():
    """Of every kind the same run on one device and on eight, and where the shards then are."""
    x, y = examples()
    result = {}
    for kind, routers in ROUTERS.items():
        one = run(model_of(routers), x, y)
        with ExpertParallel(**MESH).scope():
            model = model_of(routers)
            result[kind] = {"one": one, "many": run(model, x, y), "shards": shards(model)}
    return result


def shards(model):
    """Bytes of every expert weight and moment, in all and on each device."""
    found = {}
    for variable in [*model.trainable_variables, *model.optimizer.variables]:
        if re.search("experts[/_](kernel|bias)", variable.path):
            value = variable.value
            local = [shard.data.nbytes for shard in value.addressable_shards]
            found[variable.path] = (value.nbytes, min(local), max(local))
    return found


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
    from keras.src.backend.jax.trainer import _distribute_data

    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model._symbolic_build(data_batch=(x, y))
    names = ("trainable", "non_trainable", "optimizer", "metrics")
    state = model._get_jax_state(**{f"{name}_variables": True for name in names})
    step = jax.jit(model.train_step, out_shardings=(None, model._get_state_sharding_spec()))
    return step.lower(state, _distribute_data((x, y))).compile().as_text()


def traffic():
    """Bytes of the collectives of a train step with 16 and with 32 sequences."""
    routers = [
        lambda: keras_moe.SwitchRouter(),
        lambda: keras_moe.TopKRouter(2, capacity_factor=1.25, router_z_weight=0.1),
        lambda: keras_moe.ExpertChoiceRouter(),
    ]
    result = {}
    with ExpertParallel(data=1, experts=8).scope():
        for batch in (16, 32):
            model = model_of(routers, ["sequence"] * 3, dim=64, length=32)
            result[batch] = collectives(compiled_step(model, *examples(batch, 32, 64)))
    return result


def rest_of_an_epoch():
    """Ten examples in batches of eight: two are left, which eight devices cannot share."""
    x, y = examples(10)
    result = []
    for scope in (no_devices(), ExpertParallel(experts=8).scope()):
        with scope:
            model = model_of(ROUTERS["top2"][::2], ["sequence", "batch"])
            result.append(run(model, x, y, steps=3, batch_size=8, predicts=True))
    return result


def other_banks():
    """Linear experts, soft routing, shared and recomputed experts, groups across sequences."""

    def build():
        keras.utils.set_random_seed(0)
        with keras.RematScope("full"):
            recomputed = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN, seed=1)
        layers = [
            keras_moe.MixtureOfExperts(
                keras_moe.LinearExperts(EXPERTS, DIM, seed=0),
                keras_moe.TopKRouter(2, capacity_factor=1.25),
                name="linear",
            ),
            keras_moe.MixtureOfExperts(
                recomputed,
                keras_moe.SwitchRouter(reroutes=1, min_capacity=1, exploration="argmax"),
                group=16,
                shared=keras_moe.FeedForwardExperts(1, HIDDEN, seed=2, name="shared"),
                name="recomputed",
            ),
            keras_moe.SoftMoE(keras_moe.FeedForwardExperts(EXPERTS, HIDDEN, seed=3), 2),
        ]
        x = inputs = keras.Input((LENGTH, DIM))
        for layer in layers:
            x = x + layer(x)
        return keras.Model(inputs, keras.layers.Dense(4)(x))

    result = []
    x, y = examples(18)  # the last 2 are too few for 4 devices
    for scope in (no_devices(), ExpertParallel(data=2, experts=2, model=2).scope()):
        with scope:
            model = build()
            model.compile(keras.optimizers.Adam(1e-2), "mse")
            fit = model.fit(x, y, batch_size=16, epochs=3, verbose=0, shuffle=False)
        result.append(fit.history["loss"])
    return {"losses": result, "shards": shards(model)}


def in_bfloat16():
    """The largest difference of outputs in bfloat16, relative to them, with and without drops."""
    x = examples()[0]
    result = []
    for factor, mesh in itertools.product((1.25, None), (MESH, {"data": 1, "experts": 8})):
        outputs = []
        for scope in (no_devices(), ExpertParallel(**mesh).scope()):
            with scope:
                experts = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN, seed=0, dtype="bfloat16")
                keras.utils.set_random_seed(0)
                router = keras_moe.TopKRouter(2, capacity_factor=factor)
                layer = keras_moe.MixtureOfExperts(experts, router, dtype="mixed_bfloat16")
                model = keras.Sequential([keras.Input(x.shape[1:]), layer])
                y = model.predict(x, batch_size=len(x), verbose=0)
                outputs.append(y.astype("float32"))
        result.append(float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[0]).max()))
    return {"differences": result, "dtype": str(y.dtype)}


def batch_by_batch():
    """`train_on_batch`, `test_on_batch` and `predict_on_batch`, on more data than experts."""
    x, y = examples()
    result = []
    for scope in (no_devices(), ExpertParallel(data=4, experts=2).scope()):
        with scope:
            model = model_of(ROUTERS["top2"][:1], ["sequence"])
            model.compile(keras.optimizers.Adam(1e-2), "mse")
            losses = [float(model.train_on_batch(x, y)) for _ in range(3)]
            losses.append(float(model.test_on_batch(x, y)))
            result.append([*losses, *np.asarray(model.predict_on_batch(x))[:, 0, 0].tolist()])
    return result


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


def late():
    """Experts made late, with dropout, and moments in factors."""
    x, y = examples()
    parallel = ExpertParallel(data=2, experts=4)
    with parallel.scope():
        model = Late()
        model.compile(keras_moe.optimizers.Adafactor(0.05), "mse")
        fit = model.fit(x, y, batch_size=16, epochs=5, verbose=0)
        table = parallel.describe(model)
    return {"losses": fit.history["loss"], "shards": shards(model), "table": table}


def dropped_units():
    """What each device's experts, all alike, make of the same tokens with dropout."""
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
    return np.asarray(y[..., 0]).ravel().tolist()


def language_model():
    """A decoder of the zoo, trained and saved on eight devices, used on others."""
    import zoo

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
        fit = model.fit(x, y, batch_size=8, epochs=10, verbose=0)
        written = model.generate(prompt, stop_token_ids=None)["token_ids"]
        return {"losses": fit.history["loss"], "written": np.asarray(written).tolist()}

    result = {"one": use(build())}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.weights.h5"
        parallel = ExpertParallel(data=2, experts=2, model=2)
        with parallel.scope():
            model = build()
            result["many"] = use(model)
            result["table"] = parallel.describe(model)
            model.save_weights(path)
            before = model.predict(x, verbose=0)
        differences = []
        for scope in (no_devices(), ExpertParallel(experts=4).scope()):
            with scope:
                model = build()
                model.load_weights(path)
                differences.append(float(np.abs(model.predict(x, verbose=0) - before).max()))
    return {**result, "reloaded": differences}


def refusals():
    """What is said where the devices cannot share the experts."""

    def said(function):
        try:
            function()
        except ValueError as error:
            return str(error)

    def build(bank, **mesh):
        layer = keras_moe.MixtureOfExperts(bank, keras_moe.TopKRouter(2), name="moe")
        with ExpertParallel(**mesh).scope():
            layer.build((None, 4, DIM))

    layers = [keras.layers.Dense(DIM) for _ in range(4)]
    regularized = keras_moe.FeedForwardExperts(4, 8, activity_regularizer="l2", name="bank")
    model = model_of(ROUTERS["top2"][:1], ["sequence"])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    parallel = ExpertParallel(experts=8)

    def fit():
        with parallel.scope():
            model.fit(*examples(), batch_size=16, verbose=0)

    return {
        "mesh": said(lambda: ExpertParallel(data=2, experts=8)),
        "experts": said(lambda: build(keras_moe.FeedForwardExperts(6, 8), experts=4)),
        "hidden": said(lambda: build(keras_moe.FeedForwardExperts(4, 9), experts=4, model=2)),
        "layers": said(lambda: build(keras_moe.LayerExperts(layers), experts=4)),
        "activity": said(lambda: build(regularized, experts=4)),
        "idle": said(lambda: ExpertParallel(experts=3)),
        "outside": said(lambda: parallel.assert_sharded(model)),
        "fitted": said(fit),
        "devices": [ExpertParallel(experts=2, model=2).data, len(ExpertParallel(1, 3).devices)],
    }


def details():
    """All that is small."""
    checks = (
        rest_of_an_epoch,
        other_banks,
        in_bfloat16,
        batch_by_batch,
        late,
        dropped_units,
        refusals,
    )
    return {check.__name__: check() for check in checks}


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print(json.dumps(globals()[name](*arguments)))
