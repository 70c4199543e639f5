import pytest

import zoo
from tests.zoo.finetuning.small import TINY, load, run
from tests.zoo.kills import copied_after_epoch
from tests.zoo.traces import counted_traces
from zoo.finetuning import batches
from zoo.models import builders


@pytest.fixture(autouse=True, scope="package")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(builders.SIZES, "tiny", TINY)
        patch.setattr(batches.data, "load", load)
        yield


@pytest.fixture(scope="package")
def counted(small, tmp_path_factory):
    """A run of ten epochs that nothing interrupted.

    Returns:
        Tuple of its results, its folder, a copy of its folder after its eighth epoch, and how often
        its step was traced.
    """
    folder, killed = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("killed") / "run"
    with counted_traces() as traces, copied_after_epoch(8, killed):
        results = run(folder, epochs=10)
    return results, folder, killed, len(traces)


@pytest.fixture(scope="package")
def whole(counted):
    """The results and the folder of that run."""
    return counted[:2]


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
