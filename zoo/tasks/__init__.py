"""Tasks: what to train on and how it is scored."""

from zoo.tasks.data import Examples, load
from zoo.tasks.metrics import evaluate
from zoo.tasks.prepare import Prepared, prepare, prepared_in
from zoo.tasks.suites import Average, average
from zoo.tasks.task import SUITES, TASKS, Task, get

__all__ = [
    "SUITES",
    "TASKS",
    "Average",
    "Examples",
    "Prepared",
    "Task",
    "average",
    "evaluate",
    "get",
    "load",
    "prepare",
    "prepared_in",
]
