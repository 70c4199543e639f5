import numpy as np
import pytest

import keras_moe
import zoo
from zoo.models import builders

TINY = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "key_dim": 8, "intermediate_dim": 32}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(builders.SIZES, "tiny", TINY)
    return "tiny"


def moe(model):
    return model.get_layer("block_2").feed_forward


def test_equal_active_flops(tiny):
    """Weights multiplied per token in the second block: dense, one expert, two half experts."""
    dense = moe(zoo.dense_transformer(tiny))
    switch = moe(zoo.switch_transformer(tiny))
    choice = moe(zoo.expert_choice_transformer(tiny))
    hashed = moe(zoo.hash_transformer(tiny))
    dense_weights = sum(int(np.prod(v.shape)) for v in dense.trainable_variables)

    def of_one_expert(layer):
        return sum(int(np.prod(v.shape[1:])) for v in layer.experts.trainable_variables)

    assert dense_weights == 2 * 16 * 32
    assert of_one_expert(switch) == of_one_expert(hashed) == dense_weights
    assert of_one_expert(choice) * choice.router.capacity_factor == dense_weights


def test_defaults_are_the_papers(tiny):
    switch, choice = moe(zoo.switch_transformer(tiny)), moe(zoo.expert_choice_transformer(tiny))
    assert isinstance(switch.router, keras_moe.SwitchRouter)
    assert (switch.router.capacity_factor, switch.router.eval_capacity_factor) == (1.25, 2.0)
    assert switch.experts.init_scale == 0.1
    assert isinstance(choice.router, keras_moe.ExpertChoiceRouter)
    assert choice.router.capacity_factor == 2.0
    hashed = moe(zoo.hash_transformer(tiny))
    assert type(hashed.router) is keras_moe.HashRouter
    assert (hashed.router.table, hashed.router.capacity_factor) == (None, None)
    for layer in (switch, choice, hashed):
        assert layer.experts.num_experts == 8


def test_options(tiny):
    router = keras_moe.SwitchRouter(capacity_factor=3.0)
    model = zoo.switch_transformer(
        tiny, num_experts=3, vocabulary_size=50, router=router, expert_init_scale=1.0
    )
    assert moe(model).experts.num_experts == 3
    assert moe(model).router.capacity_factor == 3.0
    assert moe(model).experts.init_scale == 1.0
    assert model.token_embedding.input_dim == 50
    model = zoo.switch_transformer(tiny, attention_experts=2, dropout=0.1, expert_dropout=0.4)
    assert model.get_layer("block_2").attention.query.experts.num_experts == 2
    assert (moe(model).experts.dropout, model.dropout) == (0.4, 0.1)
    choice = zoo.expert_choice_transformer(
        tiny, router=keras_moe.ExpertChoiceRouter(capacity_factor=1.0), intermediate_dim=64
    )
    assert moe(choice).experts.hidden_dim == 64
    hashed = zoo.hash_transformer(
        tiny, num_experts=3, router=keras_moe.HashRouter(table=[2, 0]), intermediate_dim=64
    )
    assert moe(hashed).router.table == [2, 0]
    assert (moe(hashed).experts.num_experts, moe(hashed).experts.hidden_dim) == (3, 64)
    assert zoo.dense_transformer(tiny, hidden_dim=32).hidden_dim == 32


def test_one_router_serves_many_models(tiny):
    router = keras_moe.SwitchRouter()
    zoo.switch_transformer(tiny, num_experts=2, router=router)
    zoo.switch_transformer(tiny, num_experts=4, router=router)
    assert router.num_experts is None


@pytest.mark.parametrize(
    "builder",
    [
        zoo.dense_transformer,
        zoo.switch_transformer,
        zoo.expert_choice_transformer,
        zoo.hash_transformer,
    ],
)
def test_unknown_size(builder):
    with pytest.raises(ValueError, match=r"`size` must be one of mini.*Did you mean 'small'"):
        builder("smal")
