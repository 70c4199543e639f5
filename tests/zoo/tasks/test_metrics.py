import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.tasks import TASKS, evaluate

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


@pytest.mark.parametrize("task", ["glue/sst2", "glue/qnli", "glue/rte", "glue/wnli"])
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


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
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


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_one_example_scores_without_a_warning(task):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = evaluate(task, [1], np.arange(task.num_classes)[None])
    assert set(scores) == set(task.metrics)
    assert all(np.isfinite(value) for value in scores.values())


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
        ("glue/rte", [0, 1], [[0.0]] * 2, r"`outputs` must have shape \(2, 2\) for 'glue/rte'"),
        ("glue/stsb", [0.0, 1.0], [0.0, 1.0], r"`outputs` must have shape \(2, 1\)"),
        ("glue/rte", [], np.zeros((0, 2)), r"`labels` must have shape \[n\] with n > 0"),
        ("glue/rte", [[0]], [[0.0, 1.0]], r"`labels` must have shape \[n\]"),
        ("glue/rte", [-1, -1], [[0.0, 1.0]] * 2, r"`labels` must be .* Received: .*-1 to -1"),
        ("glue/rte", [0, 2], [[0.0, 1.0]] * 2, r"`labels` must be .* Received: .*0 to 2"),
        ("glue/stsb", [-1.0, -1.0], [[0.0], [1.0]], r"`labels` must be scores of at least 0"),
        ("glue/rte", [0], [[np.nan, 1.0]], r"`outputs` must be finite. Received: 1 .* nan"),
    ],
)
def test_errors(task, labels, outputs, message):
    with pytest.raises(ValueError, match=message):
        evaluate(task, labels, outputs)
