"""The classifier that a run trains: built from scratch, or made of a preset."""

from zoo.models.builders import MODELS
from zoo.models.encoder import EncoderTextClassifier, EncoderTextClassifierPreprocessor
from zoo.presets import from_preset
from zoo.tokenizer import default_tokenizer

_VOCABULARY_SIZE = 8192  # of the shipped tokenizer's 8,000 pieces, rounded up


def build(task, settings):
    """The classifier of a run.

    Args:
        task: a `Task`.
        settings: see `zoo.finetuning.settings.settle`.

    Returns:
        A `zoo.EncoderTextClassifier` with its preprocessor.

    Raises:
        ValueError: if the preset cannot be read, or does not go with its tokenizer.
    """
    if settings["preset"] is None:
        return _from_scratch(task, settings)
    classifier = from_preset(
        settings["preset"],
        num_classes=task.num_classes,
        dropout=settings["dropout"],
        expert_dropout=settings["expert_dropout"],
    )
    check_vocabulary(classifier, settings["preset"])
    classifier.preprocessor.sequence_length = settings["max_length"]
    return classifier


def check_vocabulary(classifier, preset):
    """Raises a ValueError unless a classifier has a tokenizer, with a row for every piece of it."""
    if classifier.preprocessor is None:
        raise ValueError(f"`preset` must have a tokenizer. Received: preset={str(preset)!r}")
    pieces = classifier.preprocessor.tokenizer.vocabulary_size()
    rows = classifier.backbone.vocabulary_size
    if pieces > rows:
        raise ValueError(
            f"`preset` must have a tokenizer of at most the {rows} pieces that its model knows. "
            f"Received: one of {pieces}, preset={str(preset)!r}"
        )


def _from_scratch(task, settings):
    preprocessor = EncoderTextClassifierPreprocessor(
        default_tokenizer(), sequence_length=settings["max_length"]
    )
    options = {
        "size": settings["size"],
        "architecture": "encoder",
        "vocabulary_size": _VOCABULARY_SIZE,
        "dropout": settings["dropout"],
    }
    if settings["model"] != "dense":
        expert_dropout = settings["expert_dropout"]
        options["num_experts"] = settings["num_experts"]
        options["expert_dropout"] = (
            settings["dropout"] if expert_dropout is None else expert_dropout
        )
    backbone = MODELS[settings["model"]](**options)
    return EncoderTextClassifier(
        backbone, task.num_classes, preprocessor, dropout=settings["dropout"]
    )
