import json

import pytest

import zoo
from benchmarks import recipes
from zoo.tasks import data


def test_every_model_is_tried_alike():
    """But the dense one with nothing that is for experts."""
    plan = recipes.plan()
    assert len({recipes.name(*trial) for trial in plan}) == len(plan)
    for task, trials in recipes.TRIALS.items():
        for model in recipes.TWINS:
            own = [t for t in trials if model != "dense" or "expert_dropout" not in t]
            assert [tried for *which, tried in plan if which == [task, model]] == own


@pytest.mark.parametrize(("number", "part"), [(50, 10), (6000, 1000)])
def test_validation_sets_have_no_part_in_it(monkeypatch, number, part):
    """A fifth of what there is to train on, or 1,000, and not the same examples twice."""
    splits = {"train": [{"idx": n} for n in range(number)], "validation": [{"idx": -1}]}
    monkeypatch.setattr(data, "features", lambda task, split, data_dir=None: splits[split])
    original = data.features
    with recipes.held_out():
        held = [example["idx"] for example in data.features("glue/cola", "validation")]
        rest = [example["idx"] for example in data.features("glue/cola", "train")]
    assert len(held) == part and sorted(held + rest) == list(range(number))
    assert data.features is original


def test_trials_are_done_once_gathered_and_shown(tmp_path, monkeypatch):
    done = ("glue/mrpc", "dense", {"learning_rate": 1e-3})
    left = ("glue/mrpc", "switch", {"learning_rate": 1e-3, "pairs": "together"})
    monkeypatch.setattr(recipes, "plan", lambda: [done, left])
    calls = []

    def finetune(task, *, preset, output, data_dir, verbose, **tried):
        calls.append((task, preset, tried))
        output.mkdir(parents=True)
        history = [{"val_f1": f1, "val_accuracy": 0.5, "loss": 1.0} for f1 in (0.75, 0.5)]
        results = {"finished": True, "metrics": ["val_f1", "val_accuracy"], "history": history}
        (output / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(zoo, "finetune", finetune)
    # The best epoch is that of F1, the primary metric, whatever comes first in the file.
    kept = {recipes.name(*done): [{"accuracy": 0.6, "f1": 0.7}, {"accuracy": 0.4, "f1": 0.8}]}
    recipes.train(tmp_path, None, kept)
    assert calls == [("glue/mrpc", "switch_mini_en", left[2])]
    found = recipes.gathered(tmp_path)
    both = [{"f1": 0.75, "accuracy": 0.5}, {"f1": 0.5, "accuracy": 0.5}]
    assert found == {"glue-mrpc-switch-learning_rate=0.001-pairs=together": both}
    first, second = recipes.table(kept | found).strip().split("\n")[-2:]
    assert first == "| glue/mrpc | accuracy, f1 | learning_rate 0.001 | 0.400, 0.800 | - | - |"
    tried = "learning_rate 0.001, pairs together"
    assert second == f"| glue/mrpc | accuracy, f1 | {tried} | - | 0.500, 0.750 | - |"


def test_what_failed_is_undone():
    original = data.features
    with pytest.raises(RuntimeError), recipes.held_out():
        raise RuntimeError
    assert data.features is original
