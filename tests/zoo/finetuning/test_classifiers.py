import json

import keras
import numpy as np
import pytest

import zoo
from keras_moe.reading import mixtures
from tests.backend import numpy
from tests.zoo.finetuning.small import run
from zoo.finetuning.classifiers import build, check_vocabulary
from zoo.finetuning.settings import settle
from zoo.tasks.task import get


@pytest.mark.parametrize(
    ("options", "rates"), [({}, (0.3, 0.3)), ({"expert_dropout": 0.5}, (0.3, 0.5))]
)
def test_dropout_reaches_a_model_built_from_scratch(options, rates):
    settings = settle("glue/cola", size="tiny", num_experts=4, dropout=0.3, **options)
    model = build(get("glue/cola"), settings)
    assert (model.backbone.dropout, model.backbone.expert_dropout) == rates
    assert model.dropout == 0.3


def test_a_preset_gets_other_rates_and_keeps_its_weights(masked_lm):
    settings = settle("glue/mnli", preset=masked_lm, dropout=0.3, max_length=12)
    model = build(get("glue/mnli"), settings)
    assert (model.backbone.dropout, model.backbone.expert_dropout) == (0.3, 0.4)
    (moe,) = mixtures(model.backbone).values()
    assert moe.experts.dropout == 0.4 and model.backbone.get_layer("embedding_dropout").rate == 0.3
    assert model.num_classes == 3 and model.preprocessor.sequence_length == 12
    for one, other in zip(
        zoo.from_preset(masked_lm).backbone.weights, model.backbone.weights, strict=True
    ):
        np.testing.assert_array_equal(numpy(one), numpy(other), err_msg=one.path)


def test_a_preset_with_new_weights(masked_lm):
    """By the seed that was set: each run of several has its own."""
    settings = settle("glue/mnli", preset=masked_lm, load_weights=False)
    kernels = [numpy(zoo.from_preset(masked_lm).backbone.get_layer("token_embedding").weights[0])]
    for seed in (0, 0, 1):
        keras.utils.set_random_seed(seed)
        model = build(get("glue/mnli"), settings)
        assert model.backbone.get_config()["num_experts"] == 4
        kernels.append(numpy(model.backbone.get_layer("token_embedding").weights[0]))
    loaded, zero, again, one = kernels
    np.testing.assert_array_equal(zero, again)
    for other in (one, loaded):
        assert np.abs(zero - other).max() > 0.1 * zero.std()


@pytest.mark.parametrize("begin", ["scratch", "preset"])
def test_pairs_are_told_apart_by_the_token_that_ends_a_text(masked_lm, begin):
    options = {"preset": masked_lm} if begin == "preset" else {"size": "tiny", "num_experts": 4}
    for pairs, separator in (("apart", 1), ("together", None)):
        model = build(get("glue/rte"), settle("glue/rte", pairs=pairs, **options))
        assert model.separator == separator


@pytest.mark.parametrize("begin", ["scratch", "preset"])
def test_layers_are_mixed(masked_lm, begin):
    options = {"preset": masked_lm} if begin == "preset" else {"size": "tiny", "num_experts": 4}
    for mix_layers in (True, False):
        model = build(get("glue/rte"), settle("glue/rte", mix_layers=mix_layers, **options))
        assert model.mix_layers is mix_layers


def test_a_new_head_thaws_what_the_one_before_had_frozen(masked_lm, tmp_path):
    settings = settle("glue/rte", preset=masked_lm, max_length=12)
    build(get("glue/rte"), settings).save_to_preset(str(tmp_path))
    assert not zoo.from_preset(tmp_path).backbone.get_layer("output_norm").trainable_weights
    model = build(get("glue/cola"), settle("glue/cola", preset=tmp_path, max_length=12))
    assert model.backbone.get_layer("output_norm").trainable_weights


def test_the_rates_of_a_preset_stay_unless_others_are_given(masked_lm):
    backbone = zoo.from_preset(masked_lm, num_classes=2).backbone
    assert (backbone.dropout, backbone.expert_dropout) == (0.1, 0.1)
    other = zoo.from_preset(masked_lm, num_classes=2, expert_dropout=0.2).backbone
    assert (other.dropout, other.expert_dropout) == (0.1, 0.2)


def test_a_preset_without_a_tokenizer(masked_lm, tmp_path):
    zoo.EncoderTextClassifier(zoo.from_preset(masked_lm).backbone, 2).save_to_preset(str(tmp_path))
    with pytest.raises(ValueError, match=f"`preset`.*{tmp_path}"):
        run(tmp_path / "run", preset=tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_preset_that_knows_fewer_pieces_than_its_tokenizer(masked_lm, tmp_path):
    tokens = zoo.from_preset(masked_lm).preprocessor
    backbone = zoo.dense_transformer("tiny", 100, architecture="encoder")
    zoo.EncoderTextClassifier(backbone, 2).save_to_preset(str(tmp_path))
    tokens.save_to_preset(str(tmp_path))
    path = tmp_path / "task.json"
    config = json.loads(path.read_text())
    config["config"]["preprocessor"] = json.loads((tmp_path / "preprocessor.json").read_text())
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"`preset`.*100.*8000.*{tmp_path}"):
        check_vocabulary(zoo.from_preset(tmp_path), tmp_path)
    with pytest.raises(ValueError, match=f"`preset`.*100.*8000.*{tmp_path}"):
        run(tmp_path / "run", preset=tmp_path)
    assert not (tmp_path / "run").exists()
