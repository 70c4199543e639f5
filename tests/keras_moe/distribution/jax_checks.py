"""What needs several devices: `python -m tests.keras_moe.distribution.jax_checks NAME` prints JSON.

JAX counts its devices when it starts, so a process of its own has eight that share one CPU.
"""

import contextlib
import json
import re
import sys

import jax
import keras
import numpy as np

import keras_moe
from keras_moe.distribution import ExpertParallel

MESHES = (
    {"data": 2, "experts": 4},
    {"data": 1, "experts": 8},
    {"data": 2, "experts": 2, "model": 2},
)
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
        options = {"use_bias": True, "gated": number == 1, **options}
        experts = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN, seed=number, **options)
        layer = keras_moe.MixtureOfExperts(experts, router(), group, name=f"moe_{number}")
        x = x + layer(x)
    return keras.Model(inputs, keras.layers.Dense(4)(x))


def examples(number=16, length=LENGTH, dim=DIM):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(number, length, size)).astype("float32") for size in (dim, 4))
    return x, y


def run(model, x, y, steps=20, batch_size=16):
    """A run of `steps` epochs, and what Keras makes of the model afterwards."""
    model.compile(keras.optimizers.Adam(1e-2), "mse", metrics=["mae"])
    figures = [keras_moe.callbacks.RoutingMetrics()]
    options = {"batch_size": batch_size, "verbose": 0}
    fit = model.fit(x, y, epochs=steps, shuffle=False, callbacks=figures, **options)
    auxiliary, _ = model.evaluate(x, y, sample_weight=np.zeros(len(x)), **options)
    evaluated, mae = model.evaluate(x, y, sample_weight=np.ones(len(x)), **options)
    return {
        "losses": fit.history["loss"],
        "figures": {k: v[0] for k, v in fit.history.items() if k != "loss"},
        "auxiliary": auxiliary,
        "evaluated": evaluated,
        "mae": mae,
        "predicted": model.predict(x, **options).tolist(),
    }


def curves(kind):
    """The same run on one device and on every mesh, and the shards on the last."""
    x, y = examples()
    result = {"one": run(model_of(ROUTERS[kind]), x, y)}
    for mesh in MESHES:
        parallel = ExpertParallel(**mesh)
        with parallel.scope():
            model = model_of(ROUTERS[kind])
            result[str(mesh)] = run(model, x, y)
            result[str(mesh)]["shards"] = shards(model)
    return result


def shards(model):
    """Bytes of every expert weight and moment, in all and on each device."""
    found = {}
    for variable in [*model.trainable_variables, *model.optimizer.variables]:
        if "experts" in variable.path:
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


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print(json.dumps(globals()[name](*arguments)))
