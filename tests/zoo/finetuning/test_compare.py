import json

import numpy as np
import pytest
import scipy.stats

from zoo.finetuning.compare import compare, comparison_table, holm, significance


@pytest.fixture
def folders(tmp_path):
    """Writes summaries: task -> scores of seeds 0, 1, ... or seed -> score."""

    def write(*summaries, suite="glue"):
        names = []
        for number, tasks in enumerate(summaries):
            folder = tmp_path / f"model{number}"
            folder.mkdir()
            entries = {}
            for task, scores in tasks.items():
                scores = scores if isinstance(scores, dict) else dict(enumerate(scores))
                runs = [
                    {
                        "seed": seed,
                        "epochs": 3,
                        "best": {"accuracy": x},
                        "last": {"accuracy": x / 2},
                    }
                    for seed, x in scores.items()
                ]
                partial = ["train"] if task == "glue/mnli" else []
                entries[task] = {"metrics": ["accuracy"], "partial": partial, "runs": runs}
            (folder / "summary.json").write_text(json.dumps({"suite": suite, "tasks": entries}))
            names.append(folder)
        return names

    return write


def paired(ones, others):
    """Student's t of the differences, and twice the area beyond it."""
    d = np.array(others) - np.array(ones)
    t = d.mean() / (d.std(ddof=1) / len(d) ** 0.5)
    return 2 * scipy.stats.t.sf(abs(t), len(d) - 1)


def welch(ones, others):
    """Welch 1947: the variances of the means add, and so do their squares in the freedom."""
    parts = [(np.var(x, ddof=1) / len(x), len(x) - 1) for x in (ones, others)]
    variance = sum(v for v, _ in parts)
    freedom = variance**2 / sum(v**2 / n for v, n in parts)
    t = (np.mean(others) - np.mean(ones)) / variance**0.5
    return 2 * scipy.stats.t.sf(abs(t), freedom)


ONES, OTHERS = [0.50, 0.56, 0.53], [0.60, 0.61, 0.65]


def test_same_seeds_are_paired_and_others_are_not():
    ones, others = dict(enumerate(ONES)), dict(enumerate(OTHERS))
    assert significance(ones, others) == ("paired", pytest.approx(paired(ONES, OTHERS)))
    shuffled = {seed: others[seed] for seed in (2, 0, 1)}
    assert significance(ones, shuffled) == significance(ones, others)
    later = {seed + 1: score for seed, score in others.items()}
    assert significance(ones, later) == ("welch", pytest.approx(welch(ONES, OTHERS)))
    fewer = {0: OTHERS[0], 1: OTHERS[1]}
    assert significance(ones, fewer) == ("welch", pytest.approx(welch(ONES, OTHERS[:2])))


def test_no_significance_of_one_seed_nor_without_any_spread():
    assert significance({0: 0.5}, {0: 0.9}) == (None, None)
    assert significance({0: 0.5, 1: 0.6}, {0: 0.9}) == (None, None)
    assert significance({0: 0.5, 1: 0.6}, {0: 0.6, 1: 0.7}) == (None, None)
    assert significance({0: 0.5, 1: 0.5}, {2: 0.6, 3: 0.6}) == (None, None)


def test_holm():
    # Sorted: 0.01 * 3, 0.02 * 2 and 0.04 * 1, which must not be smaller than the one before.
    assert holm([0.04, 0.01, None, 0.02]) == pytest.approx([0.04, 0.03, None, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([None]) == [None]


def test_differences_to_the_first(folders):
    one = {"glue/rte": ONES, "glue/qnli": [0.1, 0.3, 0.2], "glue/sst2": [0.9]}
    two = {"glue/rte": OTHERS, "glue/qnli": [0.2, 0.2, 0.2]}
    comparison = compare(*folders(one, two, one))
    assert list(comparison["tasks"]) == ["glue/rte", "glue/qnli"]
    assert comparison["left_out"] == ["glue/sst2"]
    first, second, third = comparison["tasks"]["glue/rte"]["models"]
    assert first == {"mean": pytest.approx(0.53), "sd": pytest.approx(0.03), "seeds": [0, 1, 2]}
    assert second["difference"] == pytest.approx(0.62 - 0.53)
    assert second["test"] == "paired" and second["p"] == pytest.approx(paired(ONES, OTHERS))
    assert second["p_holm"] == pytest.approx(2 * second["p"])  # the smaller one of two
    assert third["difference"] == 0 and third["p"] is None is third["p_holm"]
    average = comparison["average"]
    ones, others = (
        [(a + b) / 2 for a, b in zip(s["glue/rte"], s["glue/qnli"], strict=True)]
        for s in (one, two)
    )
    assert average[1]["p"] == pytest.approx(paired(ones, others)) and "p_holm" not in average[1]


def test_scores_of_the_last_epoch_and_of_other_seeds(folders):
    names = folders({"glue/rte": ONES}, {"glue/rte": {3: 0.6, 4: 0.7}})
    best, last = (compare(*names, epoch=epoch) for epoch in ("best", "last"))
    assert last["tasks"]["glue/rte"]["models"][1]["mean"] == pytest.approx(0.65 / 2)
    assert best["tasks"]["glue/rte"]["models"][1]["test"] == "welch"


def test_no_average_without_a_suite_or_common_seeds(folders, tmp_path):
    assert (
        compare(*folders({"glue/rte": ONES}, {"glue/rte": OTHERS}, suite=None))["average"] is None
    )
    for folder in tmp_path.iterdir():
        (folder / "summary.json").unlink()
        folder.rmdir()
    tasks = {"glue/rte": {0: 0.5}, "glue/qnli": {1: 0.5}}
    assert compare(*folders(tasks, tasks))["average"] is None


def test_the_table(folders):
    one, two = {"glue/rte": ONES, "glue/qnli": [0.1]}, {"glue/rte": OTHERS, "glue/qnli": [0.2]}
    names = folders(one, two)
    lines = comparison_table(compare(*names)).splitlines()
    assert lines[0] == f"| task | metric | {names[0]} | {names[1]} | difference | p |"
    p = paired(ONES, OTHERS)  # the only one
    assert 0.03 < p < 0.05
    assert lines[2] == (
        f"| glue/rte | accuracy | 0.530 ± 0.030 | 0.620 ± 0.026 | +0.090 | {p:.3f} * |"
    )
    assert lines[3] == "| glue/qnli | accuracy | 0.100 | 0.200 | +0.100 | - |"
    assert lines[4] == "| average of 2 tasks | | 0.300 | 0.400 | +0.100 | - |"


def test_runs_of_different_lengths_are_named(folders):
    names = folders(
        {"glue/rte": ONES, "glue/qnli": [0.1]}, {"glue/rte": OTHERS, "glue/qnli": [0.2]}
    )
    assert "epochs differ" not in comparison_table(compare(*names))
    path = names[1] / "summary.json"
    summary = json.loads(path.read_text())
    summary["tasks"]["glue/rte"]["runs"][1]["epochs"] = 5
    path.write_text(json.dumps(summary))
    comparison = compare(*names)
    assert comparison["tasks"]["glue/rte"]["epochs"] == [[3], [3, 5]]
    lines = comparison_table(comparison).splitlines()
    assert lines[-1] == "numbers of epochs differ: glue/rte, 3 beside 3 or 5"


def test_what_cannot_be_compared(folders, tmp_path):
    names = folders({"glue/rte": ONES}, {"glue/qnli": ONES})
    with pytest.raises(ValueError, match="`folders`.*model0.*model1"):
        compare(*names)
    with pytest.raises(ValueError, match="`folders`.*1"):
        compare(names[0])
    with pytest.raises(ValueError, match="`folders`.*none'"):
        compare(names[0], tmp_path / "none")
    with pytest.raises(ValueError, match="`epoch`.*'first'"):
        compare(*names, epoch="first")
    without_epochs = {"metrics": ["accuracy"], "runs": [{"seed": 0, "best": {}, "last": {}}]}
    for damaged in ([], {"suite": None, "tasks": {"glue/rte": without_epochs}}):
        (names[1] / "summary.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="`folders`.*model1"):
            compare(*names)


def test_partial_data_is_marked(folders):
    comparison = compare(
        *folders({"glue/mnli": [0.5], "glue/rte": [0.5]}, {"glue/mnli": [0.6], "glue/rte": [0.7]})
    )
    assert [task["partial"] for task in comparison["tasks"].values()] == [True, False]
    table = comparison_table(comparison)
    assert "| glue/mnli (partial data) |" in table and "| glue/rte |" in table
