import contextlib

import zoo
from benchmarks import glue


def test_the_plan_begins_with_what_most_depends_on():
    plan = glue.plan()
    assert len(plan) == len(set(plan)) == 3 * (9 + 8 + len(glue.ASKED))
    assert plan[0] == ("glue/cola", "pretrained", "dense")
    begins = [begin for task, begin, _ in plan if task in glue.ASKED]
    assert begins == ["pretrained"] * 3 * len(glue.ASKED) + ["scratch"] * 3 * len(glue.ASKED)


def test_what_is_left_out_of_the_work(tmp_path, monkeypatch):
    """What is done, what another process is at, and what there is no data for."""
    calls = []

    def finetune_suite(task, **options):
        calls.append((task, options["load_weights"], options["preset"], options["seeds"]))
        if task == "glue/rte":
            raise FileNotFoundError(task)
        options["output"].mkdir(parents=True)
        (options["output"] / "summary.json").touch()

    sst2 = ("glue/sst2", "pretrained", "dense")
    mrpc = ("glue/mrpc", "scratch", "switch")
    rte = ("glue/rte", "pretrained", "expert_choice")
    monkeypatch.setattr(zoo, "finetune_suite", finetune_suite)
    monkeypatch.setattr(glue, "plan", lambda: [sst2, mrpc, rte])
    with monkeypatch.context() as patch:
        others = {str(tmp_path / "glue" / "dense-pretrained" / "glue-sst2")}
        patch.setattr(glue, "claimed", lambda lock, key: contextlib.nullcontext(key not in others))
        glue.train(tmp_path, None)
    without_data = ("glue/rte", True, "expert_choice_mini_en", 5)
    assert calls == [("glue/mrpc", False, "switch_mini_en", 5), without_data]
    calls.clear()
    glue.train(tmp_path, None)
    assert calls == [("glue/sst2", True, "dense_mini_en", 2), without_data]
