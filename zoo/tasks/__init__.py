"""Tasks: what to train on and how it is scored."""

from zoo.tasks.data import Examples, load
from zoo.tasks.metrics import evaluate
from zoo.tasks.mixtures import mixture, rates
from zoo.tasks.prepare import Prepared, prepare, prepared_in, validation_splits
from zoo.tasks.submission import submission_path, write_submission
from zoo.tasks.suites import Average, average
from zoo.tasks.task import SUITES, TASKS, Task, get
from zoo.tasks.text_scores import score_text
from zoo.tasks.text_to_text import TextExamples, load_text, text_to_text

__all__ = [
    "SUITES",
    "TASKS",
    "Average",
    "Examples",
    "Prepared",
    "Task",
    "TextExamples",
    "average",
    "evaluate",
    "get",
    "load",
    "load_text",
    "mixture",
    "prepare",
    "prepared_in",
    "validation_splits",
    "rates",
    "score_text",
    "text_to_text",
    "submission_path",
    "write_submission",
]
