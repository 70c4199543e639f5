"""The classifier that a run trains: built from scratch, or made of a preset."""

from zoo.models.builders import MODELS
from zoo.models.encoder import EncoderTextClassifier, EncoderTextClassifierPreprocessor
from zoo.presets import from_preset
from zoo.tokenizer import default_tokenizer

_VOCABULARY_SIZE = 8192  # the shipped tokenizer's 8,000 pieces, rounded up as in pretraining


def build(task, settings):
    """The classifier of a run.

    Args:
        task: a `Task`.
        settings: see `zoo.finetuning.settings.settle`.

    Returns:
        A `zoo.EncoderTextClassifier` with its preprocessor, and a new head.

    Raises:
        ValueError: if the preset cannot be read, or does not go with its tokenizer.
    """
    if settings["preset"] is None:
        backbone, preprocessor = _from_scratch(settings)
    else:
        rates = {name: settings[name] for name in ("dropout", "expert_dropout")}
        pretrained = from_preset(
            settings["preset"],
            num_classes=task.num_classes,
            load_weights=settings["load_weights"],
            **rates,
        )
        check_vocabulary(pretrained, settings["preset"])
        backbone, preprocessor = pretrained.backbone, pretrained.preprocessor
        preprocessor.sequence_length = settings["max_length"]
        # A head that mixed layers has frozen it.
        backbone.get_layer("output_norm").trainable = True
    is_apart = settings["pairs"] == "apart"
    return EncoderTextClassifier(
        backbone,
        task.num_classes,
        preprocessor,
        dropout=settings["dropout"],
        separator=preprocessor.tokenizer.end_token_id if is_apart else None,
        mix_layers=settings["mix_layers"],
    )


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


def _from_scratch(settings):
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
    return MODELS[settings["model"]](**options), preprocessor
