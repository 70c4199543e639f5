"""What several runs came to: means, standard deviations, a table."""

import numpy as np

from zoo.tasks import SUITES, average, get


def summarise(runs, output, suite=None, left_out=()):
    """What runs came to.

    Args:
        runs: name of a task -> list of finished `zoo.runs.Run`s, which differ in their seeds.
        output: folder that all of them are in.
        suite: name of the suite that the tasks are of; `None`: no average is of interest.
        left_out: name of a task of the suite -> why it has no runs.

    Returns:
        Dictionary for JSON. Scores are of the epoch that was best on the validation data, which
        flatters, and of the last; of several validation splits they are means. A standard
        deviation is that of a sample, `None` of one seed. `partial` are the splits that are not the
        official ones: such scores are not to be put beside published ones.
    """
    tasks = {}
    for name, each in runs.items():
        entries = [_entry(get(name), run, output) for run in each]
        tasks[name] = {
            "metrics": [metric.removeprefix("val_") for metric in each[0].results["metrics"]],
            "partial": each[0].results.get("partial", []),
            "runs": entries,
            **{
                epoch: {
                    metric: spread([entry[epoch][metric] for entry in entries])
                    for metric in entries[0][epoch]
                }
                for epoch in ("best", "last")
            },
        }
    settings = next(iter(runs.values()))[0].results["settings"]
    common = (
        *("model", "preset", "load_weights", "train", "lora_rank"),
        *("backend", "size", "num_experts"),
    )
    return {
        "settings": {name: settings[name] for name in common},
        "folder": str(output),
        "suite": suite,
        "tasks": tasks,
        "averages": suite and {epoch: _averages(tasks, epoch, suite) for epoch in ("best", "last")},
        "left_out": dict(left_out),
    }


def _entry(task, run, output):
    results = run.results
    history = results["history"]
    return {
        "seed": results["settings"]["seed"],
        "folder": str(run.folder.relative_to(output)),
        "seconds": round(sum(entry["seconds"] for entry in history), 1),
        "best_epoch": results["best"]["epoch"],
        "epochs": len(history),
        "best": _scores(task, results, results["best"]),
        "last": _scores(task, results, history[-1]),
    }


def _scores(task, results, entry):
    names = [name.removeprefix("val_") for name in results["metrics"]]
    prefixes = ["val", *task.validation[1:]]
    return {
        name: float(np.mean([entry[n] for p in prefixes if (n := f"{p}_{name}") in entry]))
        for name in names
    }


def spread(scores):
    """Mean and standard deviation of a sample, for JSON."""
    sd = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    return {"mean": float(np.mean(scores)), "sd": sd}


def suite_score(scores, suite):
    """`zoo.tasks.average` as a fraction of 1, as all other scores are."""
    return average(scores, suite).score / 100


def _averages(tasks, epoch, suite):
    """The suite's average of each seed, and their spread."""
    return spread(
        [
            suite_score({name: task["runs"][n][epoch] for name, task in tasks.items()}, suite)
            for n in range(len(next(iter(tasks.values()))["runs"]))
        ]
    )


def table(summary):
    """A summary as a table in Markdown."""
    lines = [
        "| task | metric | best epoch | last epoch | seeds | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, task in summary["tasks"].items():
        title = f"{name} (partial data)" if task["partial"] else name
        seconds = sum(entry["seconds"] for entry in task["runs"])
        for metric in task["metrics"]:
            best, last = (shown(task[epoch][metric]) for epoch in ("best", "last"))
            lines.append(
                f"| {title} | {metric} | {best} | {last} | {len(task['runs'])} | {seconds:.0f} |"
            )
    if summary["averages"]:
        best, last = (shown(summary["averages"][epoch]) for epoch in ("best", "last"))
        some, every = len(summary["tasks"]), len(SUITES[summary["suite"]])
        lines.append(f"| average of {some} of {every} tasks | | {best} | {last} | | |")
    lines += [f"\nleft out: {name}: {why}" for name, why in summary["left_out"].items()]
    return "\n".join(lines)


def shown(spread):
    """A mean and, where there is one, its standard deviation, as text."""
    sd = "" if spread["sd"] is None else f" ± {spread['sd']:.3f}"
    return f"{spread['mean']:.3f}{sd}"
