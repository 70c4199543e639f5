"""Who takes part in each suite of `benchmarks.layer`, and the rounds themselves."""

import keras
import numpy as np

import keras_moe
from benchmarks import contestants as c
from benchmarks.timing import fit_step, inference_step, interleaved


def measure(suite, sizes, rounds):
    """Seconds of every round: "name/number of experts" -> list."""
    if suite == "gpu":
        keras.config.set_dtype_policy("mixed_bfloat16")
    # Numbers of experts take turns where they are compared; to train all at once takes much memory.
    groups = [sizes.experts] if suite == "generation" else [[n] for n in sizes.experts]
    seconds = {}
    for group in groups:
        keras.utils.set_random_seed(0)
        steps = {f"{name}/{n}": s for n in group for name, s in SUITES[suite](sizes, n).items()}
        seconds |= interleaved(steps, rounds)
        del steps
        keras.backend.clear_session()
    return seconds


def switch():
    return keras_moe.SwitchRouter(capacity_factor=1.0)


def step(sizes, num_experts):
    tokens, width, hidden, k = sizes.tokens, sizes.width, sizes.hidden, sizes.k
    routers = {
        "switch": switch(),
        "expert choice": keras_moe.ExpertChoiceRouter(capacity_factor=1.0),
        f"top-{k}": keras_moe.TopKRouter(k),
    }
    bare = [c.Bare(num_experts, hidden, False, dropless) for dropless in (False, True)]
    return {
        "dense": fit_step(c.Dense(hidden, False), tokens, width),
        f"dense of top-{k}": fit_step(c.Dense(k * hidden, False), tokens, width),
        "switch, bare": fit_step(bare[0], tokens, width),
        f"top-{k}, bare": fit_step(bare[1], k * tokens, width),
        **{
            name: fit_step(c.moe(router, num_experts, hidden, False), tokens, width)
            for name, router in routers.items()
        },
    }


def parts(sizes, num_experts):
    tokens, width, k = sizes.tokens, sizes.width, sizes.k
    layer_of = {"switch": (switch, 1), f"top-{k}": (lambda: keras_moe.TopKRouter(k), k)}
    steps = {}
    for name, (router, copies) in layer_of.items():
        slots = copies * tokens
        moe = c.moe(router(), num_experts, sizes.hidden, False)
        bare = c.Bare(num_experts, sizes.hidden, False, dropless=name != "switch")
        no_experts = c.mixture(c.NoExperts(num_experts), router())
        routing = [c.Routing(router(), num_experts, with_metrics) for with_metrics in (False, True)]
        steps |= {
            name: fit_step(moe, tokens, width),
            f"{name}, frame": fit_step(keras.layers.Identity(), tokens, width),
            f"{name}, bare": fit_step(bare, slots, width),
            f"{name}, frame of bare": fit_step(keras.layers.Identity(), slots, width),
            f"{name}, routing": fit_step(routing[0], tokens, width),
            f"{name}, routing and metrics": fit_step(routing[1], tokens, width),
            f"{name}, no experts": fit_step(no_experts, tokens, width),
        }
    return steps


def peers(sizes, num_experts):
    width, hidden = sizes.width, sizes.hidden
    layers = {
        "dense of top-2, gated": c.Dense(2 * hidden, True),
        "dense": c.Dense(hidden, False),
        "top-2, gated": c.moe(keras_moe.TopKRouter(2), num_experts, hidden, True),
        "switch": c.moe(switch(), num_experts, hidden, False),
        "KerasHub Mixtral": c.keras_hub_mixtral(num_experts, width, hidden, 2),
        "one-hot Switch": c.OneHot(num_experts, hidden, False),
    }
    if keras.backend.backend() == "torch":
        layers |= {
            f"transformers Mixtral, {kind}": c.transformers_mixtral(
                num_experts, width, hidden, 2, kind
            )
            for kind in ("grouped_mm", "eager")
        }
        layers["transformers Switch"] = c.transformers_switch(num_experts, width, hidden)
    return {name: fit_step(layer, sizes.tokens, width) for name, layer in layers.items()}


def generation(sizes, num_experts):
    steps = {}
    for number in (1, sizes.tokens):
        x = np.random.normal(size=(number, 1, sizes.width)).astype("float32")
        moe = c.moe(keras_moe.SwitchRouter(), num_experts, sizes.hidden, False)
        steps[f"dense, batch of {number}"] = inference_step(c.Dense(sizes.hidden, False), x)
        steps[f"switch, batch of {number}"] = inference_step(moe, x)
    return steps


def gpu(sizes, num_experts):
    tokens, width, hidden, k = sizes.tokens, sizes.width, sizes.hidden, sizes.k
    capacity = keras_moe.TopKRouter(k, capacity_factor=1.0)
    dropless = c.moe(keras_moe.TopKRouter(k), num_experts, hidden, False)
    return {
        f"dense of top-{k}": fit_step(c.Dense(k * hidden, False), tokens, width),
        f"top-{k}, bare": fit_step(c.Bare(num_experts, hidden, False, True), k * tokens, width),
        f"top-{k}": fit_step(dropless, tokens, width),
        f"top-{k}, capacity 1.0": fit_step(
            c.moe(capacity, num_experts, hidden, False), tokens, width
        ),
    }


SUITES = {"step": step, "parts": parts, "peers": peers, "generation": generation, "gpu": gpu}
