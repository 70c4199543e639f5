"""What Switch Transformers varies: capacity, initial scale, precision, expert dropout.

    python -m benchmarks.papers.switch_ablations             90 minutes on 2 cores; start it twice
    python -m benchmarks.papers.switch_ablations --quick     2 to 3 minutes

Fedus et al. 2022 (https://arxiv.org/abs/2101.03961): Table 1 (top-1 and top-2 at three capacity
factors), Table 2 (selective precision), Table 3 (initial scale, five seeds, early in training) and
Table 4 (expert dropout). 16 experts. Bytes of novels, next-byte prediction, see `byte_model`. A
capacity factor is the paper's, slots per expert relative to the tokens' share of one expert, so
that top-2 has as many slots as top-1 at the same factor; `keras_moe` counts them relative to
choices. The initial scale is the paper's, of all kernels, and that of the experts' alone, as the
zoo has it. For the dropout, which the paper needs in fine-tuning on small tasks, the model learns
from little text that it sees again and again, and starts from nothing, not from a trained model.
"""

import numpy as np

from benchmarks.papers import comparison
from benchmarks.tables import drawn

SWITCH = {"kind": "switch", "experts": 16, "hidden": 64, "capacity": 1.25, "init_scale": 0.1}
TOP_2 = {**SWITCH, "kind": "top_k", "k": 2}
SMALL = {**SWITCH, "sequences": 1000}

# Contestants of each study; the others are measured by the first.
STUDIES = {
    "capacity": {
        f"{name}, capacity factor {c:g}": {**settings, "capacity": c / settings.get("k", 1)}
        for c in (2.0, 1.25, 1.0)
        for name, settings in (("Switch", SWITCH), ("top-2", TOP_2))
    },
    "initial scale": {
        "0.1": {**SWITCH, "scaled": "all"},
        "1": {**SWITCH, "init_scale": 1.0, "scaled": "all"},
        "0.1, experts alone": SWITCH,
    },
    "precision": {
        "float32": SWITCH,
        "bfloat16, router float32": {**SWITCH, "precision": "selective"},
        "bfloat16": {**SWITCH, "precision": "bfloat16"},
    },
    "dropout": {
        "dropout 0.1": {**SMALL, "dropout": 0.1, "expert_dropout": 0.1},
        "dropout 0": SMALL,
        "dropout 0.3": {**SMALL, "dropout": 0.3, "expert_dropout": 0.3},
        "dropout 0.1, experts 0.4": {**SMALL, "dropout": 0.1, "expert_dropout": 0.4},
    },
}
FULL = {**comparison.FULL, "steps": 600}
FULL_OF = {"initial scale": {**FULL, "steps": 300, "seeds": 5}}


def main(arguments=None):
    everyone = {name: each for study in STUDIES.values() for name, each in study.items()}
    chosen, train, runs = comparison.start("switch_ablations", __doc__, arguments, everyone)
    results = {}
    for study, contestants in STUDIES.items():
        if chosen.quick:  # all of them take more than three minutes
            contestants = dict(list(contestants.items())[:2])
        results[study] = comparison.compare(runs, train, contestants, protocol_of(study, chosen))
    for study, of_study in results.items():
        print(f"\n{study}\n\n{comparison.table(of_study, next(iter(of_study)))}")
        print(comparison.tuning_table(runs, train, STUDIES[study], protocol_of(study, chosen)))
    draw(results, chosen.into / "switch_ablations.png")


def protocol_of(study, chosen):
    return comparison.QUICK if chosen.quick else FULL_OF.get(study, FULL)


def draw(results, path):
    """A panel for each study: the means of the seeds' curves, and their spread."""
    with drawn(path, len(results), figsize=(14, 3.6)) as panels:
        for panel, (study, of_study) in zip(panels, results.items(), strict=True):
            for name, of_seeds in of_study.items():
                curves = np.array([r["curve"] for r in of_seeds])
                steps, losses = curves[0, :, 0], curves[:, :, 1]
                (line,) = panel.plot(steps, losses.mean(0), label=name)
                panel.fill_between(
                    steps, losses.min(0), losses.max(0), alpha=0.2, color=line.get_color()
                )
            panel.set(title=study, xlabel="steps")
            panel.legend(frameon=False, fontsize=7)
        panels[0].set_ylabel("nats per byte, held out")


if __name__ == "__main__":
    main()
