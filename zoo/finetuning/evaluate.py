"""The official metrics, or the submission file, of a saved classifier."""

import warnings
from pathlib import Path

import keras

from keras_moe.routing.base import positive_integer
from zoo import tasks
from zoo.extras import require
from zoo.files import is_file, read_json
from zoo.finetuning.batches import TokenisedTask
from zoo.finetuning.classifiers import check_vocabulary
from zoo.finetuning.scores import predict
from zoo.presets import encoder_config, from_preset


def evaluate(preset, task, split=None, *, data_dir=None, predictions=None, batch_size=None):
    """Scores a saved classifier on a split of a task.

    Args:
        preset: a preset of a trained classifier, see `zoo.from_preset`, or the folder of a finished
            run of `zoo.finetune`, of which it is the best epoch, or `preset` in that.
        task: name of a task. One that a run was not trained on is scored with a warning: its
            classes may be others.
        split: one of the task's; `None`: its first validation split.
        data_dir: as in `zoo.finetune`.
        predictions: folder to write the submission file to, see `zoo.tasks.write_submission`;
            `None`: none is written.
        batch_size: examples at a time, which share the experts' capacity; `None`: as the run had,
            or 32.

    Returns:
        Dictionary of the official metrics; empty for a test split, which has no labels.

    Raises:
        ValueError: if the preset is not of a trained classifier with the task's number of classes,
            or there is no such split.
        FileNotFoundError: if the data is not there.
    """
    task = tasks.get(task)
    if batch_size is not None:
        positive_integer("batch_size", batch_size)
    preset, settings = _of_run(preset)
    encoder_config(preset, trained=True)
    for module in ("sklearn", "scipy"):
        require(module)
    classifier = from_preset(preset)
    check_vocabulary(classifier, preset)
    if classifier.num_classes != task.num_classes:
        raise ValueError(
            f"`preset` must be of a classifier of {task.num_classes} classes for {task.name!r}. "
            f"Received: one of {classifier.num_classes}, preset={str(preset)!r}"
        )
    trained_on = settings.get("task", task.name)
    if trained_on != task.name:
        warnings.warn(
            f"`preset` was trained on {trained_on!r} and is scored on {task.name!r}: what a class "
            "means may differ.",
            stacklevel=2,
        )
    data = TokenisedTask(task, data_dir, classifier.preprocessor.sequence_length)
    split = split or data.validation[0]
    if predictions is not None:  # better refused now than when all is done
        tasks.submission_path(task, predictions, split)
    if batch_size is None:
        batch_size = settings.get("batch_size", 32)
    batches = data.batches(split, classifier.preprocessor, batch_size)
    outputs = predict(keras.Model(classifier.input, classifier.output), batches)
    examples = data.examples(split)
    if predictions is not None:
        tasks.write_submission(task, examples, outputs, predictions, split)
    labelled = examples.labels.min() >= 0
    return tasks.evaluate(task, examples, outputs) if labelled else {}


def _of_run(preset):
    """The preset, and settings, of a run's folder; of any other preset itself, and none."""
    folder = Path(preset)
    if folder.name == "preset" and is_file(folder.parent / "results.json"):
        folder = folder.parent
    if is_file(folder / "summary.json"):
        raise ValueError(
            "`preset` must be a preset or one run, a folder `seed<k>` in this one. "
            f"Received: preset={str(preset)!r}"
        )
    if not is_file(folder / "results.json"):
        return preset, {}
    try:
        results = read_json(folder / "results.json")
        finished, settings = results["finished"], results["settings"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            "`preset` must be a run that can be read, but its `results.json` is damaged. "
            f"Received: preset={str(preset)!r}"
        ) from error
    if not finished:
        raise ValueError(
            "`preset` must be a run that is finished; what began it goes on with it. "
            f"Received: preset={str(preset)!r}"
        )
    return folder / "preset", settings
