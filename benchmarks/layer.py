"""What a MoE layer costs against the dense layer of the same active FLOPs, as experts grow.

    python -m benchmarks.layer                      all three backends, about 4 minutes on 2 cores
    python -m benchmarks.layer --backend jax --experts 8 64 256

One training step of one layer (forward, and gradients of inputs and weights, compiled where the
backend compiles) by every contestant in turn, again and again; the figures are medians of the
ratios within a round, with their quartiles, so that a machine whose speed drifts does not matter.
Writes `results/layer.json` and `results/layer.png` beside this file.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

BACKENDS = ("tensorflow", "jax", "torch")
RESULTS = Path(__file__).parent / "results"


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer")
    parser.add_argument("--backend", choices=BACKENDS, help="default: all three, one after another")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--router", choices=("switch", "top2", "expert_choice"), default="switch")
    parser.add_argument("--capacity", type=float, default=1.0, help="0: dropless")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.backend:
        os.environ["KERAS_BACKEND"] = options.backend
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        print(json.dumps(measure(options)))
        return
    results = {"settings": vars(options), "backends": {}}
    for backend in BACKENDS:
        command = [sys.executable, "-m", "benchmarks.layer", *sys.argv[1:], "--backend", backend]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results["backends"][backend] = json.loads(output.splitlines()[-1])
        print_table(backend, results["backends"][backend])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "layer.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, RESULTS / "layer.png")


def measure(options):
    """Seconds per step of every contestant and round: name -> list."""
    import keras
    import numpy as np

    import keras_moe

    factor = options.capacity or None

    def sparse(num_experts):
        router = {
            "switch": lambda: keras_moe.SwitchRouter(capacity_factor=factor),
            "top2": lambda: keras_moe.TopKRouter(2, capacity_factor=factor),
            "expert_choice": lambda: keras_moe.ExpertChoiceRouter(capacity_factor=factor or 1.0),
        }[options.router]()
        experts = keras_moe.FeedForwardExperts(num_experts, options.hidden)
        return keras_moe.MixtureOfExperts(experts, router, group="batch")

    active = {"switch": 1, "top2": 2, "expert_choice": factor or 1.0}[options.router]
    dense = keras.Sequential(
        [
            keras.layers.Dense(round(options.hidden * active), "relu", use_bias=False),
            keras.layers.Dense(options.width, use_bias=False),
        ]
    )
    x = np.random.default_rng(0).normal(size=(options.tokens // 64, 64, options.width))
    layers = {"dense": dense} | {str(n): sparse(n) for n in options.experts}
    steps = {name: training_step(layer, x.astype("float32")) for name, layer in layers.items()}
    for step in steps.values():
        step(), step()
    seconds = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def training_step(layer, x):
    """A function that runs forward and backward once and waits for the end."""
    import keras
    from keras import ops

    layer(x)
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def loss(weights, x, others):
            y, others, losses = layer.stateless_call(
                weights, others, x, training=True, return_losses=True
            )
            return ops.sum(y * y) + sum(losses), others

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        weights = [v.value for v in layer.trainable_variables]
        others = [v.value for v in layer.non_trainable_variables]
        x = jax.numpy.asarray(x)
        return lambda: jax.block_until_ready(gradient(weights, x, others))
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def gradient(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
                loss = tf.reduce_sum(y * y) + sum(layer.losses)
            return tape.gradient(loss, [x, *[v.value for v in layer.trainable_variables]])

        x = tf.constant(x)
        return lambda: [tensor.numpy() for tensor in gradient(x)][:0]

    import torch

    x = torch.tensor(x, requires_grad=True)

    def step():
        y = layer(x, training=True)
        loss = (y * y).sum() + sum(layer.losses)
        return torch.autograd.grad(loss, [x, *[v.value for v in layer.trainable_variables]])

    return step


def ratios(seconds, name, base):
    """Quartiles of one contestant's time relative to another's, round by round."""
    import numpy as np

    return np.percentile(np.array(seconds[name]) / np.array(seconds[base]), (25, 50, 75))


def print_table(backend, seconds):
    names = [name for name in seconds if name != "dense"]
    print(f"\n{backend}: training step relative to the dense layer, and to {names[0]} experts")
    for name in names:
        dense, first = ratios(seconds, name, "dense"), ratios(seconds, name, names[0])
        print(
            f"  {name:>4} experts   {dense[1]:5.2f} ({dense[0]:.2f}-{dense[2]:.2f})"
            f"   {first[1]:5.2f} ({first[0]:.2f}-{first[2]:.2f})"
        )


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for backend, seconds in results["backends"].items():
        names = [name for name in seconds if name != "dense"]
        low, middle, high = zip(*(ratios(seconds, n, "dense") for n in names), strict=True)
        (line,) = axes.plot([int(n) for n in names], middle, marker="o", label=backend)
        axes.fill_between([int(n) for n in names], low, high, alpha=0.2, color=line.get_color())
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--", label="dense, same active FLOPs")
    axes.set(xlabel="experts", ylabel="training step / dense", xscale="log", ylim=(0, None))
    axes.set_xticks([int(n) for n in names], names)
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
