import json

import numpy as np
import pytest

import zoo
from tests.zoo.finetuning import small
from zoo import tasks
from zoo.finetuning import batches


@pytest.mark.filterwarnings("error:.*is scored on")
def test_a_run_scores_as_its_best_epoch(whole):
    results, folder = whole
    scores = zoo.evaluate(folder, "glue/cola")
    assert scores == {"matthews": pytest.approx(results["best"]["val_matthews"])}
    assert zoo.evaluate(results["preset"], "glue/cola", "validation") == scores


def test_batches_are_as_large_as_the_runs_unless_told_otherwise(whole, monkeypatch):
    sizes, original = [], batches.TokenisedTask.batches

    def of_size(self, split, preprocessor, batch_size, *others):
        sizes.append(batch_size)
        return original(self, split, preprocessor, batch_size, *others)

    monkeypatch.setattr(batches.TokenisedTask, "batches", of_size)
    zoo.evaluate(whole[1], "glue/cola")
    zoo.evaluate(whole[1], "glue/cola", batch_size=8)
    assert sizes == [whole[0]["settings"]["batch_size"], 8] == [16, 8]


def test_another_split_and_its_predictions(whole, tmp_path, monkeypatch):
    _, folder = whole
    written = []

    def write(task, examples, outputs, where, split):
        written.append((task.name, len(examples.labels), outputs.shape, where, split))

    monkeypatch.setattr(tasks, "write_submission", write)
    assert zoo.evaluate(folder, "glue/cola", "train", predictions=tmp_path)["matthews"] > 0.9
    assert written == [("glue/cola", 64, (64, 2), tmp_path, "train")]


def test_a_split_without_labels_has_predictions_alone(whole, tmp_path, monkeypatch):
    def load(task, split, data_dir=None):
        examples = small.load(task, split)
        return examples._replace(labels=np.full(21, -1, "int32"))

    written = []
    monkeypatch.setattr(batches.data, "load", load)
    monkeypatch.setattr(tasks, "write_submission", lambda *given: written.append(given[-1]))
    assert zoo.evaluate(whole[1], "glue/cola", "test", predictions=tmp_path) == {}
    assert written == ["test"]


def test_what_is_no_trained_classifier(masked_lm, tmp_path):
    with pytest.raises(ValueError, match=f"`preset`.*{masked_lm}"):
        zoo.evaluate(masked_lm, "glue/cola")
    zoo.from_preset(masked_lm).backbone.save_to_preset(str(tmp_path))
    with pytest.raises(ValueError, match=f"`preset`.*{tmp_path}"):
        zoo.evaluate(tmp_path, "glue/cola")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("acceptability", "`task`.*'acceptability'"),
        ("glue/cola", "`predictions`.*file"),
    ],
)
def test_predictions_that_cannot_be_written_are_refused_first(
    whole, tmp_path, monkeypatch, task, message
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("zoo.finetuning.evaluate.predict", None)
    where = tmp_path / ("file" if task == "glue/cola" else "folder")
    with pytest.raises(ValueError, match=message):
        zoo.evaluate(whole[1], task, "validation", predictions=where)
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "folder").exists()


def test_another_task_with_as_many_classes_is_remarked_on(whole):
    for preset in (whole[1], whole[0]["preset"]):
        with pytest.warns(UserWarning, match="'glue/cola'.*'glue/sst2'"):
            assert set(zoo.evaluate(preset, "glue/sst2")) == {"accuracy"}


def test_what_does_not_fit(whole, tmp_path):
    results, folder = whole
    with pytest.raises(ValueError, match=f"`preset`.*3.*'glue/mnli'.*2.*{folder}"):
        zoo.evaluate(folder, "glue/mnli")
    with pytest.raises(ValueError, match="`task`.*'glue/coal'"):
        zoo.evaluate(folder, "glue/coal")
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"`batch_size`.*{size}"):
            zoo.evaluate(folder, "glue/cola", batch_size=size)
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "results.json").write_text(damaged)
        with pytest.raises(ValueError, match=f"`preset`.*{tmp_path}"):
            zoo.evaluate(tmp_path, "glue/cola")
    (tmp_path / "results.json").write_text(json.dumps(results | {"finished": False}))
    with pytest.raises(ValueError, match=f"`preset`.*{tmp_path}"):
        zoo.evaluate(tmp_path, "glue/cola")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=f"`preset`.*{tmp_path}"):
        zoo.evaluate(tmp_path, "glue/cola")
