import math

import keras
import pytest

import zoo
from tests.zoo.models.test_builders import ENCODER, TINY
from tests.zoo.quantizing import quantize
from zoo.models import builders


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(builders.SIZES, "tiny", TINY)
    return "tiny"


def test_figures(tiny):
    """By hand: of 8 experts a token sees one, or two that are half as wide."""
    table, attention, dense = 60 * 16, 4 * 16 * 16, 2 * 16 * 32
    norms, buckets, router = 5 * 16, 32 * 2, 16 * 8
    rest = table + norms + buckets + 2 * attention
    for build, extra in (
        (zoo.dense_transformer, 0),
        (zoo.switch_transformer, router),
        (zoo.expert_choice_transformer, router),
        (zoo.hash_transformer, 0),
    ):
        ours = zoo.figures(build(tiny, **ENCODER))
        of_experts = {zoo.dense_transformer: dense, zoo.expert_choice_transformer: 4 * dense}
        assert ours.parameters == rest + extra + dense + of_experts.get(build, 8 * dense)
        assert ours.active_parameters == rest + extra + 2 * dense
        assert ours.training_flops_per_token == 6 * (2 * attention + 2 * dense + extra)
    model = zoo.dense_transformer(tiny)
    assert zoo.figures(model).training_flops_per_token == 6 * (table + 6 * attention + 4 * dense)
    untied = zoo.dense_transformer(tiny, tie_embeddings=False)
    assert zoo.figures(untied).parameters == zoo.figures(model).parameters + table
    assert zoo.figures(untied)[2] == zoo.figures(model)[2]
    assert zoo.figures(zoo.Seq2SeqLM(model)) == zoo.figures(model)


@pytest.mark.parametrize("model", [3, keras.Sequential([])])
def test_no_model_of_the_zoo(model):
    with pytest.raises(ValueError, match=f"`model`.*{type(model).__name__}"):
        zoo.figures(model)


def test_lora_weights_are_parameters_and_cost_nothing(tiny):
    """4 matrices of rank 3, beside those of the queries and the values: 16 x 3 or 3 x 16."""
    model = zoo.switch_transformer(tiny, **ENCODER)
    before = zoo.figures(model)
    model.enable_lora(3)
    after, added = zoo.figures(model), 2 * 4 * 16 * 3
    assert (after.parameters, after.active_parameters) == (before[0] + added, before[1] + added)
    assert after.training_flops_per_token == before.training_flops_per_token
    frozen = sum(math.prod(v.shape) for v in model.trainable_variables)
    assert frozen == added


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_what_is_quantized_counts(tiny, mode):
    for model in (zoo.switch_transformer(tiny, **ENCODER), zoo.dense_transformer(tiny)):
        before = zoo.figures(model)
        quantize(model, mode)
        assert any(v.dtype == "int8" for v in model.weights)
        assert zoo.figures(model) == before


def test_what_is_frozen_counts(tiny):
    model = zoo.switch_transformer(tiny)
    before = zoo.figures(model)
    model.decoder_blocks[1].trainable = False
    assert zoo.figures(model) == before
    model.trainable = False
    assert zoo.figures(model) == before
