"""Checkpoints by name or folder; a checkpoint is a KerasHub preset folder."""

import contextlib
import json
import re
from numbers import Integral
from pathlib import Path

import keras_hub

import zoo.models.encoder  # registers the classes that presets name
import zoo.models.moe_lstm


def from_preset(preset, num_classes=None, load_weights=True, dtype=None):
    """Loads what was saved with `save_to_preset`: a text classifier, or a language model.

    Args:
        preset: folder of the preset.
        num_classes: makes a new head of that many classes; `None` keeps the saved one. Not for a
            language model.
        load_weights: `False` leaves all weights as they are initialized.
        dtype: dtype or dtype policy of the backbone's layers; `None` for Keras' own.

    Returns:
        A `zoo.EncoderTextClassifier` or a `zoo.LstmCausalLM`.

    Raises:
        ValueError: if the folder holds no preset, or one in which something is missing or damaged,
            or `num_classes` is out of range.
    """
    folder = Path(preset)
    if num_classes is not None and not (isinstance(num_classes, Integral) and num_classes > 0):
        raise ValueError(
            f"`num_classes` must be a positive integer. Received: num_classes={num_classes!r}"
        )
    _check_configs(folder, num_classes)
    if load_weights:
        _check_weights(folder, num_classes)
    if _is_language_model(folder):
        if num_classes is not None:
            raise ValueError(
                "`num_classes` must be None for a language model. "
                f"Received: num_classes={num_classes}, preset={preset!r}"
            )
        with explained(folder):
            return zoo.models.moe_lstm.LstmCausalLM.from_preset(
                str(folder), load_weights=load_weights, dtype=dtype
            )
    # KerasHub takes the head to be a new one whenever it is told of classes at all.
    head = {} if num_classes is None else {"num_classes": int(num_classes)}
    with explained(folder):
        return keras_hub.models.TextClassifier.from_preset(
            str(folder), load_weights=load_weights, dtype=dtype, **head
        )


def _check_configs(folder, num_classes):
    if not (folder / "config.json").is_file():
        raise ValueError(
            "`preset` must be the folder of a saved preset, with a `config.json` in it. "
            f"Received: preset={str(folder)!r}"
        )
    if num_classes is None and not (folder / "task.json").is_file():
        raise ValueError(
            "`num_classes` must be given for a preset without a `task.json`. "
            f"Received: num_classes=None, preset={str(folder)!r}"
        )
    for path in (folder / "config.json", folder / "task.json"):
        if path.is_file() and not _describes_an_object(path):
            raise ValueError(
                f"`preset` must hold a {path.name!r} that describes a Keras object, and this one "
                f"does not or is damaged. Received: preset={str(folder)!r}"
            )


def _describes_an_object(path):
    try:
        config = json.loads(path.read_text())
    except ValueError:
        return False
    return isinstance(config, dict) and "registered_name" in config


def _is_language_model(folder):
    task = folder / "task.json"
    return task.is_file() and "CausalLM" in json.loads(task.read_text())["registered_name"]


def _check_weights(folder, num_classes):
    # KerasHub leaves a head whose file is missing as it was initialized, and says nothing.
    missing = None if num_classes or (folder / "task.weights.h5").is_file() else "task.weights.h5"
    # A large model's are in several files, which the second one lists.
    if not any((folder / name).is_file() for name in ("model.weights.h5", "model.weights.json")):
        missing = "model.weights.h5"
    if missing:
        raise ValueError(
            f"`preset` must hold the file {missing!r}. Received: preset={str(folder)!r}"
        )


@contextlib.contextmanager
def explained(path):
    """Says in one sentence what does not fit when a checkpoint is loaded within.

    Args:
        path: of the checkpoint.

    Raises:
        ValueError: for what Keras and h5py raise about missing, damaged or ill-fitting weights; it
            names the first weight that differs and both shapes, where shapes differ.
    """
    try:
        yield
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The checkpoint {str(path)!r} does not fit or is damaged: {_reason(str(error))}"
        ) from error


# Keras' own message: both shapes, and then the weight with all of its values.
_SHAPES = re.compile(
    r"variable\.shape=(\(.*?\)), Received: value\.shape=\D*([\d, ]*)\D.*?path=(\S+),", re.DOTALL
)
_MISSING = re.compile(r"Layer '\S+' expected .*? during loading")


def _reason(message):
    shapes, missing = _SHAPES.search(message), _MISSING.search(message)
    if shapes:
        ours, theirs, name = shapes.groups()
        return f"weight {name!r} has shape {ours} in the model and ({theirs}) in the checkpoint"
    if missing:
        return missing.group()
    return (message.strip() or "unknown reason").splitlines()[0]
