"""The page `zoo/RESULTS.md` and its picture, made of `benchmarks/results/glue.json` alone."""

from pathlib import Path

import numpy as np

from benchmarks.tables import drawn, markdown
from zoo.extras import require
from zoo.finetuning.compare import holm, significance
from zoo.finetuning.summary import shown, spread, suite_score
from zoo.tasks import SUITES, get

ZOO = Path(__file__).parent.parent / "zoo"
PAGE, PICTURE = ZOO / "RESULTS.md", ZOO / "results.png"
MODELS = ("dense", "switch", "expert_choice")
WORDS = ("words", "words and overlap")
SUITE_NAMES = {"glue": "GLUE", "superglue": "SuperGLUE"}
ASKED = ("glue/sst2", "glue/cola", "glue/mrpc", "glue/stsb", "glue/qnli")
# Of 4.4M and 11.3M parameters (https://github.com/google-research/bert; Turc et al. 2019,
# https://arxiv.org/abs/1908.08962).
YARDSTICKS = {
    "BERT-tiny": {
        "glue/cola": {"matthews": 0.0},
        "glue/sst2": {"accuracy": 0.832},
        "glue/mrpc": {"f1": 0.811, "accuracy": 0.711},
        "glue/stsb": {"pearson": 0.743, "spearman": 0.736},
        "glue/rte": {"accuracy": 0.572},
    },
    "BERT-mini": {
        "glue/cola": {"matthews": 0.0},
        "glue/sst2": {"accuracy": 0.859},
        "glue/mrpc": {"f1": 0.811, "accuracy": 0.718},
        "glue/stsb": {"pearson": 0.754, "spearman": 0.733},
        "glue/rte": {"accuracy": 0.579},
    },
}
HEAD = """# What the shipped presets reach

Made by `python -m benchmarks.glue --data-dir tfds --train`; figures are in
`benchmarks/results/glue.json`. Validation sets throughout, since the official test sets have no
labels; the score of the best epoch, and that of the last in brackets. Epochs are chosen on these
sets. Rates of fine-tuning were chosen on held-out training data of CoLA, STS-B and SST-2, from the
same trials for all three pretrained models (`python -m benchmarks.recipes`), and are also those of
other tasks and from scratch; with the rates found by heads that see the last layer it was chosen
there, on STS-B with the dense one and Switch, that heads which compare two texts see all layers.
How many epochs and which weights are trained was chosen earlier, on the validation sets of CoLA,
STS-B, MRPC and SST-2, with more trials for the sparse models: small differences between models may
be the gain of choosing. Where neither p nor an interval is given chance was not tested; intervals
are of best epochs, each by itself, and of seeds of fine-tuning, with one pretrained model each.
"Scratch" is the same model with new weights, all of them trained, while the experts of a pretrained
one stay as they are; all else is the same. Partial tasks have only a part of the official data:
their scores are to be compared with each other, and not with published ones; of QQP 49% of the
examples to train on are positive, and 36% of those measured on. QNLI and ReCoRD are missing for
want of data to train on, and larger presets, `*_small_en`, which were to reach BERT-mini's scores,
are not made. A bag of words is a linear model of words and pairs of words, how regularized chosen
within its training data by the metric that chooses epochs; with "overlap" it also knows what two
texts share. The three were pretrained at the same time on one GPU, and fine-tuned many at a time on
one, where JAX multiplies in TF32 (COPA, CB, WNLI and of the sparse ones WSC on a CPU): hours do not
compare them.
"""


def write_page(kept):
    """Writes page and picture.

    Args:
        kept: content of `benchmarks/results/glue.json`.
    """
    draw(kept["pretraining"], PICTURE)
    PAGE.write_text(page(kept))


def page(kept):
    """The page, in Markdown."""
    parts = [HEAD, "## Which claims hold\n", *claims(kept), "\n## Pretraining\n"]
    parts += [pretraining(kept["pretraining"]), "\n![loss by steps, FLOPs, seconds](results.png)\n"]
    for suite, title in SUITE_NAMES.items():
        table = scores(kept, suite)
        parts += [f"## {title}\n", table, "\n" if table else "", differences(kept, suite), "\n"]
    return "\n".join(parts)


def claims(kept):
    """One line for each claim, with the numbers that it is judged by."""
    return [
        *(_against(kept, model) for model in MODELS),
        *(_speed(kept["pretraining"], model) for model in MODELS[1:]),
        *(_average_claim(kept, suite, one, other) for suite in SUITE_NAMES for one, other in PAIRS),
        *(line for suite in SUITE_NAMES for pair in PAIRS if (line := _margin(kept, suite, *pair))),
        *(_behind_words(kept, model) for model in MODELS),
        *(_yardstick(kept, name) for name in YARDSTICKS),
    ]


PAIRS = (("switch", "dense"), ("expert_choice", "dense"), ("expert_choice", "switch"))


def _against(kept, model):
    """Whether a pretrained twin beats the same from scratch, and words."""
    best, last = (_beaten(kept, model, epoch) for epoch in ("best", "last"))
    return (
        f"* `{model}`, pretrained, beats itself from scratch and both bags of words by all metrics "
        f"of {', '.join(ASKED)}: {best}{'' if last == best else f'; by the last epochs {last}'}."
    )


def _beaten(kept, model, epoch):
    lost, unknown = [], []
    for task in ASKED:
        for metric in get(task).metrics:
            own, scratch = (
                _mean(kept, task, model, begin, metric, epoch)
                for begin in ("pretrained", "scratch")
            )
            rivals = {"scratch": scratch, **{n: _words(kept, task, n, metric) for n in WORDS}}
            if own is None or None in rivals.values():
                unknown.append(task)
            elif ahead := [name for name, score in rivals.items() if score >= own]:
                lost.append(f"{task} {metric} ({', '.join(ahead)})")
    verdicts = [f"does not hold on {', '.join(lost)}"] if lost else []
    verdicts += [f"not measured on {', '.join(dict.fromkeys(unknown))}"] if unknown else []
    return "; ".join(verdicts) or "holds"


def _yardstick(kept, name):
    """The best twin beside a published model of like size."""
    compared = []
    for task, theirs in YARDSTICKS[name].items():
        for metric, score in theirs.items():
            means = {model: _mean(kept, task, model, "pretrained", metric) for model in MODELS}
            means = {model: mean for model, mean in means.items() if mean is not None}
            if means:
                best = max(means, key=means.get)
                sign = ">" if means[best] > score else "<"
                compared.append(f"{task} {metric} {means[best]:.3f} {sign} {score:.3f} (`{best}`)")
    return (
        f"* The best twin of each metric and {name} on GLUE's test sets, which are others: "
        f"{', '.join(compared) or 'not measured'}."
    )


def _speed(runs, model):
    """In what share of its steps a sparse twin reaches the dense one's last loss."""
    dense, sparse = (runs.get(f"{name}_mini_en") for name in ("dense", model))
    if not (dense and sparse):
        return f"* `{model}`: not pretrained yet."
    share = share_of_steps(sparse["history"], dense["history"])
    if share is None:
        return f"* `{model}` does not reach the dense twin's last held-out loss."
    verdict = "holds" if share <= 0.7 else "does not hold"
    return (
        f"* `{model}` reaches the dense twin's last held-out loss in at most 0.7 of its steps: "
        f"{verdict} ({share:.2f})."
    )


def share_of_steps(history, other):
    """The share of the steps at which a loss falls to the other's last, between checkpoints.

    Args:
        history: rows of number, seconds, loss and held-out loss of the checkpoints.
        other: those of the other run.

    Returns:
        Number, or `None` if it never does.
    """
    aim, before = other[-1][3], None
    for number, _, _, loss in history:
        if loss <= aim:
            part = 1.0 if before is None else (before[1] - aim) / (before[1] - loss)
            start = 0 if before is None else before[0]
            return (start + part * (number - start)) / other[-1][0]
        before = (number, loss)
    return None


def _average_claim(kept, suite, one, other):
    """Whether one twin's average over a suite is above another's."""
    tasks = _common(kept, suite)
    claim = f"* `{one}` beats `{other}` on {SUITE_NAMES[suite]}'s average"
    if not tasks:
        return f"{claim}: not measured."
    runs, last = (
        [{task: _by_seed(kept, task, name, epoch=epoch) for task in tasks} for name in (one, other)]
        for epoch in ("best", "last")
    )
    means, at_last = ([_suite_mean(each, suite) for each in pair] for pair in (runs, last))
    seeds = sorted(set.intersection(*(set(of_seed) for each in runs for of_seed in each.values())))
    _, p = significance(*(_averages(each, suite, seeds) for each in reversed(runs)))
    verdict = "does not hold"
    if means[0] > means[1]:
        verdict = "holds" if p is not None and p < 0.05 else "not told apart"
    chance = "chance not tested" if p is None else f"p = {p:.3f}"
    names = ", ".join(_title(kept, task) for task in tasks)
    return (
        f"{claim} of {names}: {verdict} "
        f"({means[0]:.3f} and {means[1]:.3f}; {chance}, seeds that all tasks have: {len(seeds)}; "
        f"by the last epochs {at_last[0]:.3f} and {at_last[1]:.3f})."
    )


def _margin(kept, suite, one, other):
    """How far apart two twins may be, by the tasks with most seeds; `None` where none can tell."""
    runs = {task: [_by_seed(kept, task, name) for name in (one, other)] for task in SUITES[suite]}
    seeds_of = {task: set(pair[0]) & set(pair[1]) for task, pair in runs.items()}
    most = max(map(len, seeds_of.values()))
    tasks = [task for task in runs if len(seeds_of[task]) == most]
    seeds = sorted(set.intersection(*(seeds_of[task] for task in tasks)))
    own, others = (
        _averages({task: runs[task][which] for task in tasks}, suite, seeds) for which in (0, 1)
    )
    gains = np.array([own[seed] - others[seed] for seed in seeds])
    if len(seeds) < 3 or np.ptp(gains) < 1e-12:
        return None
    low, high = require("scipy.stats").ttest_1samp(gains, 0).confidence_interval(0.95)
    names = ", ".join(_title(kept, task) for task in tasks)
    return (
        f"* `{one}` minus `{other}`, averaged over the tasks of {SUITE_NAMES[suite]} with most "
        f"seeds ({names}; {len(seeds)} in common): {gains.mean():+.3f}, with 95% confidence from "
        f"{low:+.3f} to {high:+.3f} (paired t-test)."
    )


def _behind_words(kept, model):
    """The tasks of which a bag of words knows as much as a pretrained twin, by some metric."""
    measured, behind = 0, []
    for suite in SUITE_NAMES:
        for task in SUITES[suite]:
            if task not in kept["words"] or not _by_seed(kept, task, model):
                continue
            measured += 1
            if any(
                _mean(kept, task, model, "pretrained", metric)
                <= max(_words(kept, task, name, metric) for name in WORDS)
                for metric in get(task).metrics
            ):
                behind.append(f"{task.partition('/')[0]}/{_title(kept, task)}")
    return (
        f"* `{model}`, pretrained, is no better than a bag of words, by some metric, on "
        f"{len(behind)} of {measured} tasks: {', '.join(behind) or 'none'}."
    )


def _means(scores):
    """The mean of each metric of several dictionaries."""
    scores = list(scores)
    return {name: float(np.mean([each[name] for each in scores])) for name in scores[0]}


def _suite_mean(runs, suite):
    """The suite's average of each task's mean over its seeds."""
    return suite_score({task: _means(of_seed.values()) for task, of_seed in runs.items()}, suite)


def _averages(runs, suite, seeds):
    """Seed -> the suite's average."""
    return {
        seed: suite_score({task: of_seed[seed] for task, of_seed in runs.items()}, suite)
        for seed in seeds
    }


def pretraining(runs):
    """The table of the runs of pretraining."""
    rows = []
    for name, run in runs.items():
        settings, last = run["settings"], run["history"][-1]
        tokens = settings["steps"] * settings["batch_size"] * settings["length"]
        seconds = sum(row[1] for row in run["history"])
        rows.append(
            [
                name,
                f"{run['figures']['parameters'] / 1e6:.1f}M",
                f"{run['figures']['active_parameters'] / 1e6:.1f}M",
                f"{run['figures']['training_flops_per_token'] / 1e6:.1f}M",
                f"{settings['steps']:,}",
                f"{tokens / 1e6:.0f}M",
                f"{seconds / 3600:.2f}",
                f"{last[2]:.3f}",
                f"{last[3]:.3f}",
                f"{np.exp(last[3]):.1f}",
            ]
        )
    header = ["preset", "parameters", "active", "FLOPs per token", "steps", "tokens", "hours"]
    return markdown([*header, "loss", "held-out loss", "perplexity"], rows)


def scores(kept, suite):
    """The table of the scores of a suite: best epoch, and the last in brackets."""
    header = ["task", "metric", "seeds", *WORDS]
    header += [f"{model}, {begin}" for begin in ("scratch", "pretrained") for model in MODELS]
    rows = []
    for task in SUITES[suite]:
        if task not in kept["scores"] and task not in kept["words"]:
            continue
        for metric in get(task).metrics:
            row = [_title(kept, task), metric, _seeds(kept, task)]
            row += [_shown(_words(kept, task, name, metric)) for name in WORDS]
            for begin in ("scratch", "pretrained"):
                for model in MODELS:
                    entry = kept["scores"].get(task, {}).get(f"{model}-{begin}")
                    row.append(_cell(entry, metric))
            rows.append(row)
    return markdown(header, rows) if rows else ""


def differences(kept, suite):
    """The table of what sparse twins gain over others, and what chance makes of it."""
    tasks = _common(kept, suite)
    rows = {pair: [] for pair in PAIRS}
    for pair in PAIRS:
        for task in tasks:
            one, other = (_primary(kept, task, name) for name in pair)
            gain = np.mean(list(one.values())) - np.mean(list(other.values()))
            rows[pair].append((gain, significance(other, one)[1]))
    if not tasks:
        return "No task has runs of all three yet."
    corrected = {pair: holm([p for _, p in rows[pair]]) for pair in PAIRS}
    lines = []
    for number, task in enumerate(tasks):
        cells = [
            f"{rows[pair][number][0]:+.3f} (p {_shown(corrected[pair][number])})" for pair in PAIRS
        ]
        lines.append([_title(kept, task), get(task).primary, *cells])
    return markdown(["task", "metric", *(f"{one} - {other}" for one, other in PAIRS)], lines)


def _title(kept, task):
    """The task's name, with a mark if it was not trained or measured on the official data."""
    measured = [*kept["scores"].get(task, {}).values(), kept["words"].get(task, {})]
    is_partial = any(entry.get("partial") for entry in measured)
    return task.rpartition("/")[2] + (" (partial)" if is_partial else "")


def _seeds(kept, task):
    """How many seeds, of the runs with fewest and of those with most."""
    numbers = {len(entry["runs"]) for entry in kept["scores"].get(task, {}).values()} or {0}
    return "-".join(str(number) for number in sorted({min(numbers), max(numbers)}))


def _common(kept, suite):
    """The tasks of a suite that all models have runs of from their pretrained weights."""
    return [task for task in SUITES[suite] if all(_by_seed(kept, task, model) for model in MODELS)]


def _by_seed(kept, task, model, begin="pretrained", epoch="best"):
    """Seed -> the scores of the best epoch, or the last."""
    runs = kept["scores"].get(task, {}).get(f"{model}-{begin}", {"runs": []})["runs"]
    return {run["seed"]: run[epoch] for run in runs}


def _primary(kept, task, model):
    """Seed -> the task's primary metric, of the best epoch."""
    runs = _by_seed(kept, task, model)
    return {seed: scores[get(task).primary] for seed, scores in runs.items()}


def _mean(kept, task, model, begin, metric, epoch="best"):
    """Over seeds; `None` without any."""
    runs = _by_seed(kept, task, model, begin, epoch).values()
    return float(np.mean([scores[metric] for scores in runs])) if runs else None


def _words(kept, task, name, metric):
    """Mean over the validation splits, as of a run."""
    found = kept["words"].get(task, {}).get(name)
    names = [f"{split}_{metric}" for split in ("val", *get(task).validation[1:])]
    return found and float(np.mean([found[name] for name in names if name in found]))


def _shown(number):
    return "-" if number is None else f"{number:.3f}"


def _cell(entry, metric):
    if entry is None:
        return "-"
    best, last = (
        spread([run[epoch][metric] for run in entry["runs"]]) for epoch in ("best", "last")
    )
    return f"{shown(best)} ({last['mean']:.3f})"


def draw(runs, path):
    """Held-out loss against steps, FLOPs and seconds."""
    with drawn(path, 3, figsize=(11, 3.4), sharey=True) as panels:
        for name, run in runs.items():
            settings = run["settings"]
            number, seconds, _, loss = np.array(run["history"]).T
            steps = number * settings["steps_per_save"]
            tokens = steps * settings["batch_size"] * settings["length"]
            flops = tokens * run["figures"]["training_flops_per_token"]
            for axes, x in zip(panels, (steps, flops, np.cumsum(seconds)), strict=True):
                axes.plot(x, loss, label=name)
        for axes, label in zip(panels, ("steps", "training FLOPs", "seconds"), strict=True):
            axes.set_xlabel(label)
        panels[0].set_ylabel("held-out loss")
        panels[0].legend(frameon=False, fontsize=8)
