import dataclasses
import re
from collections import Counter

import pytest

from zoo.tasks import SUITES, TASKS, get
from zoo.tasks.task import recipe


def test_the_tasks_of_the_suites_and_the_embedded_one():
    glue = ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
    super_glue = ["boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"]
    assert SUITES["glue"] == tuple(f"glue/{name}" for name in glue)
    assert SUITES["superglue"] == tuple(f"super_glue/{name}" for name in super_glue)
    assert set(TASKS) == {"acceptability", *SUITES["glue"], *SUITES["superglue"]}


def test_rows_agree_with_tensorflow_datasets(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    for task in TASKS.values():
        if task.name == "acceptability":
            continue
        features = tfds.builder(task.dataset, data_dir=str(tmp_path)).info.features
        assert set(features) - {"label"} == {*task.features, "idx"}
        if task.labels is None:
            assert features["label"].dtype == "float32"
        elif task.name != "super_glue/record":  # which has answers instead of a label
            assert tuple(features["label"].names) == task.words


def test_the_words_are_the_labels_unless_a_row_is_one_of_several_choices():
    others = [task.name for task in TASKS.values() if task.words != (task.labels or ())]
    assert others == ["super_glue/copa"]
    assert get("super_glue/copa").labels == ("False", "True")


def test_features_and_dataset_have_defaults():
    assert get("glue/rte").features == ("sentence1", "sentence2")
    assert get("glue/rte").dataset == "glue/rte"
    assert get("super_glue/wsc").dataset == "super_glue/wsc.fixed"


def test_rows_of_three_tasks_belong_together():
    grouping = {name: task.grouping for name, task in TASKS.items() if task.grouped}
    assert grouping == {
        "super_glue/copa": "one",
        "super_glue/multirc": "each",
        "super_glue/record": "one",
    }


def test_a_template_has_features_of_the_task():
    for task in TASKS.values():
        assert set(task.template or ()) <= set(task.features)


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


def named(name):
    """How often the error of an unknown task has each name in quotes."""
    with pytest.raises(ValueError, match=f"^`task`.*task='{name}'$") as error:
        get(name)
    return Counter(re.findall("'([^']*)'", str(error.value)))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("glue/colla", "glue/cola"),
        ("GLUE/RTE", "glue/rte"),
        ("sst-2", "glue/sst2"),
        ("acceptable", "acceptability"),
        ("boolq", "super_glue/boolq"),
        ("super_glue/copaa", "super_glue/copa"),
        ("super_glue/wsc.fixed", "super_glue/wsc"),
        ("glue/coal", "glue/cola"),
        ("superglue/multi_rc", "super_glue/multirc"),
    ],
)
def test_unknown_task_names_the_nearest(name, nearest):
    assert named(name) == Counter([*TASKS, nearest, name])


def test_a_name_that_both_suites_have_may_be_either():
    assert named("rte") == Counter([*TASKS, "glue/rte", "super_glue/rte", "rte"])


@pytest.mark.parametrize("name", ["42", "glue/nosuch"])
def test_unknown_task_with_nothing_near(name):
    assert named(name) == Counter([*TASKS, name])


def test_a_recipe_is_the_default_with_what_the_task_names():
    default = {"epochs": 3, "batch_size": 32, "learning_rate": 1e-3, "dropout": 0.2}
    assert recipe("glue/rte") == default
    assert recipe(get("glue/sst2")) == default | {"epochs": 2}
