import contextlib

import pytest

import zoo
from benchmarks import glue


def test_the_plan_begins_with_what_most_depends_on():
    plan = glue.plan()
    asked, every = len(glue.ASKED), 9 + 8
    assert len(plan) == len(set(plan)) == 3 * (every + asked) + every
    begins = [begin for task, begin, _ in plan if task in glue.ASKED]
    assert begins == ["words"] * asked + ["pretrained"] * 3 * asked + ["scratch"] * 3 * asked
    assert plan[asked] == ("glue/cola", "pretrained", "dense")  # a small one


def test_baselines_are_kept_and_gathered(tmp_path, monkeypatch):
    monkeypatch.setattr(glue, "plan", lambda: [("glue/cola", "words", None)])
    monkeypatch.setattr(glue, "_has_data", lambda *args: True)
    calls = []

    def scores(task, data_dir, overlap):
        calls.append((task.name, data_dir))
        return {"val_matthews": float(overlap)}

    monkeypatch.setattr(glue.bag_of_words, "scores", scores)
    for _ in range(2):
        glue.train(tmp_path, "data")
    assert calls == [("glue/cola", "data")] * 2  # with and without what a pair shares
    kept = glue.gathered(tmp_path, {})["words"]
    assert kept == {
        "glue/cola": {"words": {"val_matthews": 0.0}, "words and overlap": {"val_matthews": 1.0}}
    }


def test_what_is_left_out_of_the_work(tmp_path, monkeypatch, capsys):
    """What another process is at, and what there is no data for."""
    calls = []

    def finetune_suite(task, **options):
        calls.append((task, *(options[name] for name in ("preset", "load_weights", "seeds"))))
        assert options["output"].is_relative_to(tmp_path / "glue")

    def load(task, split, data_dir):
        if (task, split) == ("glue/rte", "validation"):
            raise FileNotFoundError("none of it")

    sst2 = ("glue/sst2", "pretrained", "dense")
    mrpc = ("glue/mrpc", "scratch", "switch")
    rte = ("glue/rte", "pretrained", "expert_choice")
    monkeypatch.setattr(zoo, "finetune_suite", finetune_suite)
    monkeypatch.setattr(zoo.tasks, "load", load)
    monkeypatch.setattr(glue, "plan", lambda: [sst2, mrpc, rte])
    with monkeypatch.context() as patch:
        others = {" ".join(sst2)}
        patch.setattr(glue, "claimed", lambda lock, key: contextlib.nullcontext(key not in others))
        glue.train(tmp_path, "data")
    assert calls == [("glue/mrpc", "switch_mini_en", False, 5)]
    assert capsys.readouterr().out == "left out: glue/rte: none of it\n"
    glue.train(tmp_path, "data")
    assert calls[1:] == [("glue/sst2", "dense_mini_en", True, 2), calls[0]]


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    """Runs of other settings, say, in the folder."""

    def finetune_suite(task, **options):
        raise ValueError("`output` holds another run")

    monkeypatch.setattr(zoo, "finetune_suite", finetune_suite)
    monkeypatch.setattr(glue, "plan", lambda: [("glue/sst2", "pretrained", "dense")])
    monkeypatch.setattr(glue, "_has_data", lambda *args: True)
    with pytest.raises(ValueError, match="another run"):
        glue.train(tmp_path, "data")
