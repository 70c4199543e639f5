"""The shipped presets on GLUE and SuperGLUE: `zoo/RESULTS.md`, made by one command.

    python -m benchmarks.glue --data-dir tfds --train

fine-tunes the three twins from their pretrained weights on every task that `tfds` has (see
`python -m zoo prepare`), and from new weights on some; a run that was stopped goes on, and several
processes share the work, each fastest with a core of its own. On two CPU cores it is the work of a
day (a run on CoLA takes four minutes of a core, one on SST-2 up to a quarter of an hour); sixteen
processes on one H200 needed nine minutes, most of them to compile.
Without `--train` what there is in `--runs` is gathered. Either way the figures go into
`benchmarks/results/glue.json`, and the page and its picture are made of that file alone; `--page`
makes them again. What that file has is not done again: take out of it, and out of `--runs`, what a
change made wrong.
"""

import argparse
import functools
import json
from pathlib import Path

from benchmarks import bag_of_words
from benchmarks.claims import claimed
from benchmarks.glue_page import ASKED, write_page

HERE = Path(__file__).parent
KEPT = HERE / "results" / "glue.json"
TWINS = {
    "dense": "dense_mini_en",
    "switch": "switch_mini_en",
    "expert_choice": "expert_choice_mini_en",
}
SUITES = ("glue", "superglue")
# Of large tasks; of the others five.
SEEDS = {"sst2": 2, "qqp": 2, "mnli": 2, "qnli": 2, "boolq": 2, "multirc": 1, "record": 1}


def main():
    parser = parser_of_runs(__doc__)
    parser.add_argument("--page", action="store_true", help="only make the page again")
    options = parser.parse_args()
    from zoo.runs import replacing

    if options.train:
        train(options.runs, options.data_dir, _kept())
    if not options.page:
        with replacing(KEPT) as beside:
            beside.write_text(json.dumps(gathered(options.runs, _kept()), indent=1) + "\n")
    write_page(json.loads(KEPT.read_text()))


def parser_of_runs(doc):
    """A parser of what benchmarks that fine-tune are told, described by the first line of `doc`."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", help="TensorFlow Datasets folder")
    add("--runs", type=Path, default=Path("runs"), help="folder of all runs; default: runs")
    add("--train", action="store_true", help="do what has not been done yet")
    return parser


def _kept():
    return json.loads(KEPT.read_text()) if KEPT.is_file() else {}


def plan():
    """What is to be done: task, beginning, model and seed, what most depends on first."""
    from zoo.tasks import SUITES as TASKS

    every = [task for suite in SUITES for task in TASKS[suite]]
    others = [task for task in every if task not in ASKED]
    plan = [(task, "words", None, None) for task in every]
    for seed in range(max(map(_seeds, every))):
        for tasks, begin in ((ASKED, "pretrained"), (ASKED, "scratch"), (others, "pretrained")):
            for task in sorted(tasks, key=_seeds, reverse=True):
                if seed < _seeds(task):
                    plan += [(task, begin, model, seed) for model in TWINS]
    return plan


def _seeds(task):
    return SEEDS.get(task.rpartition("/")[2], 5)


def train(runs, data_dir, kept):
    """Does what is planned, but for what is kept and what another process is at."""
    for task, begin, model, seed in plan():
        name = task.replace("/", "-")
        with claimed(runs / "glue" / "lock", f"{task} {begin} {model} {seed}") as is_free:
            if not is_free or _is_kept(kept, task, begin, model, seed):
                continue
            if not _has_data(task, data_dir):
                continue
            if begin == "words":
                _baselines(task, data_dir, runs / "glue" / "words" / f"{name}.json")
            else:
                folder = runs / "glue" / f"{model}-{begin}" / f"{name}-{seed}"
                _finetune(task, begin, model, seed, data_dir, folder)


def _is_kept(kept, task, begin, model, seed):
    if begin == "words":
        return task in kept.get("words", {})
    entry = kept.get("scores", {}).get(task, {}).get(f"{model}-{begin}", {"runs": []})
    return any(run["seed"] == seed for run in entry["runs"])


@functools.cache
def _has_data(task, data_dir):
    from zoo.finetuning.suite import missing_data

    reason = missing_data(task, data_dir)
    if reason is not None:
        print(f"left out: {task}: {reason}", flush=True)
    return reason is None


def _finetune(task, begin, model, seed, data_dir, output):
    from zoo import finetune_suite

    finetune_suite(
        task,
        preset=TWINS[model],
        load_weights=begin == "pretrained",
        seeds=[seed],
        data_dir=data_dir,
        output=output,
        verbose=2,
    )


def _baselines(task, data_dir, path):
    from zoo.runs import replacing
    from zoo.tasks import get, validation_splits

    if path.is_file():
        return
    both = (("words", False), ("words and overlap", True))
    found = {name: bag_of_words.scores(get(task), data_dir, overlap) for name, overlap in both}
    found["partial"] = list(validation_splits(task, data_dir)[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(json.dumps({task: found}))


def gathered(runs, kept):
    """What the runs came to; what there is no run of stays as it was kept."""
    return {
        "pretraining": kept.get("pretraining", {}) | _pretraining(runs),
        "scores": _scores(runs, kept.get("scores", {})),
        "words": _words(runs, kept.get("words", {})),
    }


def _pretraining(runs):
    from zoo import figures
    from zoo.models.deferred import Deferred
    from zoo.pretraining.build import initial_backbone

    found = {}
    for name, preset in TWINS.items():
        path = runs / "pretraining" / name / "results.json"
        if path.is_file():
            results = json.loads(path.read_text())
            with Deferred():
                sizes = figures(initial_backbone(results["settings"], "encoder"))
            names = ("epoch", "seconds", "cross_entropy", "val_cross_entropy")
            found[preset] = {
                "settings": results["settings"],
                "finished": results["finished"],
                "figures": sizes._asdict(),
                "history": [[entry[name] for name in names] for entry in results["history"]],
            }
    return found


def _scores(runs, kept):
    """`scores[task][model and beginning]`: metrics, and of each seed the best and last epoch's."""
    for path in sorted(runs.glob("glue/*/*/summary.json")):
        for task, entry in json.loads(path.read_text())["tasks"].items():
            nothing = {"metrics": entry["metrics"], "partial": [], "runs": []}
            of_model = kept.setdefault(task, {}).setdefault(path.parts[-3], nothing)
            of_model["partial"] = sorted({*of_model["partial"], *entry["partial"]})
            by_seed = {run["seed"]: run for run in of_model["runs"]}
            for run in entry["runs"]:
                names = ("seed", "best", "last", "seconds")
                by_seed[run["seed"]] = {name: run[name] for name in names}
            of_model["runs"] = [by_seed[seed] for seed in sorted(by_seed)]
    return kept


def _words(runs, kept):
    """`words[task]`: the baselines with and without overlap, and which splits are partial."""
    for path in sorted(runs.glob("glue/words/*.json")):
        kept |= json.loads(path.read_text())
    return kept


if __name__ == "__main__":
    main()
