"""Tasks: what to train on and how it is scored."""

from zoo.tasks.data import Examples, load
from zoo.tasks.metrics import evaluate
from zoo.tasks.prepare import Prepared, prepare
from zoo.tasks.task import TASKS, Task, get

__all__ = ["TASKS", "Examples", "Prepared", "Task", "evaluate", "get", "load", "prepare"]
