import pytest

import zoo
from tests.zoo.finetuning.small import TINY, load, run
from zoo.finetuning import batches
from zoo.models import builders


@pytest.fixture(autouse=True, scope="package")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(builders.SIZES, "tiny", TINY)
        patch.setattr(batches.data, "load", load)
        yield


@pytest.fixture(scope="package")
def whole(small, tmp_path_factory):
    """A run of ten epochs that nothing disturbed, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    return run(folder, epochs=10), folder


def pretrained(folder, build, **options):
    backbone = build("tiny", architecture="encoder", vocabulary_size=8192, **options)
    preprocessor = zoo.EncoderTextClassifierPreprocessor(zoo.default_tokenizer(), 8)
    zoo.EncoderMaskedLM(backbone, preprocessor).save_to_preset(str(folder))
    return str(folder)


@pytest.fixture(scope="package")
def masked_lm(small, tmp_path_factory):
    """The preset of an encoder with experts, as pretraining leaves it."""
    folder = tmp_path_factory.mktemp("masked") / "preset"
    return pretrained(folder, zoo.switch_transformer, num_experts=4)


@pytest.fixture(scope="package")
def dense_masked_lm(small, tmp_path_factory):
    """Likewise, without experts."""
    return pretrained(tmp_path_factory.mktemp("dense") / "preset", zoo.dense_transformer)
