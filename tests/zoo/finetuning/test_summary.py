import types
from pathlib import Path

import pytest

from zoo.finetuning.summary import shown, spread, suite_score, summarise, table


def finished(task, seed, metrics, *history):
    """What a `Run` with so many epochs has; the best one is the first."""
    settings = {"task": task, "seed": seed, "model": "switch", "preset": None, "train": "all"}
    settings |= {
        "load_weights": None,
        "lora_rank": None,
        "backend": "jax",
        "size": "mini",
        "num_experts": 8,
    }
    entries = [{"epoch": n, "seconds": 2.0, **scores} for n, scores in enumerate(history, 1)]
    results = {"settings": settings, "metrics": metrics, "history": entries, "best": entries[0]}
    return types.SimpleNamespace(results=results, folder=Path("out") / task / f"seed{seed}")


@pytest.fixture
def runs():
    mnli = ("val_accuracy", "validation_mismatched_accuracy")
    return {
        "glue/mrpc": [
            finished(
                "glue/mrpc",
                seed,
                ["val_f1", "val_accuracy"],
                {"val_f1": 0.5 + seed / 10, "val_accuracy": 0.7 + seed / 10},
                {"val_f1": 0.4, "val_accuracy": 0.6},
            )
            for seed in (0, 1)
        ],
        "glue/mnli": [
            finished("glue/mnli", seed, ["val_accuracy"], dict(zip(mnli, (0.5, 0.7), strict=True)))
            for seed in (0, 1)
        ],
    }


def test_means_and_deviations_over_seeds(runs):
    summary = summarise(runs, Path("out"), "glue", {"glue/rte": "no data"})
    mrpc = summary["tasks"]["glue/mrpc"]
    assert mrpc["metrics"] == ["f1", "accuracy"]
    # 0.5 and 0.6: each is 0.05 from the mean, and a sample of two has sd 0.05 * sqrt(2).
    assert mrpc["best"]["f1"] == pytest.approx({"mean": 0.55, "sd": 0.05 * 2**0.5})
    assert mrpc["last"]["f1"] == pytest.approx({"mean": 0.4, "sd": 0.0})
    assert mrpc["runs"][1] == {
        "seed": 1,
        "folder": "glue/mrpc/seed1",
        "seconds": 4.0,
        "best_epoch": 1,
        "epochs": 2,
        "best": pytest.approx({"f1": 0.6, "accuracy": 0.8}),
        "last": pytest.approx({"f1": 0.4, "accuracy": 0.6}),
    }
    assert mrpc["partial"] == []
    assert summary["settings"]["load_weights"] is None
    # Of two validation splits the mean: (0.5 + 0.7) / 2.
    assert summary["tasks"]["glue/mnli"]["best"]["accuracy"]["mean"] == pytest.approx(0.6)
    # Seed 0: ((0.5 + 0.7) / 2 + 0.6) / 2 = 0.6; seed 1: ((0.6 + 0.8) / 2 + 0.6) / 2 = 0.65.
    best = summary["averages"]["best"]
    assert best == pytest.approx({"mean": 0.625, "sd": 0.025 * 2**0.5})


def test_the_table(runs):
    lines = table(summarise(runs, Path("out"), "glue", {"glue/rte": "no data"})).splitlines()
    assert lines[0] == "| task | metric | best epoch | last epoch | seeds | seconds |"
    assert lines[2] == "| glue/mrpc | f1 | 0.550 ± 0.071 | 0.400 ± 0.000 | 2 | 8 |"
    assert lines[3].startswith("| glue/mrpc | accuracy | 0.750 ± 0.071 |")
    assert lines[4] == "| glue/mnli | accuracy | 0.600 ± 0.000 | 0.600 ± 0.000 | 2 | 4 |"
    assert lines[5] == "| average of 2 of 9 tasks | | 0.625 ± 0.035 | 0.550 ± 0.000 | | |"
    assert lines[-1] == "left out: glue/rte: no data"


def test_one_task_has_no_average_and_one_seed_no_deviation(runs):
    summary = summarise({"glue/mnli": runs["glue/mnli"][:1]}, Path("out"))
    assert summary["averages"] is None and summary["left_out"] == {}
    assert summary["tasks"]["glue/mnli"]["best"]["accuracy"]["sd"] is None
    assert "| glue/mnli | accuracy | 0.600 | 0.600 | 1 | 2 |" in table(summary)


def test_pieces():
    assert spread([1.0]) == {"mean": 1.0, "sd": None}
    assert spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "sd": 1.0}
    assert shown({"mean": 0.25, "sd": None}) == "0.250"
    scores = {"glue/cola": {"matthews": 0.1}, "glue/mrpc": {"f1": 0.5, "accuracy": 0.7}}
    assert suite_score(scores, "glue") == pytest.approx((0.1 + 0.6) / 2)


def test_partial_data_is_marked_and_may_lack_a_validation_split(runs):
    for run in runs["glue/mnli"]:
        run.results["partial"] = ["train", "validation_matched"]
        for entry in run.results["history"]:
            del entry["validation_mismatched_accuracy"]
    summary = summarise(runs, Path("out"))
    assert summary["tasks"]["glue/mnli"]["partial"] == ["train", "validation_matched"]
    assert summary["tasks"]["glue/mnli"]["best"]["accuracy"]["mean"] == pytest.approx(0.5)
    text = table(summary)
    assert "| glue/mnli (partial data) | accuracy | 0.500" in text and "| glue/mrpc | f1" in text
