import json

import pytest

import zoo
from benchmarks import recipes
from zoo.tasks import data


def test_every_model_is_tried_as_often():
    plan = recipes.plan()
    assert len({recipes.name(*trial) for trial in plan}) == len(plan)
    rates = {(task, model): [] for task in recipes.TASKS for model in recipes.TWINS}
    for task, model, rate, train in plan:
        if train is None:
            rates[task, model].append(rate)
    assert all(tried == list(recipes.RATES) for tried in rates.values())


def test_validation_sets_have_no_part_in_it(monkeypatch):
    """A fifth of what there is to train on, and not the same examples twice."""
    splits = {"train": [{"idx": n} for n in range(50)], "validation": [{"idx": -1}]}
    monkeypatch.setattr(data, "features", lambda task, split, data_dir=None: splits[split])
    original = data.features
    with recipes.held_out():
        held = [example["idx"] for example in data.features("glue/cola", "validation")]
        rest = [example["idx"] for example in data.features("glue/cola", "train")]
    assert len(held) == 10 and sorted(held + rest) == list(range(50))
    assert data.features is original


def test_trials_are_done_once_gathered_and_shown(tmp_path, monkeypatch):
    done = ("glue/mrpc", "dense", 1e-3, None)
    trials = [done, ("glue/mrpc", "switch", 5e-4, "all")]
    monkeypatch.setattr(recipes, "plan", lambda: trials)
    calls = []

    def finetune(task, *, output, **options):
        calls.append((task, options["preset"], options["learning_rate"], options["train"]))
        output.mkdir(parents=True)
        history = [{"val_f1": f1, "val_accuracy": 0.5, "loss": 1.0} for f1 in (0.75, 0.5)]
        results = {"finished": True, "metrics": ["val_f1", "val_accuracy"], "history": history}
        (output / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(zoo, "finetune", finetune)
    kept = {recipes.name(*done): [{"f1": 0.7, "accuracy": 0.6}, {"f1": 0.8, "accuracy": 0.4}]}
    recipes.train(tmp_path, None, kept)
    assert calls == [("glue/mrpc", "switch_mini_en", 5e-4, "all")]
    found = recipes.gathered(tmp_path)
    assert found == {
        "glue-mrpc-switch-0.0005-all": [
            {"f1": 0.75, "accuracy": 0.5},
            {"f1": 0.5, "accuracy": 0.5},
        ]
    }
    *_, first, second = recipes.table(kept | found).split("\n")
    assert first == "| glue/mrpc | f1, accuracy | 0.0005 | all | - | 0.750, 0.500 | - |"
    assert second == (
        "| glue/mrpc | f1, accuracy | 0.001 | as the recipe has it | 0.800, 0.400 | - | - |"
    )


def test_what_failed_is_undone():
    original = data.features
    with pytest.raises(RuntimeError), recipes.held_out():
        raise RuntimeError
    assert data.features is original
