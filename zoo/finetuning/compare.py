"""Summaries of fine-tuning beside each other: differences, and what chance makes of them."""

from pathlib import Path

import numpy as np

from zoo.extras import require
from zoo.files import read_json
from zoo.finetuning.summary import shown, spread, suite_score


def compare(*folders, epoch="best"):
    """Compares what `zoo.finetune_suite` came to for several models with the first of them.

    Per task it is the primary metric that is compared. Where two have the same seeds the test is a
    paired t-test over the seeds, else Welch's t-test, both two-sided. The p-values of one model's
    tasks are corrected after Holm (1979, https://www.jstor.org/stable/4615733). The average over
    the tasks that all have is a hypothesis of its own, and is not corrected. There is no p-value of
    one seed alone, nor where no seed makes a difference.

    A t-test over seeds says whether another seed would turn the difference around, on these same
    validation examples; not whether other examples would.

    Args:
        *folders: two or more, each with a `summary.json`.
        epoch: "best" on the validation data, or "last".

    Returns:
        Dictionary: `epoch`; `folders`, list of their names; `tasks`, name -> dictionary of
        `metric`, `partial` (whether the data is not the official one), `epochs` (of each folder the
        numbers of epochs that its runs have) and `models`; `average`, a list like `models`, `None`
        where there is no suite. In `models` each has `mean`, `sd`,
        `seeds`, and all but the first `difference`, `test` ("paired", "welch" or `None`), `p` and
        `p_holm`. `left_out` lists tasks that not all have.

    Raises:
        ValueError: if there are fewer than two folders, one has no summary, or they have no task in
            common.
        ImportError: if SciPy is missing.
    """
    if epoch not in ("best", "last"):
        raise ValueError(f"`epoch` must be 'best' or 'last'. Received: epoch={epoch!r}")
    if len(folders) < 2:
        raise ValueError(f"`folders` must be two or more. Received: {len(folders)}")
    summaries = [_summary(Path(folder)) for folder in folders]
    named = [name for summary in summaries for name in summary["tasks"]]
    common = [name for name in dict.fromkeys(named) if all(name in s["tasks"] for s in summaries)]
    if not common:
        raise ValueError(
            f"`folders` must have a task in common. Received: {', '.join(map(str, folders))}"
        )
    tasks = {}
    for name in common:
        metric = summaries[0]["tasks"][name]["metrics"][0]
        scores = [
            {run["seed"]: run[epoch][metric] for run in summary["tasks"][name]["runs"]}
            for summary in summaries
        ]
        entries = [summary["tasks"][name] for summary in summaries]
        tasks[name] = {
            "metric": metric,
            "partial": any(entry.get("partial") for entry in entries),
            "epochs": [sorted({run["epochs"] for run in entry["runs"]}) for entry in entries],
            "models": _models(scores),
        }
    for number in range(1, len(folders)):
        rows = [task["models"][number] for task in tasks.values()]
        for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
            row["p_holm"] = p
    return {
        "epoch": epoch,
        "folders": [str(folder) for folder in folders],
        "tasks": tasks,
        "average": _average(summaries, common, epoch),
        "left_out": [name for name in dict.fromkeys(named) if name not in common],
    }


def _summary(folder):
    path = folder / "summary.json"
    try:
        summary = read_json(path)
        summary["suite"]
        for task in summary["tasks"].values():
            task["metrics"][0]
            for run in task["runs"]:
                run["seed"], run["epochs"], run["best"], run["last"]
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            "`folders` must each have the `summary.json` that `finetune --seeds` writes, whole. "
            f"Received: {str(folder)!r}"
        ) from error
    return summary


def _average(summaries, tasks, epoch):
    """The comparison of the suite's average; `None` where there is none."""
    suite = summaries[0]["suite"]
    if suite is None:
        return None
    scores = [_averages(summary, tasks, epoch, suite) for summary in summaries]
    return _models(scores) if all(scores) else None


def _averages(summary, tasks, epoch, suite):
    """The average over tasks for each seed that all of them have."""
    runs = {name: {run["seed"]: run for run in summary["tasks"][name]["runs"]} for name in tasks}
    seeds = [seed for seed in runs[tasks[0]] if all(seed in each for each in runs.values())]
    return {
        seed: suite_score({name: runs[name][seed][epoch] for name in tasks}, suite)
        for seed in seeds
    }


def _models(scores):
    """One dictionary for each model; `scores` has seed -> score of each."""
    models = []
    for number, own in enumerate(scores):
        models.append({**spread(list(own.values())), "seeds": sorted(own)})
        if number > 0:
            test, p = significance(scores[0], own)
            difference = models[-1]["mean"] - models[0]["mean"]
            models[-1] |= {"difference": difference, "test": test, "p": p}
    return models


def significance(ones, others):
    """Whether two models differ by more than their seeds do.

    Args:
        ones: seed -> score of one model.
        others: likewise of another.

    Returns:
        Pair of the test, "paired" or "welch", and its two-sided p-value; `(None, None)` if there
        are less than two seeds of either, or nothing varies.
    """
    if min(len(ones), len(others)) < 2:
        return None, None
    stats = require("scipy.stats")
    if ones.keys() == others.keys():
        pairs = np.array([(score, others[seed]) for seed, score in ones.items()])
        if np.ptp(pairs[:, 0] - pairs[:, 1]) < 1e-12:
            return None, None
        return "paired", float(stats.ttest_rel(*pairs.T).pvalue)
    ones, others = list(ones.values()), list(others.values())
    if max(np.ptp(ones), np.ptp(others)) < 1e-12:
        return None, None
    return "welch", float(stats.ttest_ind(ones, others, equal_var=False).pvalue)


def holm(p_values):
    """Holm's correction: each p-value times the number of those that are not smaller.

    Args:
        p_values: list of numbers; `None` where there was no test.

    Returns:
        List of corrected ones: the smallest of `m` times `m`, the next times `m - 1`, ...; at most
        1, and in the same order of size.
    """
    corrected = list(p_values)
    tested = sorted((p, n) for n, p in enumerate(p_values) if p is not None)
    largest = 0.0
    for rank, (p, n) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        corrected[n] = largest
    return corrected


def comparison_table(comparison):
    """A comparison as a table in Markdown; `*` where the corrected p-value is below 0.05."""
    names = comparison["folders"]
    heads = [names[0], *(cell for name in names[1:] for cell in (name, "difference", "p"))]
    lines = ["| task | metric | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for name, task in comparison["tasks"].items():
        mark = " (partial data)" if task["partial"] else ""
        lines.append(f"| {name}{mark} | {task['metric']} | {_cells(task['models'], 'p_holm')} |")
    if comparison["average"]:
        tasks = f"average of {len(comparison['tasks'])} tasks"
        lines.append(f"| {tasks} | | {_cells(comparison['average'], 'p')} |")
    lines.append(
        f"\nScores of the {comparison['epoch']} epoch: mean ± standard deviation over seeds. p: "
        "t-test over seeds, paired where they are the same, else Welch's; Holm's correction over "
        "tasks; - where there are not two seeds; * below 0.05."
    )
    for name, task in comparison["tasks"].items():
        if any(epochs != task["epochs"][0] for epochs in task["epochs"]):
            beside = " beside ".join(" or ".join(map(str, epochs)) for epochs in task["epochs"])
            lines.append(f"numbers of epochs differ: {name}, {beside}")
    lines += [f"left out: {name}" for name in comparison["left_out"]]
    return "\n".join(lines)


def _cells(models, p):
    cells = [shown(models[0])]
    for model in models[1:]:
        value = model[p]
        mark = "" if value is None or value >= 0.05 else " *"
        cells += [
            shown(model),
            f"{model['difference']:+.3f}",
            "-" if value is None else f"{value:.3f}{mark}",
        ]
    return " | ".join(cells)
