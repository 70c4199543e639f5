"""GLUE's and SuperGLUE's one number: the average over their tasks."""

from typing import NamedTuple

import numpy as np

from zoo.tasks.task import SUITES, TASKS


class Average(NamedTuple):
    """The average of a suite; as a string it is the line to print.

    Attributes:
        suite: "glue" or "superglue".
        score: The mean over the tasks that were given, in percent, as the papers print it.
        tasks: A dict from the name of each of these tasks to its own score, in percent.
        missing: The tasks that were not given; without any `score` is the papers' number.
    """

    suite: str
    score: float
    tasks: dict[str, float]
    missing: tuple[str, ...]

    def __str__(self):
        found = f"{self.suite}: {self.score:.1f} over {len(self.tasks)} tasks"
        return f"{found}; missing: {', '.join(self.missing)}" if self.missing else found


def average(scores, suite):
    """Averages scores as the papers do.

    Every task counts once: of two metrics, as of MRPC, their mean counts, and of the two sets of
    MNLI too (Wang et al., 2019, https://arxiv.org/abs/1804.07461, table 5, and
    https://arxiv.org/abs/1905.00537, section 4). The diagnostic sets do not count.

    Args:
        scores: A dict from the names of tasks to what `evaluate` gives, fractions of 1; for MNLI
            also a dict from its splits to that. Tasks of other suites are left out.
        suite: "glue" or "superglue".

    Returns:
        The `Average`.

    Raises:
        ValueError: If the suite is unknown, there is no task of it, or a metric of one is
            missing.
    """
    if suite not in SUITES:
        raise ValueError(f"`suite` must be one of {list(SUITES)}. Received: suite={suite!r}")
    tasks = {name: 100 * _task(name, scores[name]) for name in SUITES[suite] if name in scores}
    if not tasks:
        raise ValueError(
            f"`scores` must have a task of {suite!r}, {', '.join(SUITES[suite])}. "
            f"Received: {list(scores)}"
        )
    missing = tuple(name for name in SUITES[suite] if name not in scores)
    return Average(suite, float(np.mean(list(tasks.values()))), tasks, missing)


def _task(name, scores):
    """The mean of the metrics of a task, or of its sets."""
    if scores and all(isinstance(value, dict) for value in scores.values()):
        return float(np.mean([_task(name, value) for value in scores.values()]))
    metrics = TASKS[name].metrics
    if any(metric not in scores for metric in metrics):
        raise ValueError(
            f"`scores` must have the metrics {list(metrics)} of {name!r}. Received: {list(scores)}"
        )
    return float(np.mean([scores[metric] for metric in metrics]))
