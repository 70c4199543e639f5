"""Rates of fine-tuning, tried on training data that is held out, see `zoo.recipes`.

    python -m benchmarks.recipes --data-dir tfds --train

tries the same rates, and ways to read two texts, for each of the three twins, one seed each. The
official validation sets have no part in it: up to a fifth of the training data, 1,000 examples at
most, is held out instead. A trial that was stopped goes on, and several processes share the work.
Without `--train` what there is in `--runs` is gathered into `benchmarks/results/recipes.json`;
either way the table of that file is printed. What that file has is not done again: take out of it,
and out of `--runs`, what new presets made wrong.
"""

import contextlib
import json
from pathlib import Path

import numpy as np

from benchmarks.claims import claimed
from benchmarks.glue import TWINS, parser_of_runs
from benchmarks.tables import markdown

KEPT = Path(__file__).parent / "results" / "recipes.json"
_LAST_LAYER = {"mix_layers": False}
# What is tried on each task, besides what its recipe has.
TRIALS = {
    "glue/cola": [{"learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3)],
    "glue/mrpc": [
        {"learning_rate": rate, **pairs, **_LAST_LAYER}
        for pairs in ({}, {"pairs": "together"})
        for rate in (5e-4, 1e-3)
    ],
    "glue/sst2": [{"max_examples": 16000, "learning_rate": rate} for rate in (1e-3, 2e-3)],
    "glue/stsb": [
        *({"learning_rate": rate, **_LAST_LAYER} for rate in (5e-4, 1e-3, 2e-3)),
        *({"learning_rate": rate} for rate in (1e-3, 2e-3)),
        {"expert_dropout": 0.1},
        {"expert_dropout": 0.1, "learning_rate": 2e-3},
        {"expert_dropout": 0.1, "learning_rate": 2e-3, "batch_size": 32, "train": "all"},
    ],
}
HELD_OUT = 1000


def main():
    options = parser_of_runs(__doc__).parse_args()
    from zoo.runs import replacing

    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    if options.train:
        train(options.runs / "recipes", options.data_dir, kept)
    kept |= gathered(options.runs / "recipes")
    with replacing(KEPT) as beside:
        beside.write_text(json.dumps(kept, indent=1) + "\n")
    print(table(kept))


def plan():
    """The trials: task, model, and what is tried."""
    return [
        (task, model, tried)
        for task in TRIALS
        for tried in TRIALS[task]
        for model in TWINS
        if model != "dense" or "expert_dropout" not in tried
    ]


def name(task, model, tried):
    """What a trial is called."""
    options = (f"{option}={value}" for option, value in tried.items())
    return "-".join([task.replace("/", "-"), model, *options])


def train(folder, data_dir, kept):
    """Does what is planned, but for what is kept and what another process is at."""
    import zoo

    with held_out():
        for trial in plan():
            task, model, tried = trial
            with claimed(folder / "lock", name(*trial)) as is_free:
                if is_free and name(*trial) not in kept:
                    zoo.finetune(
                        task,
                        preset=TWINS[model],
                        data_dir=data_dir,
                        output=folder / name(*trial),
                        verbose=2,
                        **tried,
                    )


@contextlib.contextmanager
def held_out():
    """In it a task's validation set is a part of its training data, which lacks that part."""
    from zoo.tasks import data

    original = data.features

    def features(task, split, data_dir=None):
        examples = original(task, "train", data_dir)
        order = np.random.default_rng(0).permutation(len(examples))
        held = min(HELD_OUT, len(examples) // 5)
        return [examples[n] for n in (order[held:] if split == "train" else order[:held])]

    data.features = features
    try:
        yield
    finally:
        data.features = original


def gathered(folder):
    """`gathered[name of a trial]`: the official metrics after each epoch."""
    found = {}
    for trial in plan():
        path = folder / name(*trial) / "results.json"
        results = json.loads(path.read_text()) if path.is_file() else {"finished": False}
        if results["finished"]:
            found[name(*trial)] = [
                {metric.removeprefix("val_"): epoch[metric] for metric in results["metrics"]}
                for epoch in results["history"]
            ]
    return found


def table(kept):
    """Of each trial's best epoch the metrics: a row for each task and what is tried there."""
    from zoo.tasks import get

    rows = {}
    for trial in plan():
        if epochs := kept.get(name(*trial)):
            task, model, tried = trial
            metrics = get(task).metrics
            best = max(epochs, key=lambda epoch: epoch[get(task).primary])
            what = ", ".join(f"{option} {value}" for option, value in tried.items())
            cells = rows.setdefault((task, ", ".join(metrics), what), {})
            cells[model] = ", ".join(f"{best[metric]:.3f}" for metric in metrics)
    header = ["task", "metrics", "tried", *TWINS]
    return markdown(
        header, [[*key, *(cells.get(model, "-") for model in TWINS)] for key, cells in rows.items()]
    )


if __name__ == "__main__":
    main()
