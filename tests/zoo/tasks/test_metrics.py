import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.tasks import TASKS, Examples, evaluate
from zoo.tasks.metrics import score

pytest.importorskip("sklearn")
pytest.importorskip("scipy")


def logits(predictions, classes=2):
    return np.eye(classes)[predictions]


# labels      1 1 1 0 0 0
# predictions 1 1 0 0 0 1    TP=2 FN=1 TN=2 FP=1
LABELS, PREDICTIONS = [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1]


def test_accuracy_and_f1():
    # accuracy 4/6;  F1 = 2 TP / (2 TP + FP + FN) = 4/6
    for task in ("glue/mrpc", "glue/qqp"):
        scores = evaluate(task, LABELS, logits(PREDICTIONS))
        assert scores == pytest.approx({"accuracy": 2 / 3, "f1": 2 / 3})


def test_f1_is_of_the_positive_class():
    # labels 1 0 0 0, predictions 1 1 0 0: TP=1 FP=1 FN=0, F1 = 2/3, accuracy 3/4
    scores = evaluate("glue/mrpc", [1, 0, 0, 0], logits([1, 1, 0, 0]))
    assert scores == pytest.approx({"accuracy": 0.75, "f1": 2 / 3})


def test_matthews():
    # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = (4 - 1) / sqrt(81) = 1/3
    assert evaluate("glue/cola", LABELS, logits(PREDICTIONS)) == pytest.approx({"matthews": 1 / 3})
    scores = evaluate("acceptability", LABELS, logits(PREDICTIONS))
    assert scores == pytest.approx({"matthews": 1 / 3, "accuracy": 2 / 3})


ACCURACY_ALONE = ["glue/sst2", "glue/qnli", "glue/rte", "glue/wnli"]
ACCURACY_ALONE += [f"super_glue/{name}" for name in ("boolq", "rte", "wic", "wsc")]


@pytest.mark.parametrize("task", ACCURACY_ALONE)
def test_accuracy_alone(task):
    assert evaluate(task, LABELS, logits(PREDICTIONS)) == pytest.approx({"accuracy": 2 / 3})


def test_three_classes():
    scores = evaluate("glue/mnli", [0, 1, 2, 2], logits([0, 1, 1, 2], classes=3))
    assert scores == {"accuracy": 0.75}


def test_pearson_and_spearman():
    # x = 0 1 2 5, y = 0 1 2 3: means 2, 1.5; Sxy = 3+.5+0+4.5 = 8, Sxx = 14, Syy = 5;
    # pearson 8/sqrt(70); the order is the same, so spearman 1.
    scores = evaluate("glue/stsb", [0.0, 1.0, 2.0, 5.0], [[0.0], [1.0], [2.0], [3.0]])
    assert scores == pytest.approx({"pearson": 8 / 70**0.5, "spearman": 1.0})


def test_spearman_of_a_swap():
    # ranks 1 2 3 against 1 3 2: 1 - 6 (0 + 1 + 1) / (3 * 8) = 1/2
    scores = evaluate("glue/stsb", [0.0, 2.0, 4.0], [[0.1], [0.9], [0.3]])
    assert scores["spearman"] == pytest.approx(0.5)


UNGROUPED = pytest.mark.parametrize(
    "task", [task for task in TASKS.values() if not task.grouped], ids=lambda task: task.name
)


@UNGROUPED
def test_constant_predictions_score_zero_without_a_warning(task):
    labels = [0, 1, 1, 0] if task.labels else [0.0, 1.0, 2.0, 5.0]
    outputs = np.zeros((4, task.num_classes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = evaluate(task, labels, outputs)
    correlations = {k: v for k, v in scores.items() if k in ("matthews", "pearson", "spearman")}
    assert all(value == 0.0 for value in correlations.values())
    assert scores.get("f1", 0.0) == 0.0
    assert scores.get("accuracy", 0.5) == 0.5


@UNGROUPED
def test_one_example_scores_without_a_warning(task):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = evaluate(task, [1], np.arange(task.num_classes)[None])
    assert set(scores) == set(task.metrics)
    assert all(np.isfinite(value) for value in scores.values())


def test_what_is_no_class_is_wrong_whatever_the_label():
    scores = score(TASKS["glue/mrpc"], np.array([0, 1, 1, 0]), np.array([-1, 1, -1, 0]))
    assert scores == {"accuracy": 0.5, "f1": 0.5}


def test_macro_f1():
    # labels 0 0 1 2, predictions 0 1 1 0: F1 of 0: TP 1 FP 1 FN 1: 2/4; of 1: TP 1 FP 1: 2/3;
    # of 2: 0. A class that nobody names counts as 0: (1/2 + 2/3 + 0) / 3
    scores = evaluate("super_glue/cb", [0, 0, 1, 2], logits([0, 1, 1, 0], classes=3))
    assert scores == pytest.approx({"accuracy": 0.5, "macro_f1": 7 / 18})
    scores = evaluate("super_glue/cb", [0, 0], logits([0, 0], classes=3))
    assert scores == pytest.approx({"accuracy": 1.0, "macro_f1": 1 / 3})


def test_multirc_counts_answers_and_questions():
    # question 0: 1 1 right; question 1: 0 of 1 wrong; question 2: 0 1, the first wrong.
    # F1 over all: labels 1 1 1 0 1, predictions 1 1 0 1 1: TP 3 FP 1 FN 1: 6/8. Exact: 1 of 3.
    labels, groups = [1, 1, 1, 0, 1], [0, 0, 1, 2, 2]
    outputs = logits([1, 1, 0, 1, 1])
    scores = evaluate("super_glue/multirc", labels, outputs, groups=groups)
    assert scores == pytest.approx({"f1a": 0.75, "exact_match": 1 / 3})


def test_the_order_of_rows_does_not_matter():
    labels, groups = [1, 0, 1, 1, 1], [0, 2, 1, 0, 2]
    scores = evaluate("super_glue/multirc", labels, logits([1, 1, 0, 1, 1]), groups=groups)
    assert scores == pytest.approx({"f1a": 0.75, "exact_match": 1 / 3})


def test_copa_takes_the_likelier_choice():
    # Both rows of question 0 look wrong, the second less so; question 1 chooses its first.
    outputs = [[3.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 1.0]]
    scores = evaluate("super_glue/copa", [0, 1, 0, 1], outputs, groups=[0, 0, 1, 1])
    assert scores == {"accuracy": 0.5}


def record(answers=(("Ann",), ("New York", "the city"))):
    candidates = ["Ann", "Bob", "York", "Rome"]
    groups = np.array([0, 0, 1, 1])
    return Examples(([], []), np.array([1, 0, 0, 0]), groups, [], candidates, list(answers))


def test_record_compares_the_chosen_entity():
    # "Bob" against "Ann": 0; "York" against "New York": 2 * 1 / (1 + 2)
    outputs = [[0.0, 1.0], [0.0, 2.0], [1.0, 1.0], [1.0, 0.0]]
    expected = {"token_f1": pytest.approx(1 / 3), "exact_match": 0.0}
    assert evaluate("super_glue/record", record(), outputs) == expected
    found = evaluate("super_glue/record", record().labels, outputs, examples=record())
    assert found == expected
    outputs[0] = [0.0, 3.0]
    assert evaluate("super_glue/record", record(), outputs)["exact_match"] == 0.5


def test_examples_bring_their_labels_and_groups():
    examples = Examples(([],), np.array([1, 0, 1, 1]), np.array([0, 0, 1, 2]))
    outputs = logits([1, 0, 1, 0])
    assert evaluate("super_glue/multirc", examples, outputs)["exact_match"] == pytest.approx(2 / 3)
    assert evaluate("glue/rte", examples, outputs) == {"accuracy": 0.75}


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 1), st.floats(-5, 5)), min_size=1, max_size=30
    )
)
def test_grouped_metrics_match_a_loop(rows):
    groups, labels, margins = zip(*rows, strict=True)
    outputs = np.stack([np.zeros(len(rows)), margins], axis=1)
    best, exact = {}, dict.fromkeys(groups, True)
    for question, label, margin in rows:
        if question not in best or margin > best[question][0]:
            best[question] = (margin, label)
        exact[question] &= label == (margin > 0)
    copa = evaluate("super_glue/copa", labels, outputs, groups=groups)
    assert copa["accuracy"] == pytest.approx(np.mean([label for _, label in best.values()]))
    multirc = evaluate("super_glue/multirc", labels, outputs, groups=groups)
    assert multirc["exact_match"] == pytest.approx(np.mean(list(exact.values())))
    hits = sum(2 * (label == 1 and margin > 0) for _, label, margin in rows)
    named = sum((label == 1) + (margin > 0) for _, label, margin in rows)
    assert multirc["f1a"] == pytest.approx(hits / named if named else 0.0)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 1), st.floats(0, 5), st.floats(-9, 9)),
        min_size=1,
        max_size=20,
    )
)
def test_scores_are_finite_floats_in_range(rows):
    labels, predictions, scores, outputs = zip(*rows, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [
            evaluate("acceptability", labels, logits(list(predictions))),
            evaluate("glue/mrpc", labels, logits(list(predictions))),
            evaluate("glue/stsb", np.float32(scores), np.float32(outputs)[:, None]),
        ]
    for value in (value for result in found for value in result.values()):
        assert type(value) is float
        assert -1.0 - 1e-6 <= value <= 1.0 + 1e-6


@pytest.mark.parametrize(
    ("task", "labels", "outputs", "message"),
    [
        ("glue/rte", [0, 1], [[0.0]] * 2, r"`outputs`.*\(2, 2\).*\(2, 1\)"),
        ("glue/stsb", [0.0, 1.0], [0.0, 1.0], r"`outputs`.*\(2, 1\).*\(2,\)"),
        ("glue/rte", [], np.zeros((0, 2)), r"`labels`.*\(0,\)"),
        ("glue/rte", [[0]], [[0.0, 1.0]], r"`labels`.*\(1, 1\)"),
        ("glue/rte", [-1, -1], [[0.0, 1.0]] * 2, "`labels`.*-1 to -1"),
        ("glue/rte", [0, 2], [[0.0, 1.0]] * 2, "`labels`.*0 to 2"),
        ("glue/stsb", [-1.0, -1.0], [[0.0], [1.0]], "`labels`.*-1.0 to -1.0"),
        ("glue/rte", [0], [[np.nan, 1.0]], "`outputs`.* 1 .*nan"),
    ],
)
def test_errors(task, labels, outputs, message):
    with pytest.raises(ValueError, match=message):
        evaluate(task, labels, outputs)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("super_glue/copa", {}, "`groups`.*`examples`.*'super_glue/copa'"),
        ("super_glue/multirc", {"groups": [0]}, r"`groups`.*\(2,\).*\(1,\)"),
        ("super_glue/copa", {"groups": [0.0, 0.0]}, "`groups`.*float64"),
        ("super_glue/record", {"groups": [0, 0]}, "`examples`.*'super_glue/record'"),
        (
            "super_glue/record",
            {"groups": [0, 0], "examples": record([("Ann",)] * 3)},
            "`examples`.* 1 .* 3",
        ),
    ],
)
def test_errors_of_grouped_tasks(task, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(task, [0, 1], [[0.0, 1.0]] * 2, **options)
