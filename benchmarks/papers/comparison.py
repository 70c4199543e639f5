"""Contestants of the byte model against each other: tuned alike, several seeds, on three axes."""

import functools
import json
import os
import sys

import numpy as np

from benchmarks.papers.runs import Runs, options
from benchmarks.tables import drawn, markdown, mean_sd

LEARNING_RATES = (4e-3, 8e-3, 16e-3)
FULL = {"steps": 1200, "tuning_steps": 300, "learning_rates": LEARNING_RATES, "seeds": 3}
QUICK = {"steps": 12, "learning_rates": LEARNING_RATES[1:2], "seeds": 2}  # nothing is tuned


def main(experiment, description, contestants, base, arguments=None, shares=()):
    """The whole of an experiment on numbers of experts, compared with the contestant `base`.

    It takes equal runs from the experiments whose names are in `shares`, where they are there.
    """
    chosen, train, runs = start(experiment, description, arguments, contestants, shares=shares)
    protocol = QUICK if chosen.quick else FULL
    results = compare(runs, train, contestants, protocol)
    print(table(results, base))
    print(tuning_table(runs, train, contestants, protocol))
    experts = {name: settings.get("experts") for name, settings in contestants.items()}
    draw(results, chosen.into / f"{experiment}.png", experts=experts)


def start(experiment, description, arguments, contestants, watch=None, shares=()):
    """The options of an experiment, its `train` as a function of settings, and its `Runs`.

    Where only the seconds of the contestants' steps are asked for, measures them and ends.
    """
    chosen = options(experiment, description, "corpus", arguments, times=True)
    os.environ["KERAS_BACKEND"] = "jax"
    # One core a process: small products gain little by a second one, and two processes do.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    from benchmarks.papers import byte_model

    text = byte_model.Text(chosen.data)
    path, *others = (chosen.into / f"{name}.jsonl" for name in (experiment, *shares))
    if chosen.time:
        seconds = byte_model.step_seconds(text, contestants)
        path.with_suffix(".seconds.json").write_text(json.dumps(seconds, indent=1) + "\n")
        sys.exit()
    return chosen, functools.partial(byte_model.train, text, watch), Runs(path, others)


def compare(runs, train, contestants, protocol):
    """Runs every contestant shortly at every learning rate, and at its best one with every seed.

    Args:
        runs: a `Runs`.
        train: function of a run's settings.
        contestants: name -> settings, see `byte_model`.
        protocol: `FULL`, `QUICK` or the like.

    Returns:
        Dictionary: name -> list of the results of the seeds, each with its `learning_rate`; and
        with the seconds of a step that `--time` measured, if it did.
    """
    steps, seeds = protocol["steps"], range(protocol["seeds"])
    if len(protocol["learning_rates"]) > 1:
        short = [tuning(settings, protocol) for settings in contestants.values()]
        runs.ahead(train, [each for of_rates in short for each in of_rates])
    tuned = {}
    for name, settings in contestants.items():
        rate, *others = protocol["learning_rates"]
        if others:
            best = min(tuning(settings, protocol), key=lambda each: runs(train, **each)["loss"])
            rate = best["learning_rate"]
        tuned[name] = [
            {**settings, "steps": steps, "seed": seed, "learning_rate": rate} for seed in seeds
        ]
    runs.ahead(train, [each for settings in tuned.values() for each in settings])
    path = runs.path.with_suffix(".seconds.json")
    seconds = json.loads(path.read_text()) if path.exists() else {}
    results = {}
    for name, settings in tuned.items():
        more = {"step_seconds": float(np.median(seconds[name]))} if name in seconds else {}
        results[name] = [
            {**runs(train, **each), "learning_rate": each["learning_rate"], **more}
            for each in settings
        ]
    return results


def tuning(settings, protocol):
    """Settings of a contestant's short runs, one for each learning rate."""
    shared = {"steps": protocol["tuning_steps"], "seed": 1000, "split": "tuning"}
    return [{**settings, **shared, "learning_rate": rate} for rate in protocol["learning_rates"]]


def steps_to(curve, loss):
    """The step at which a curve first reaches a loss, between its points; infinity if never."""
    previous_step, previous_loss = None, None
    for step, value in curve:
        if value <= loss:
            if previous_step is None:
                return float(step)
            share = (previous_loss - loss) / (previous_loss - value)
            return previous_step + share * (step - previous_step)
        previous_step, previous_loss = step, value
    return np.inf


def speed_ups(result, base):
    """How many times faster a run reaches the other's last loss: in steps, FLOPs and seconds."""
    steps = base["curve"][-1][0] / steps_to(result["curve"], base["loss"])
    return {
        "steps": steps,
        "FLOPs": steps * base["step_flops"] / result["step_flops"],
        "seconds": steps * base["step_seconds"] / result["step_seconds"],
    }


def table(results, base):
    """The contestants in Markdown; how fast each reaches the last loss of `base`, seed by seed."""
    header = ["", "parameters", "FLOPs", "rate", "nats/byte", "perplexity"]
    header += ["steps", "FLOPs", "seconds"]
    header += ["dropped", "max/mean load"]
    of_all = all("routing_of_all" in r for of_seeds in results.values() for r in of_seeds)
    header += ["dropped, all steps"] if of_all else []
    rows = []
    for name, of_seeds in results.items():
        first = of_seeds[0]
        faster = [speed_ups(r, b) for r, b in zip(of_seeds, results[base], strict=True)]
        rows.append(
            [
                name,
                f"{first['parameters'] / 1e3:.0f}k",
                f"{first['step_flops'] / results[base][0]['step_flops']:.2f}",
                f"{first['learning_rate']:g}",
                mean_sd([r["loss"] for r in of_seeds], 3),
                mean_sd(np.exp([r["loss"] for r in of_seeds]), 2),
                *(times([f[axis] for f in faster]) for axis in ("steps", "FLOPs", "seconds")),
                *(figure(of_seeds, name) for name in ("dropped", "max_share")),
                *([figure(of_seeds, "dropped", "routing_of_all")] if of_all else []),
            ]
        )
    return markdown(header, rows)


def times(factors):
    """Mean and deviation of the speed-ups of the runs that got there, and how many did if not all.

    A run that never got there has the speed-up 0.
    """
    there = [factor for factor in factors if factor]
    if not there:
        return "never"
    of_all = "" if len(there) == len(factors) else f" ({len(there)} of {len(factors)})"
    return (mean_sd(there, 2) if there[1:] else f"{there[0]:.2f}") + of_all


def figure(of_seeds, name, when="routing"):
    """Mean and deviation of a figure of routing, in the last 100 steps or in all of them."""
    if name not in of_seeds[0][when]:
        return ""
    return mean_sd([r[when][name] for r in of_seeds], 3 if name == "dropped" else 2)


def tuning_table(runs, train, contestants, protocol):
    """The loss of every contestant's short run at every learning rate, in Markdown."""
    rates = protocol["learning_rates"]
    if len(rates) == 1:
        return ""
    rows = []
    for name, settings in contestants.items():
        losses = [runs(train, **each)["loss"] for each in tuning(settings, protocol)]
        best = min(losses)
        rows.append([name, *(f"**{x:.3f}**" if x == best else f"{x:.3f}" for x in losses)])
    return "\n" + markdown(["short runs at rate", *(f"{rate:g}" for rate in rates)], rows)


def draw(results, path, unit="nats per byte, held out", experts=None):
    """Curves of the seeds and their means against steps, FLOPs and seconds.

    With `experts`, name -> number of experts or `None`, also the last perplexity against it.
    """
    columns = 3 if experts is None else 4
    with drawn(path, columns, figsize=(3.7 * columns, 3.6)) as panels:
        axes_of = {"steps": lambda r: 1, "TFLOP": lambda r: r["step_flops"] / 1e12}
        axes_of["seconds"] = lambda r: r["step_seconds"]
        for panel, (axis, per_step) in zip(panels[:3], axes_of.items(), strict=True):
            for number, (name, of_seeds) in enumerate(results.items()):
                curves = np.array([r["curve"] for r in of_seeds])
                scale = np.mean([per_step(r) for r in of_seeds])
                x, y = curves[0, :, 0] * scale, curves[:, :, 1]
                panel.plot(x, y.T, color=f"C{number}", alpha=0.25, linewidth=0.8)
                panel.plot(x, y.mean(0), color=f"C{number}", label=name)
            panel.set(xlabel=axis)
        panels[0].set_ylabel(unit)
        panels[0].legend(frameon=False, fontsize=8)
        if experts is not None:
            _draw_perplexities(panels[-1], results, experts)


def _draw_perplexities(panel, results, experts):
    for number, (name, of_seeds) in enumerate(results.items()):
        perplexity, color = np.exp([r["loss"] for r in of_seeds]), f"C{number}"
        if experts[name] is None:
            panel.axhline(perplexity.mean(), color=color)
        else:
            options = {"color": color, "marker": "o", "capsize": 3}
            panel.errorbar(experts[name], perplexity.mean(), perplexity.std(ddof=1), **options)
    numbers = sorted({n for n in experts.values() if n is not None})
    panel.set(xlabel="experts", ylabel="perplexity per byte", xscale="log")
    panel.set_xticks(numbers, [str(n) for n in numbers])
    panel.minorticks_off()
