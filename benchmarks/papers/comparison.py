"""Contestants of the byte model against each other: tuned alike, several seeds, on three axes."""

import functools
import os

import numpy as np

from benchmarks.papers.runs import Runs, options
from benchmarks.tables import drawn, markdown, mean_sd

LEARNING_RATES = (4e-3, 8e-3, 16e-3)
FULL = {"steps": 1200, "tuning_steps": 300, "learning_rates": LEARNING_RATES, "seeds": 3}
QUICK = {"steps": 12, "learning_rates": LEARNING_RATES[1:2], "seeds": 2}  # nothing is tuned


def main(experiment, description, contestants, base, arguments=None, shares=()):
    """The whole of an experiment that is a comparison with the contestant `base`.

    It takes equal runs from the experiments whose names are in `shares`, where they are there.
    """
    chosen, train, runs = start(experiment, description, arguments, shares=shares)
    protocol = QUICK if chosen.quick else FULL
    results = compare(runs, train, contestants, protocol)
    print(table(results, base))
    if not chosen.quick:
        print("\n" + tuning_table(runs, train, contestants, protocol))
    draw(results, chosen.into / f"{experiment}.png")


def start(experiment, description, arguments=None, watch=None, shares=()):
    """The options of an experiment, its `train` as a function of settings, and its `Runs`."""
    chosen = options(experiment, description, "corpus", arguments)
    os.environ["KERAS_BACKEND"] = "jax"
    # One core a process: small products gain little by a second one, and two processes do.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    from benchmarks.papers import byte_model

    train = functools.partial(byte_model.train, byte_model.Text(chosen.data), watch)
    path, *others = (chosen.into / f"{name}.jsonl" for name in (experiment, *shares))
    return chosen, train, Runs(path, others)


def compare(runs, train, contestants, protocol):
    """Runs every contestant shortly at every learning rate, and at its best one with every seed.

    Args:
        runs: a `Runs`.
        train: function of a run's settings.
        contestants: name -> settings, see `byte_model`.
        protocol: `FULL`, `QUICK` or the like.

    Returns:
        Dictionary: name -> list of the results of the seeds, each with its `learning_rate`.
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
    return {
        name: [{**runs(train, **each), "learning_rate": each["learning_rate"]} for each in settings]
        for name, settings in tuned.items()
    }


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
    header = ["", "parameters", "FLOPs", "rate", "nats/byte", "steps", "FLOPs", "seconds"]
    header += ["dropped", "max/mean load"]
    of_all = "routing_of_all" in next(iter(results.values()))[0]
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
                *(times([f[axis] for f in faster]) for axis in ("steps", "FLOPs", "seconds")),
                *(figure(of_seeds, name) for name in ("dropped", "max_share")),
                *([figure(of_seeds, "dropped", "routing_of_all")] if of_all else []),
            ]
        )
    return markdown(header, rows)


def times(factors):
    """Mean and deviation of speed-ups; a run that never got there has the speed-up 0."""
    if not any(factors):
        return "never"
    return mean_sd(factors, 2)


def figure(of_seeds, name, when="routing"):
    """Mean and deviation of a figure of routing, in the last 100 steps or in all of them."""
    if name not in of_seeds[0][when]:
        return ""
    return mean_sd([r[when][name] for r in of_seeds], 3 if name == "dropped" else 2)


def tuning_table(runs, train, contestants, protocol):
    """The loss of every contestant's short run at every learning rate, in Markdown."""
    rates = protocol["learning_rates"]
    rows = []
    for name, settings in contestants.items():
        losses = [runs(train, **each)["loss"] for each in tuning(settings, protocol)]
        best = min(losses)
        rows.append([name, *(f"**{x:.3f}**" if x == best else f"{x:.3f}" for x in losses)])
    return markdown(["short runs", *(f"{rate:g}" for rate in rates)], rows)


def draw(results, path, unit="nats per byte, held out"):
    """Curves of the seeds and their means against steps, FLOPs and seconds."""
    with drawn(path, 3, figsize=(11, 3.6), sharey=True) as panels:
        axes_of = {"steps": lambda r: 1, "TFLOP": lambda r: r["step_flops"] / 1e12}
        axes_of["seconds"] = lambda r: r["step_seconds"]
        for panel, (axis, per_step) in zip(panels, axes_of.items(), strict=True):
            for number, (name, of_seeds) in enumerate(results.items()):
                curves = np.array([r["curve"] for r in of_seeds])
                scale = np.mean([per_step(r) for r in of_seeds])
                x, y = curves[0, :, 0] * scale, curves[:, :, 1]
                panel.plot(x, y.T, color=f"C{number}", alpha=0.25, linewidth=0.8)
                panel.plot(x, y.mean(0), color=f"C{number}", label=name)
            panel.set(xlabel=axis)
        panels[0].set_ylabel(unit)
        panels[-1].legend(frameon=False, fontsize=8)
