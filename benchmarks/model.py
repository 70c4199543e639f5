"""What a whole sparse model of the zoo costs against its dense twin: steps of fit, and inference.

    python -m benchmarks.model                  three backends, about 4 minutes on 2 cores

The twins have the same active FLOPs; every other feed-forward layer of the sparse ones is a mixture
of 8 experts. Medians of ratios within a round, with quartiles; writes `results/model.json`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from benchmarks.processes import BACKENDS, RESULTS, measured, save
from benchmarks.tables import cell, ratio

SIZES = {"experts": 8, "batch": 32, "length": 128}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model")
    parser.add_argument("--backend", choices=BACKENDS, help="default: one after another")
    parser.add_argument("--size", default="mini")
    for size, default in SIZES.items():
        parser.add_argument(f"--{size}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    sizes = {name: getattr(options, name) for name in ("size", *SIZES)}
    for backend in [options.backend] if options.backend else BACKENDS:
        seconds = measured("model", backend, [*sys.argv[1:], "--measure"])
        print(f"\n{backend}: relative to the dense twin\n\n| | step | inference |\n|---|---|---|")
        for name in ("switch", "expert_choice"):
            cells = [
                cell(ratio(seconds, f"{name} {what}", f"dense {what}"))
                for what in ("step", "inference")
            ]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        figures = {"rounds": options.rounds, "seconds": seconds}
        save(options.into / "model.json", sizes, backend, figures)


def measure(options):
    import numpy as np

    import zoo
    from benchmarks.timing import interleaved

    rng = np.random.default_rng(0)
    size = (options.batch, options.length)
    x = {
        "token_ids": rng.integers(3, 8000, size).astype("int32"),
        "padding_mask": np.ones(size, "int32"),
    }
    y = rng.integers(0, 2, options.batch)
    shape = {"size": options.size, "vocabulary_size": 8192, "architecture": "encoder"}
    sparse = {**shape, "num_experts": options.experts}
    backbones = {
        "dense": zoo.dense_transformer(**shape),
        "switch": zoo.switch_transformer(**sparse),
        "expert_choice": zoo.expert_choice_transformer(**sparse),
    }
    steps = {}
    for name, backbone in backbones.items():
        classifier = zoo.EncoderTextClassifier(backbone, 2)
        steps |= of_model(name, classifier, x, y)
    return interleaved(steps, options.rounds)


def of_model(name, classifier, x, y, steps=3):
    """Two functions that return seconds: the fastest step of a short `fit`, and one inference."""
    import keras
    import numpy as np

    from benchmarks.timing import StepTimes

    model = keras.Model(classifier.input, classifier.output)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    repeated = {key: np.concatenate([value] * steps) for key, value in x.items()}
    labels, times = np.concatenate([y] * steps), StepTimes()

    def step():
        model.fit(repeated, labels, len(y), verbose=0, shuffle=False, callbacks=[times])
        return float(np.min(np.diff(times.ends)))

    def inference():
        start = time.perf_counter()
        model.predict_on_batch(x)
        return time.perf_counter() - start

    return {f"{name} step": step, f"{name} inference": inference}


if __name__ == "__main__":
    main()
