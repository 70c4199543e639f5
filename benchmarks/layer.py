"""What a layer costs against the dense layer of the same active FLOPs, and against its peers.

    python -m benchmarks.layer                  all but `gpu`, about 25 minutes on 2 cores
    python -m benchmarks.layer step             a `model.fit` step: dense, Switch, top-2 dropless,
                                                expert choice, and the bare products of each
    python -m benchmarks.layer peers            KerasHub, transformers, one-hot dispatch
    python -m benchmarks.layer generation       inference on 1 to 16 tokens
    python -m benchmarks.layer gpu              bfloat16 on a CUDA GPU, JAX and PyTorch
    python -m benchmarks.layer step --backend jax --tokens 2048 --width 256 --experts 8 512

All contestants of a suite take turns in one process; the figures are medians of the ratios within
a round, with their quartiles. Each suite prints a table and writes `results/<suite>.json`;
`step` also draws `results/step.png`.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.processes import BACKENDS, RESULTS, measured

# The sizes of each suite: tokens, width, hidden, experts, experts per token.
SUITES = {
    "step": {"tokens": 8192, "width": 512, "hidden": 2048, "experts": [8, 32, 128]},
    "peers": {"tokens": 1024, "width": 256, "hidden": 512, "experts": [8, 32, 128]},
    "generation": {"tokens": 16, "width": 512, "hidden": 2048, "experts": [8, 32, 128]},
    "gpu": {"tokens": 65536, "width": 2048, "hidden": 8192, "experts": [64]},
}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", help="default: step peers generation")
    parser.add_argument("--backend", choices=BACKENDS, help="default: one after another")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--experts", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--into", default=str(RESULTS), help="folder of the results")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for suite in options.suites:
        if suite not in SUITES:
            parser.error(f"`suites` must be of {', '.join(SUITES)}. Received: {suite}")
    if options.measure:
        print(json.dumps(measure(options)))
        return
    for suite in options.suites or ("step", "peers", "generation"):
        run_suite(suite, options)


def run_suite(suite, options):
    """Measures on every backend, each in a process of its own; prints, writes and draws."""
    given = {name: getattr(options, name) for name in SUITES[suite]}
    sizes = {**SUITES[suite], **{name: value for name, value in given.items() if value}}
    results = {"sizes": sizes, "rounds": options.rounds, "seconds": {}}
    backends = ("jax", "torch") if suite == "gpu" else BACKENDS
    for backend in [options.backend] if options.backend else backends:
        arguments = [suite, "--measure"]
        for name, value in {**sizes, "rounds": options.rounds}.items():
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        results["seconds"][backend] = measured("layer", backend, arguments)
        print_table(suite, backend, results["seconds"][backend])
    folder = Path(options.into)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{suite}.json").write_text(json.dumps(results, indent=1) + "\n")
    if suite == "step":
        plot(results, folder / "step.png")


def measure(options):
    """Seconds of every contestant and round, in this process: name -> list."""
    import keras
    import numpy as np

    from benchmarks.timing import interleaved

    (suite,) = options.suites
    if suite == "gpu":
        keras.config.set_dtype_policy("mixed_bfloat16")
    seconds = {}
    for num_experts in options.experts:  # a group of contestants at a time, or memory would not do
        steps = {"step": step, "peers": peers, "generation": generation, "gpu": gpu}[suite]
        contestants = steps(options, num_experts, np.random.default_rng(0))
        measured = interleaved(contestants, options.rounds)
        seconds |= {f"{name}/{num_experts}": times for name, times in measured.items()}
        keras.backend.clear_session()
    return seconds


def tokens(rng, options, number=None):
    number = number or options.tokens
    length = min(64, number)
    return rng.normal(size=(number // length, length, options.width)).astype("float32")


def step(options, num_experts, rng):
    import keras_moe
    from benchmarks import contestants as c
    from benchmarks.timing import fit_step

    x, hidden = tokens(rng, options), options.hidden
    routers = {
        "switch": keras_moe.SwitchRouter(capacity_factor=1.0),
        "expert choice": keras_moe.ExpertChoiceRouter(capacity_factor=1.0),
        "top-2": keras_moe.TopKRouter(2),
    }
    steps = {
        "dense": fit_step(c.Dense(hidden, False), x),
        "dense of top-2": fit_step(c.Dense(2 * hidden, False), x),
        "switch, bare": fit_step(c.Bare(num_experts, hidden, False, 1, False), x),
        "top-2, bare": fit_step(c.Bare(num_experts, hidden, False, 2, True), x),
    }
    for name, router in routers.items():
        steps[name] = fit_step(c.moe(router, num_experts, hidden, False), x)
    return steps


def peers(options, num_experts, rng):
    import keras

    import keras_moe
    from benchmarks import contestants as c
    from benchmarks.timing import fit_step

    x, width, hidden = tokens(rng, options), options.width, options.hidden
    steps = {
        "dense of top-2, gated": fit_step(c.Dense(2 * hidden, True), x),
        "dense": fit_step(c.Dense(hidden, False), x),
        "top-2, gated": fit_step(c.moe(keras_moe.TopKRouter(2), num_experts, hidden, True), x),
        "switch": fit_step(
            c.moe(keras_moe.SwitchRouter(capacity_factor=1.0), num_experts, hidden, False), x
        ),
        "KerasHub Mixtral": fit_step(c.keras_hub_mixtral(num_experts, width, hidden, 2), x),
        "one-hot Switch": fit_step(c.OneHot(num_experts, hidden, False), x),
    }
    if keras.backend.backend() == "torch":
        for kind in ("grouped_mm", "eager"):
            layer = c.transformers_mixtral(num_experts, width, hidden, 2, kind)
            steps[f"transformers Mixtral, {kind}"] = fit_step(layer, x)
        layer = c.transformers_switch(num_experts, width, hidden)
        steps["transformers Switch"] = fit_step(layer, x)
    return steps


def generation(options, num_experts, rng):
    import keras_moe
    from benchmarks import contestants as c
    from benchmarks.timing import predict_step

    steps = {}
    for number in (1, options.tokens):
        x = tokens(rng, options, number)
        dense = c.Dense(options.hidden, False)
        switch = c.moe(keras_moe.SwitchRouter(), num_experts, options.hidden, False)
        steps[f"dense, {number} tokens"] = predict_step(dense, x)
        steps[f"switch, {number} tokens"] = predict_step(switch, x)
    return steps


def gpu(options, num_experts, rng):
    import keras_moe
    from benchmarks import contestants as c
    from benchmarks.timing import fit_step

    x, hidden = tokens(rng, options), options.hidden
    capacity = keras_moe.TopKRouter(2, capacity_factor=1.0)
    return {
        "dense of top-2": fit_step(c.Dense(2 * hidden, False), x),
        "top-2, bare": fit_step(c.Bare(num_experts, hidden, False, 2, True), x),
        "top-2": fit_step(c.moe(keras_moe.TopKRouter(2), num_experts, hidden, False), x),
        "top-2, capacity 1.0": fit_step(c.moe(capacity, num_experts, hidden, False), x),
    }


def base_of(name):
    """The dense layer that a contestant is measured by."""
    if "tokens" in name:
        return "dense, " + name.partition(", ")[2]
    if "gated" in name or "Mixtral" in name:
        return "dense of top-2, gated"
    return "dense of top-2" if "top-2" in name else "dense"


def print_table(suite, backend, seconds):
    from benchmarks.timing import ratio

    names = list(dict.fromkeys(key.rpartition("/")[0] for key in seconds))
    experts = list(dict.fromkeys(key.rpartition("/")[2] for key in seconds))
    print(f"\n{suite}, {backend}: relative to the dense layer of the same active FLOPs")
    print("| |" + "".join(f" {n} experts |" for n in experts))
    print("|---|" + "---|" * len(experts))
    for name in names:
        if name != base_of(name):
            cells = []
            for n in experts:
                low, middle, high = ratio(seconds, f"{name}/{n}", f"{base_of(name)}/{n}")
                cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
            print(f"| {name} | " + " | ".join(cells) + " |")
    sys.stdout.flush()


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from benchmarks.timing import ratio

    experts = results["sizes"]["experts"]
    figure, panels = pyplot.subplots(
        1,
        len(results["seconds"]),
        figsize=(11, 3.6),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, (backend, seconds) in zip(panels[0], results["seconds"].items(), strict=True):
        for name in ("switch", "expert choice", "top-2", "switch, bare", "top-2, bare"):
            base = base_of(name)
            quartiles = [ratio(seconds, f"{name}/{n}", f"{base}/{n}") for n in experts]
            low, middle, high = zip(*quartiles, strict=True)
            style = "--" if "bare" in name else "-"
            (line,) = axes.plot(experts, middle, style, marker="o", markersize=4, label=name)
            axes.fill_between(experts, low, high, alpha=0.2, color=line.get_color())
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(title=backend, xlabel="experts", xscale="log", yscale="log")
        axes.set_xticks(experts, [str(n) for n in experts])
        axes.set_yticks([0.8, 1, 1.5, 2, 3], ["0.8", "1", "1.5", "2", "3"])
        axes.minorticks_off()
    panels[0][0].set_ylabel("step / dense of the same active FLOPs")
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
