"""Checkpoints by name or folder; a checkpoint is a KerasHub preset folder."""

import contextlib
import re
from pathlib import Path

import keras_hub

import zoo.models.encoder  # noqa: F401  (registers the classes that presets name)


def from_preset(preset, **options):
    """Loads a text classifier that was saved with `save_to_preset`, such as a fine-tuning's result.

    Args:
        preset: folder of the preset.
        **options: passed to KerasHub's `TextClassifier.from_preset`, e.g. `num_classes` for a new
            head, or `load_weights=False`.

    Returns:
        A `zoo.EncoderTextClassifier`.

    Raises:
        ValueError: if the folder holds no preset.
    """
    folder = Path(preset)
    if not (folder / "config.json").is_file():
        raise ValueError(
            "`preset` must be the folder of a saved preset, with a `config.json` in it. "
            f"Received: preset={str(preset)!r}"
        )
    with explained(folder):
        return keras_hub.models.TextClassifier.from_preset(str(folder), **options)


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
    except (OSError, KeyError, ValueError) as error:
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
