import dataclasses

import pytest

from zoo.tasks import TASKS, get
from zoo.tasks.task import recipe


def test_the_nine_glue_tasks_and_the_embedded_one():
    names = ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
    assert set(TASKS) == {"acceptability", *(f"glue/{name}" for name in names)}


def test_rows_agree_with_tensorflow_datasets(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    for task in TASKS.values():
        if task.name == "acceptability":
            continue
        features = tfds.builder(task.name, data_dir=str(tmp_path)).info.features
        assert set(features) == {*task.inputs, "label", "idx"}
        if task.labels is None:
            assert features["label"].dtype == "float32"
        else:
            assert tuple(features["label"].names) == task.labels


def test_every_primary_metric_is_one_of_the_metrics():
    assert all(task.primary in task.metrics for task in TASKS.values())


def test_num_classes():
    widths = {name: task.num_classes for name, task in TASKS.items()}
    assert widths["glue/stsb"] == 1
    assert widths["glue/mnli"] == 3
    assert widths["glue/cola"] == widths["acceptability"] == 2


def test_mnli_has_two_of_each_held_out_split():
    assert get("glue/mnli").splits == (
        "train",
        "validation_matched",
        "validation_mismatched",
        "test_matched",
        "test_mismatched",
    )
    assert get("glue/rte").splits == ("train", "validation", "test")


def test_a_task_is_its_own_name():
    assert get(get("glue/rte")) is TASKS["glue/rte"]


def test_a_task_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get("glue/rte").primary = "f1"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("glue/colla", "glue/cola"),
        ("GLUE/RTE", "glue/rte"),
        ("sst-2", "glue/sst2"),
        ("acceptable", "acceptability"),
    ],
)
def test_unknown_task_names_the_nearest(name, nearest):
    with pytest.raises(ValueError) as error:
        get(name)
    message = str(error.value)
    assert f"did you mean '{nearest}'?" in message
    assert f"Received: task='{name}'" in message
    assert all(known in message for known in TASKS)


@pytest.mark.parametrize("name", ["42", "glue/nosuch"])
def test_unknown_task_with_nothing_near(name):
    with pytest.raises(ValueError, match="`task` must be one of") as error:
        get(name)
    assert "did you mean" not in str(error.value)
    assert all(known in str(error.value) for known in TASKS)


def test_a_recipe_is_the_default_with_what_the_task_names():
    default = {"epochs": 3, "batch_size": 32, "learning_rate": 1e-3, "dropout": 0.2}
    assert recipe("glue/rte") == default
    assert recipe(get("glue/sst2")) == default | {"epochs": 2}
