import contextlib
import json

import pytest

import zoo
from benchmarks import glue
from zoo import tasks


def test_the_plan_begins_with_what_most_depends_on():
    plan = glue.plan()
    asked, every = len(glue.ASKED), 9 + 8
    assert len(plan) == len(set(plan))
    begins = [begin for _, begin, _, seed in plan if seed in (None, 0)]
    first = ["words"] * every + ["pretrained"] * 3 * asked + ["scratch"] * 3 * asked
    assert begins == first + ["pretrained"] * 3 * (every - asked)
    assert plan[every] == ("glue/cola", "pretrained", "dense", 0)  # a small one
    seeds = [seed for *_, seed in plan[every:]]
    assert seeds == sorted(seeds)
    for task, number in (("glue/sst2", 2), ("super_glue/record", 1), ("glue/wnli", 5)):
        of_task = [seed for *run, seed in plan if run == [task, "pretrained", "switch"]]
        assert of_task == list(range(number))


def test_baselines_are_kept_and_gathered(tmp_path, monkeypatch):
    monkeypatch.setattr(glue, "plan", lambda: [("glue/cola", "words", None, None)])
    monkeypatch.setattr("zoo.finetuning.suite.missing_data", lambda *args: None)
    monkeypatch.setattr(tasks, "validation_splits", lambda *args: (("validation",), ("train",)))
    calls = []

    def scores(task, data_dir, overlap):
        calls.append((task.name, data_dir))
        return {"val_matthews": float(overlap)}

    monkeypatch.setattr(glue.bag_of_words, "scores", scores)
    for _ in range(2):
        glue.train(tmp_path, "data", {})
    assert calls == [("glue/cola", "data")] * 2  # with and without what a pair shares
    kept = glue.gathered(tmp_path, {})["words"]
    assert kept == {
        "glue/cola": {
            "words": {"val_matthews": 0.0},
            "words and overlap": {"val_matthews": 1.0},
            "partial": ["train"],
        }
    }
    glue.train(tmp_path / "elsewhere", "data", {"words": kept})
    assert len(calls) == 2


def test_runs_are_gathered_by_seed(tmp_path):
    """With what other folders came to; what was run again counts."""

    def runs(*scores):
        return [
            {"seed": seed, "best": {"matthews": score}, "last": {"matthews": score}, "seconds": 1.0}
            for seed, score in scores
        ]

    entry = {"metrics": ["matthews"], "partial": ["train"]}  # of kept ones alone
    kept = {"scores": {"glue/cola": {"dense-scratch": entry | {"runs": runs((0, 0.1), (2, 0.3))}}}}
    for seed, score in ((2, 0.4), (1, 0.2)):
        folder = tmp_path / "glue" / "dense-scratch" / f"glue-cola-{seed}"
        folder.mkdir(parents=True)
        summary = {"tasks": {"glue/cola": entry | {"partial": [], "runs": runs((seed, score))}}}
        (folder / "summary.json").write_text(json.dumps(summary))
    (gathered,) = glue.gathered(tmp_path, kept)["scores"]["glue/cola"].values()
    assert gathered == entry | {"runs": runs((0, 0.1), (1, 0.2), (2, 0.4))}


def test_what_is_left_out_of_the_work(tmp_path, monkeypatch, capsys):
    """What is kept, what another process is at, and what there is no data for."""
    calls = []

    def finetune_suite(task, **options):
        calls.append((task, *(options[name] for name in ("preset", "load_weights", "seeds"))))
        assert options["output"].is_relative_to(tmp_path / "glue")

    def load(task, split, data_dir):
        if (task, split) == ("glue/rte", "validation"):
            raise FileNotFoundError("none of it")

    sst2 = ("glue/sst2", "pretrained", "dense", 0)
    mrpc = [("glue/mrpc", "scratch", "switch", seed) for seed in (0, 1)]
    rte = ("glue/rte", "pretrained", "expert_choice", 0)
    kept = {"scores": {"glue/mrpc": {"switch-scratch": {"runs": [{"seed": 0}]}}}}
    monkeypatch.setattr(zoo, "finetune_suite", finetune_suite)
    monkeypatch.setattr(zoo.tasks.data, "load", load)
    monkeypatch.setattr(glue, "plan", lambda: [sst2, *mrpc, rte])
    with monkeypatch.context() as patch:
        others = {" ".join(map(str, sst2))}
        patch.setattr(glue, "claimed", lambda lock, key: contextlib.nullcontext(key not in others))
        glue.train(tmp_path, "data", kept)
    assert calls == [("glue/mrpc", "switch_mini_en", False, [1])]
    assert capsys.readouterr().out == "left out: glue/rte: none of it\n"
    glue.train(tmp_path, "data", kept)
    assert calls[1:] == [("glue/sst2", "dense_mini_en", True, [0]), calls[0]]


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    """Runs of other settings, say, in the folder."""

    def finetune_suite(task, **options):
        raise ValueError("`output` holds another run")

    monkeypatch.setattr(zoo, "finetune_suite", finetune_suite)
    monkeypatch.setattr(glue, "plan", lambda: [("glue/sst2", "pretrained", "dense", 0)])
    monkeypatch.setattr("zoo.finetuning.suite.missing_data", lambda *args: None)
    with pytest.raises(ValueError, match="another run"):
        glue.train(tmp_path, "data", {})
