import re

import pytest

from zoo.tasks import SUITES, TASKS, average

GLUE = {name: dict.fromkeys(TASKS[name].metrics, 0.5) for name in SUITES["glue"]}


def test_the_suites_have_nine_and_eight_tasks():
    assert {name: len(tasks) for name, tasks in SUITES.items()} == {"glue": 9, "superglue": 8}
    assert set().union(*SUITES.values()) == set(TASKS) - {"acceptability"}


def test_every_task_counts_once():
    # mrpc (0.9 + 0.7) / 2 = 0.8, mnli (0.6 + 0.8) / 2 = 0.7, seven of 0.5: 5.0 / 9
    sets = {"validation_matched": {"accuracy": 0.6}, "validation_mismatched": {"accuracy": 0.8}}
    scores = GLUE | {"glue/mrpc": {"accuracy": 0.9, "f1": 0.7}, "glue/mnli": sets}
    found = average(scores, "glue")
    assert found.score == pytest.approx(500 / 9)
    assert found.tasks["glue/mrpc"] == pytest.approx(80)
    assert found.tasks["glue/mnli"] == pytest.approx(70)
    assert found.missing == ()
    assert str(found) == "glue: 55.6 over 9 tasks"


def test_missing_tasks_are_named():
    scores = {
        "super_glue/cb": {"accuracy": 0.8, "macro_f1": 0.6},
        "super_glue/record": {"token_f1": 0.5, "exact_match": 0.4, "loss": 9.0},
        "glue/rte": {"accuracy": 1.0},
    }
    found = average(scores, "superglue")
    assert found.score == pytest.approx((70 + 45) / 2)  # nothing but the metrics counts
    assert len(found.missing) == 6 and "super_glue/rte" in found.missing
    assert re.match("superglue.* 57.5 .* 2 .*: super_glue/boolq, ", str(found))


@pytest.mark.parametrize(
    ("scores", "suite", "message"),
    [
        (GLUE, "GLUE", "`suite`.*'glue', 'superglue'.*suite='GLUE'"),
        ({}, "glue", r"`scores`.*'glue'.*\[\]"),
        (
            {"glue/rte": {"accuracy": 1.0}},
            "superglue",
            r"`scores`.*'superglue'.*\['glue/rte'\]",
        ),
        (
            {"glue/mrpc": {"f1": 1.0}},
            "glue",
            r"`scores`.*\['accuracy', 'f1'\].*'glue/mrpc'.*\['f1'\]",
        ),
        ({"glue/rte": {}}, "glue", r"`scores`.*\['accuracy'\].*'glue/rte'.*\[\]"),
    ],
)
def test_errors(scores, suite, message):
    with pytest.raises(ValueError, match=message):
        average(scores, suite)
