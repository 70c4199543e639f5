import pytest

from tests.house import House

ORDER = (
    "__init__",  # imports when a name is asked for
    "extras",
    "tokenizer",
    "train_tokenizer",
    "batches",
    "layers",
    "decoder_layers",
    "models.__init__",
    "models.blocks",
    "models.deferred",
    "models.pooling",
    "models.encoder",
    "models.masked_lm",
    "models.generation",
    "models.encoder_decoder",
    "models.decoder",
    "models.adaptive_mixture",
    "models.builders",
    "models.figures",
    "models.moe_lstm",
    "schedules",
    "catalogue",
    "files",
    "hub",
    "conversion.tensors",
    "conversion.config",
    "conversion.tokenizers",
    "conversion.t5",
    "conversion.decoders",
    "conversion.folder",
    "conversion.__init__",
    "presets",
    "tasks.lexicon",
    "tasks.acceptability",
    "tasks.spans",
    "tasks.forms",
    "tasks.task",
    "tasks.data",
    "tasks.answers",
    "tasks.metrics",
    "tasks.suites",
    "tasks.text_to_text",
    "tasks.text_scores",
    "tasks.mixtures",
    "tasks.submission",
    "tasks.raw_files",
    "tasks.raw",
    "tasks.raw_superglue",
    "tasks.prepare",
    "tasks.__init__",
    "runs",
    "recipes",
    "finetuning.__init__",
    "finetuning.batches",
    "finetuning.scores",
    "finetuning.classifiers",
    "finetuning.trainable",
    "finetuning.settings",
    "finetuning.run",
    "finetuning.summary",
    "finetuning.suite",
    "finetuning.compare",
    "finetuning.evaluate",
    "pretraining.__init__",
    "pretraining.datasets",
    "pretraining.sources",
    "pretraining.mixture",
    "pretraining.text",
    "pretraining.objectives",
    "pretraining.feed",
    "pretraining.build",
    "pretraining.run",
    "cli",
    "__main__",
)
HOUSE = House("zoo", ORDER)


@pytest.mark.one_backend
def test_the_order_names_every_file():
    assert HOUSE.files() == set(ORDER)


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ORDER)
def test_imports_only_from_above(name):
    assert list(HOUSE.not_from_above(name)) == []
