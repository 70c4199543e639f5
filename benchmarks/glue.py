"""The shipped presets on GLUE and SuperGLUE: `zoo/RESULTS.md`, made by one command.

    python -m benchmarks.glue --data-dir tfds --train

fine-tunes the three twins from their pretrained weights, and the same models from scratch, on every
task that `tfds` has (see `python -m zoo prepare`), some hours on two CPU cores; a run that was
stopped goes on. Without `--train` what there is in `--runs` is gathered. Either way the figures go
into `benchmarks/results/glue.json`, and the page and its picture are made of that file alone;
`--page` makes them again.
"""

import argparse
import json
from pathlib import Path

from benchmarks import bag_of_words
from benchmarks.glue_page import write_page

HERE = Path(__file__).parent
KEPT = HERE / "results" / "glue.json"
TWINS = {
    "dense": "dense_mini_en",
    "switch": "switch_mini_en",
    "expert_choice": "expert_choice_mini_en",
}
SUITES = ("glue", "superglue")
# Trained with five seeds; the others, which are large, with two.
SMALL = ("cola", "mrpc", "stsb", "rte", "wnli", "cb", "copa", "wic", "wsc")
# The twins from scratch are trained on these, which are asked about.
ASKED = ("glue/sst2", "glue/cola", "glue/mrpc", "glue/stsb", "glue/rte")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", help="TensorFlow Datasets folder")
    add("--runs", type=Path, default=Path("runs"), help="folder of all runs; default: runs")
    add("--train", action="store_true", help="do what has not been done yet")
    add("--page", action="store_true", help="only make the page again")
    options = parser.parse_args()
    if options.train:
        train(options.runs, options.data_dir)
    if not options.page:
        kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
        KEPT.write_text(json.dumps(gathered(options, kept), indent=1) + "\n")
    write_page(json.loads(KEPT.read_text()))


def train(runs, data_dir):
    """Fine-tunes all twins, from both beginnings."""
    from zoo import finetune_suite
    from zoo.tasks import SUITES as TASKS

    for suite in SUITES:
        for task in TASKS[suite]:
            seeds = 5 if task.rpartition("/")[2] in SMALL else 2
            for name, preset in TWINS.items():
                both = {"pretrained": {"preset": preset}}
                if task in ASKED:
                    both["scratch"] = {"model": name}
                for begin, options in both.items():
                    output = runs / "glue" / f"{name}-{begin}" / task.replace("/", "-")
                    try:
                        finetune_suite(
                            task,
                            seeds=seeds,
                            data_dir=data_dir,
                            output=output,
                            verbose=2,
                            **options,
                        )
                    except FileNotFoundError as error:
                        print(f"left out: {task}: {error}", flush=True)


def gathered(options, kept):
    """What the runs came to; what there is no run of stays as it was kept."""
    return {
        "pretraining": kept.get("pretraining", {}) | _pretraining(options.runs),
        "scores": _scores(options.runs, kept.get("scores", {})),
        "words": _words(options.data_dir, kept.get("words", {})),
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
            model = path.parts[-3]
            kept.setdefault(task, {})[model] = {
                "metrics": entry["metrics"],
                "runs": [
                    {name: run[name] for name in ("seed", "best", "last", "seconds")}
                    for run in entry["runs"]
                ],
            }
    return kept


def _words(data_dir, kept):
    """The baselines' scores on every task that the data is at hand for."""
    from zoo.tasks import SUITES as TASKS
    from zoo.tasks import get

    for task in (task for suite in SUITES for task in TASKS[suite]):
        if task not in kept and data_dir:
            try:
                kept[task] = {
                    name: bag_of_words.scores(get(task), data_dir, overlap)
                    for name, overlap in (("words", False), ("words and overlap", True))
                }
            except (FileNotFoundError, ValueError) as error:
                print(f"no baseline: {task}: {error}", flush=True)
    return kept


if __name__ == "__main__":
    main()
