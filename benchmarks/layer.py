"""What a layer costs against the dense layer of the same active FLOPs, and against its peers.

    python -m benchmarks.layer                  all but `gpu`, about an hour on 2 cores
    python -m benchmarks.layer step             a `model.fit` step: dense, Switch, top-k dropless,
                                                expert choice, and the bare products of each
    python -m benchmarks.layer parts            what of that step is routing, dispatch, metrics
    python -m benchmarks.layer peers            KerasHub, transformers, one-hot dispatch
    python -m benchmarks.layer generation       inference on 1 and 16 tokens
    python -m benchmarks.layer gpu              bfloat16 on a CUDA GPU, JAX and PyTorch
    python -m benchmarks.layer step --backend jax --tokens 2048 --width 256 --experts 8 512 --k 8

All contestants of a suite take turns in one process; the figures are medians of the ratios within
a round, with their quartiles. Each suite prints its tables and writes `results/<suite>.json`, where
a run with one `--backend` leaves the others' figures; `step` also draws `results/step.png`.
"""

import argparse
import json
from pathlib import Path

from benchmarks.processes import BACKENDS, RESULTS, measured, save
from benchmarks.tables import plot, print_tables

# k is experts per token of the top-k layers; the peers are compared with Mixtral, which has 2.
SIZES = {
    "step": {"tokens": 8192, "width": 512, "hidden": 2048, "k": 2, "experts": [8, 32, 128]},
    "parts": {"tokens": 8192, "width": 512, "hidden": 2048, "k": 2, "experts": [8, 32]},
    "peers": {"tokens": 1024, "width": 256, "hidden": 512, "experts": [8, 32, 128]},
    "generation": {"tokens": 16, "width": 512, "hidden": 2048, "experts": [8, 32, 128]},
    "gpu": {"tokens": 65536, "width": 2048, "hidden": 8192, "k": 2, "experts": [64]},
}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", help="default: all but gpu")
    parser.add_argument("--backend", choices=BACKENDS, help="default: one after another")
    for size in ("tokens", "width", "hidden", "k"):
        parser.add_argument(f"--{size}", type=int)
    parser.add_argument("--experts", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for suite in options.suites:
        if suite not in SIZES:
            parser.error(f"`suites` must be of {', '.join(SIZES)}. Received: {suite}")
    if options.measure:
        from benchmarks import suites

        print(json.dumps(suites.measure(*options.suites, options, options.rounds)))
        return
    for suite in options.suites or [suite for suite in SIZES if suite != "gpu"]:
        run_suite(suite, options)


def run_suite(suite, options):
    """Measures on every backend, each in a process of its own; prints, writes and draws."""
    sizes = {name: getattr(options, name) or size for name, size in SIZES[suite].items()}
    backends = ("jax", "torch") if suite == "gpu" else BACKENDS
    for backend in [options.backend] if options.backend else backends:
        arguments = [suite, "--measure"]
        for name, value in {**sizes, "rounds": options.rounds}.items():
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        seconds = measured("layer", backend, arguments)
        print_tables(suite, backend, seconds)
        figures = {"rounds": options.rounds, "seconds": seconds}
        results = save(options.into / f"{suite}.json", sizes, backend, figures)
    if suite == "step":
        plot(results, options.into / "step.png")


if __name__ == "__main__":
    main()
