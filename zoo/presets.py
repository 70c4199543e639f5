"""Checkpoints by name or folder; a checkpoint is a KerasHub preset folder."""

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
    return keras_hub.models.TextClassifier.from_preset(str(folder), **options)
