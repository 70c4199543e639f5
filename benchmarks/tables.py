"""From seconds to tables: what contestants cost relative to others, in medians over the rounds.

The seconds of a suite are `{"name/number of experts": [seconds of each round]}`.
"""

import contextlib
import re

import numpy as np

# The parts of a layer's step: what takes part, and what of that is not the part's own.
PARTS = {
    "frame": ("frame", None),
    "products": ("bare", "frame of bare"),
    "routing": ("routing", "frame"),
    "metrics": ("routing and metrics", "routing"),
    "dispatch and combine": ("no experts", "routing and metrics"),
    "routing, dispatch, combine, metrics": ("no experts", "frame"),
}


def ratio(seconds, name, base, without=None):
    """Quartiles of a contestant's time over another's, round by round, as far as both ran.

    Args:
        seconds: name -> seconds of each round.
        name: a contestant.
        base: the one it is measured by.
        without: a contestant whose time is first taken from that of `name`.
    """
    names = [name, base] if without is None else [name, base, without]
    rounds = min(len(seconds[each]) for each in names)
    time, of, *less = (np.array(seconds[each][:rounds]) for each in names)
    return np.percentile((time - sum(less)) / of, (25, 50, 75))


def base_of(name):
    """The dense layer of the same active FLOPs."""
    if "batch of" in name:
        return "dense, " + name.partition(", ")[2]
    if "gated" in name or "Mixtral" in name:
        return "dense of top-2, gated"
    top = re.search(r"top-\d+", name)
    return f"dense of {top[0]}" if top else "dense"


def print_tables(suite, backend, seconds):
    names = list(dict.fromkeys(key.rpartition("/")[0] for key in seconds))
    experts = list(dict.fromkeys(key.rpartition("/")[2] for key in seconds))
    if suite == "parts":
        whole = [name for name in names if "," not in name]
        rows = {
            f"{name}: {part}": [part_of(seconds, name, part, n) for n in experts]
            for name in whole
            for part in PARTS
        }
        print_table(f"{suite}, {backend}: shares of the layer's step", rows, experts)
        return
    sparse = [name for name in names if name != base_of(name)]
    rows = {
        name: [ratio(seconds, f"{name}/{n}", f"{base_of(name)}/{n}") for n in experts]
        for name in sparse
    }
    title = f"{suite}, {backend}: relative to the dense layer of the same active FLOPs"
    print_table(title, rows, experts)
    if suite == "generation":
        rows = {
            name: [ratio(seconds, f"{name}/{n}", f"{name}/{experts[0]}") for n in experts]
            for name in sparse
        }
        print_table(f"{suite}, {backend}: relative to {experts[0]} experts", rows, experts)


def part_of(seconds, name, part, num_experts):
    """Quartiles of a part's share of a layer's step."""
    of, without = (each and f"{name}, {each}/{num_experts}" for each in PARTS[part])
    return ratio(seconds, of, f"{name}/{num_experts}", without)


def print_table(title, rows, experts):
    """Prints a table in Markdown; `rows` is label -> quartiles for each number of experts."""
    cells = [[label, *map(cell, quartiles)] for label, quartiles in rows.items()]
    print(f"\n{title}\n")
    print(markdown(["", *(f"{n} experts" for n in experts)], cells), flush=True)


def markdown(header, rows):
    """A table in Markdown; `rows` is a list of lists of cells."""
    lines = [
        "|" + "".join(" |" if cell == "" else f" {cell} |" for cell in row)
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def cell(quartiles):
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def mean_sd(values, digits=0):
    """Mean and sample standard deviation."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


@contextlib.contextmanager
def drawn(path, columns, **options):
    """Panels of a new figure, `[columns]`, which is written to `path` in the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, columns, layout="constrained", squeeze=False, **options)
    yield panels[0]
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot(results, path):
    """Cost against the number of experts, both logarithmic; one panel for each backend."""
    experts, top = results["sizes"]["experts"], f"top-{results['sizes']['k']}"
    backends = results["backends"]
    with drawn(path, len(backends), figsize=(11, 3.6), sharey=True) as panels:
        for axes, (backend, figures) in zip(panels, backends.items(), strict=True):
            for name in ("switch", "expert choice", top, "switch, bare", f"{top}, bare"):
                base = base_of(name)
                quartiles = [
                    ratio(figures["seconds"], f"{name}/{n}", f"{base}/{n}") for n in experts
                ]
                low, middle, high = zip(*quartiles, strict=True)
                style = "--" if "bare" in name else "-"
                (line,) = axes.plot(experts, middle, style, marker="o", markersize=4, label=name)
                axes.fill_between(experts, low, high, alpha=0.2, color=line.get_color())
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set(title=backend, xlabel="experts", xscale="log", yscale="log")
            axes.set_xticks(experts, [str(n) for n in experts])
            axes.set_yticks([0.8, 1, 1.5, 2, 3], ["0.8", "1", "1.5", "2", "3"])
            axes.minorticks_off()
        panels[0].set_ylabel("step / dense of the same active FLOPs")
        panels[-1].legend(frameon=False, fontsize=8)
