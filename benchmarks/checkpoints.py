"""Loading a checkpoint of transformers against reading its bytes, and generation against its own.

    python -m benchmarks.checkpoints            three backends, about 6 minutes on 2 cores

A Switch Transformer of google/switch-base-8's shape with random weights, which transformers makes
(2.4 GB in `--folder`, kept for the next time). Loading: seconds, and how far the memory rises, over
the bytes of the files. Generation: 64 tokens, greedily, from 64 tokens, batch 1. Medians of the
ratios within a round, with quartiles; writes `results/checkpoints.json`.
"""

import argparse
import gc
import json
import sys
import threading
import time
from pathlib import Path

from benchmarks.processes import BACKENDS, RESULTS, measured, save
from benchmarks.tables import cell, ratio

BASE_8 = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "num_experts": 8}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints")
    parser.add_argument("--backend", choices=BACKENDS, help="default: one after another")
    parser.add_argument("--folder", type=Path, default=Path("runs", "checkpoint"))
    for name, default in BASE_8.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    make(options)
    sizes = {name: getattr(options, name) for name in (*BASE_8, "tokens")}
    print("| | seconds of loading / of reading | memory / bytes | generation / transformers' |")
    print("|---|---|---|---|")
    for backend in [options.backend] if options.backend else BACKENDS:
        figures = measured("checkpoints", backend, [*sys.argv[1:], "--measure"])
        cells = [
            cell(ratio(figures, "load", "read")),
            f"{figures['memory'] / figures['bytes']:.2f}",
            cell(ratio(figures, "ours", "transformers")),
        ]
        print(f"| {backend} | " + " | ".join(cells) + " |", flush=True)
        save(options.into / "checkpoints.json", sizes, backend, figures)


def make(options):
    """Makes the checkpoint, unless one of this shape is there."""
    import torch
    import transformers

    shape = {name: getattr(options, name) for name in BASE_8}
    half = options.num_layers // 2
    config = transformers.SwitchTransformersConfig(
        **shape,
        num_decoder_layers=options.num_layers,
        num_sparse_encoder_layers=half,
        num_sparse_decoder_layers=half,
        decoder_start_token_id=0,
    )
    path = options.folder / "config.json"
    if path.is_file():
        there = json.loads(path.read_text())
        if all(there.get(name) == value for name, value in shape.items()):
            return
    torch.manual_seed(0)
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    model.save_pretrained(options.folder, max_shard_size="1GB")


def measure(options):
    files = sorted(options.folder.glob("*.safetensors"))
    figures = {"bytes": sum(file.stat().st_size for file in files)}
    return {**figures, **loading(options, files), **generation(options)}


def loading(options, files):
    from zoo import load_transformers  # which loads Keras, before memory is looked at

    def read():
        return [file.read_bytes() for file in files]

    def load():
        return load_transformers(options.folder)

    with Peak() as peak:  # of the first one, with what Keras makes once
        load()
    gc.collect()
    figures = {"memory": peak.bytes}
    return figures | timed({"read": read, "load": load}, options.rounds)


def generation(options):
    import numpy as np
    import torch
    import transformers

    import zoo

    ids = np.random.default_rng(0).integers(2, 1000, (1, options.tokens))
    theirs = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(options.folder)
    theirs.eval()
    ours = zoo.load_transformers(options.folder)
    ours.compile(sampler="greedy")
    given = np.arange(options.tokens + 1)[None] == 0
    inputs = {
        "encoder_token_ids": ids,
        "encoder_padding_mask": np.ones_like(ids),
        "decoder_token_ids": np.zeros_like(given, "int32"),
        "decoder_padding_mask": given.astype("int32"),
    }

    def by_transformers():
        tokens = theirs.generate(
            input_ids=torch.tensor(ids),
            min_new_tokens=options.tokens,
            max_new_tokens=options.tokens,
            do_sample=False,
            eos_token_id=None,
        )
        return tokens.numpy()

    def by_us():
        return np.asarray(ours.generate(inputs, stop_token_ids=None)["decoder_token_ids"])

    if not np.array_equal(by_us(), by_transformers()):  # which also compiles
        raise RuntimeError("The two say different things")
    return timed({"transformers": by_transformers, "ours": by_us}, options.rounds)


def timed(functions, rounds):
    """Name -> seconds of each round; the functions take turns."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            result = function()
            seconds[name].append(time.perf_counter() - start)
            del result
            gc.collect()
    return seconds


class Peak:
    """How far the memory of this process rises within, in bytes, looked at every 5 ms."""

    def __enter__(self):
        self._before, self.bytes, self._done = _memory(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, _memory() - self._before)


def _memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


if __name__ == "__main__":
    main()
