"""What a whole sparse model of the zoo costs against its dense twin: steps of fit, and inference.

    python -m benchmarks.model                  three backends, about 4 minutes on 2 cores

The twins have the same active FLOPs; every other feed-forward layer of the sparse ones is a mixture
of 8 experts. Medians of ratios within a round, with quartiles; writes `results/model.json`.
"""

import argparse
import json
import sys
import time

from benchmarks.processes import BACKENDS, RESULTS, measured
from benchmarks.timing import StepTimes, interleaved, ratio


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model")
    parser.add_argument("--backend", choices=BACKENDS, help="default: one after another")
    parser.add_argument("--size", default="mini")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    results = {}
    for backend in [options.backend] if options.backend else BACKENDS:
        results[backend] = measured("model", backend, [*sys.argv[1:], "--measure"])
        print(f"\n{backend}: relative to the dense twin")
        for what in ("step", "inference"):
            for name in ("switch", "expert_choice"):
                low, middle, high = ratio(results[backend], f"{name} {what}", f"dense {what}")
                print(f"  {name:<14} {what:<10} {middle:.2f} ({low:.2f}-{high:.2f})", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "model.json").write_text(json.dumps(results, indent=1) + "\n")


def measure(options):
    import numpy as np

    import zoo

    rng = np.random.default_rng(0)
    shape = (options.batch, options.length)
    x = {
        "token_ids": rng.integers(3, 8000, shape).astype("int32"),
        "padding_mask": np.ones(shape, "int32"),
    }
    y = rng.integers(0, 2, options.batch)
    sparse = {"size": options.size, "num_experts": options.experts}
    backbones = {
        "dense": zoo.dense_transformer(size=options.size),
        "switch": zoo.switch_transformer(**sparse),
        "expert_choice": zoo.expert_choice_transformer(**sparse),
    }
    steps = {}
    for name, backbone in backbones.items():
        classifier = zoo.EncoderTextClassifier(backbone, 2)
        steps |= of_model(name, classifier, x, y)
    return interleaved(steps, options.rounds)


def of_model(name, classifier, x, y, steps=3):
    import keras
    import numpy as np

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
