"""Peak memory of a training step: a MoE layer beside the dense layer of the same active FLOPs.

    python -m benchmarks.memory                 three backends, about 3 minutes on 2 cores

A few steps of `model.fit` with Adam, each model in a process of its own; the peak of the resident
memory, less what the process held before the model was made. A sparse layer must hold its experts'
weights, gradients and two moments. "Beyond" is what it takes on top of those, relative to what the
dense layer takes on top of its own; "the layer's own" is what it takes on top of a model of the
experts' weights alone, since Keras' Adam makes temporaries of their size. Writes
`results/memory.json`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.processes import BACKENDS, RESULTS, measured, save

SIZES = {"tokens": 8192, "width": 512, "hidden": 2048, "experts": 32}
ALONE = "weights alone"
CONTESTANTS = ("dense", "switch", "expert choice", "dense of top-2", "top-2", ALONE)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--backend", choices=BACKENDS, help="default: one after another")
    for size, default in SIZES.items():
        parser.add_argument(f"--{size}", type=int, default=default)
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--measure", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    sizes = {name: getattr(options, name) for name in SIZES}
    for backend in [options.backend] if options.backend else BACKENDS:
        mebibytes = {
            name: measured("memory", backend, [*sys.argv[1:], "--measure", name])
            for name in CONTESTANTS
        }
        print_table(backend, mebibytes)
        save(options.into / "memory.json", sizes, backend, {"mebibytes": mebibytes})


def measure(options):
    """MiB at the peak, and of the weights with their gradients and moments."""
    import keras
    import numpy as np

    import keras_moe
    from benchmarks import contestants as c
    from benchmarks.timing import framed, token_numbers, token_table

    experts, hidden = options.experts, options.hidden
    layer = {
        "dense": lambda: c.Dense(hidden, False),
        "dense of top-2": lambda: c.Dense(2 * hidden, False),
        "switch": lambda: c.moe(
            keras_moe.SwitchRouter(capacity_factor=1.0), experts, hidden, False
        ),
        "expert choice": lambda: c.moe(
            keras_moe.ExpertChoiceRouter(capacity_factor=1.0), experts, hidden, False
        ),
        "top-2": lambda: c.moe(keras_moe.TopKRouter(2), experts, hidden, False),
        ALONE: lambda: c.WeightsAlone(experts, hidden),
    }[options.measure]()
    warm = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    warm.compile("adam", "mse")
    warm.fit(np.ones((4, 4)), np.ones((4, 4)), verbose=0)  # the backend's own buffers
    tokens = 64 if options.measure == ALONE else options.tokens
    numbers = np.concatenate([token_numbers(tokens)] * 2)
    targets, table = np.ones(numbers.shape, "float32"), token_table(options.width)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak so far is forgotten
    before = peak()
    model = framed(layer, table, numbers.shape[1])
    model.compile("adam", "mse")
    model.fit(numbers, targets, len(numbers) // 2, verbose=0)
    weights = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    return {"peak": peak() - before, "weights": 4 * 4 * weights / 2**20}


def peak():
    """MiB; `getrusage` would do, but a process inherits that figure from the one that starts it."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def print_table(backend, results):
    print(f"\n{backend}: MiB at the peak of a training step")
    print("| | peak | weights, gradients, moments | beyond | the layer's own |")
    print("|---|---|---|---|---|")
    for name, figures in results.items():
        base = results["dense of top-2" if "top-2" in name else "dense"]
        dense = base["peak"] - base["weights"]
        beyond = (figures["peak"] - figures["weights"]) / dense
        own = beyond if "dense" in name else (figures["peak"] - results[ALONE]["peak"]) / dense
        numbers = f"{figures['peak']:.0f} | {figures['weights']:.0f} | {beyond:.2f} | {own:.2f}"
        print(f"| {name} | {numbers} |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
