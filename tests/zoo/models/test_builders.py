import numpy as np
import pytest

import keras_moe
import zoo
from zoo.models import builders
from zoo.models.deferred import Deferred

TINY = {
    "vocabulary_size": 60,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "key_dim": 8,
    "intermediate_dim": 32,
}
ENCODER = {"architecture": "encoder"}
BUILDERS = (
    zoo.dense_transformer,
    zoo.switch_transformer,
    zoo.expert_choice_transformer,
    zoo.hash_transformer,
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(builders.SIZES, "tiny", TINY)
    return "tiny"


def moe(model):
    return model.get_layer("block_2").feed_forward


def without_weights(build, *arguments, **options):
    """`build(...)`, with variables that have shapes only."""
    with Deferred():
        return build(*arguments, **options)


def test_equal_active_flops(tiny):
    """Weights multiplied per token in the second block: dense, one expert, two half experts."""
    dense = moe(zoo.dense_transformer(tiny, **ENCODER))
    switch = moe(zoo.switch_transformer(tiny, **ENCODER))
    choice = moe(zoo.expert_choice_transformer(tiny, **ENCODER))
    hashed = moe(zoo.hash_transformer(tiny, **ENCODER))
    dense_weights = sum(int(np.prod(v.shape)) for v in dense.trainable_variables)

    def of_one_expert(layer):
        return sum(int(np.prod(v.shape[1:])) for v in layer.experts.trainable_variables)

    assert dense_weights == 2 * 16 * 32
    assert of_one_expert(switch) == of_one_expert(hashed) == dense_weights
    assert of_one_expert(choice) * choice.router.capacity_factor == dense_weights


def test_defaults_are_the_papers(tiny):
    switch, choice = (
        moe(zoo.switch_transformer(tiny, **ENCODER)),
        moe(zoo.expert_choice_transformer(tiny, **ENCODER)),
    )
    assert isinstance(switch.router, keras_moe.SwitchRouter)
    assert (switch.router.capacity_factor, switch.router.eval_capacity_factor) == (1.25, 2.0)
    assert switch.experts.init_scale == 0.1
    assert isinstance(choice.router, keras_moe.ExpertChoiceRouter)
    assert choice.router.capacity_factor == 2.0
    hashed = moe(zoo.hash_transformer(tiny, **ENCODER))
    assert type(hashed.router) is keras_moe.HashRouter
    assert (hashed.router.table, hashed.router.capacity_factor) == (None, None)
    for layer in (switch, choice, hashed):
        assert layer.experts.num_experts == 8


def test_options(tiny):
    router = keras_moe.SwitchRouter(capacity_factor=3.0)
    model = zoo.switch_transformer(
        tiny, num_experts=3, vocabulary_size=50, router=router, expert_init_scale=1.0, **ENCODER
    )
    assert moe(model).experts.num_experts == 3
    assert moe(model).router.capacity_factor == 3.0
    assert moe(model).experts.init_scale == 1.0
    assert model.token_embedding.input_dim == 50
    options = {"attention_experts": 2, "dropout": 0.1, "expert_dropout": 0.4}
    model = zoo.switch_transformer(tiny, **options, **ENCODER)
    assert model.get_layer("block_2").attention.query.experts.num_experts == 2
    assert (moe(model).experts.dropout, model.dropout) == (0.4, 0.1)
    choice = zoo.expert_choice_transformer(
        tiny,
        router=keras_moe.ExpertChoiceRouter(capacity_factor=1.0),
        intermediate_dim=64,
        **ENCODER,
    )
    assert moe(choice).experts.hidden_dim == 64
    hashed = zoo.hash_transformer(
        tiny,
        num_experts=3,
        router=keras_moe.HashRouter(table=[2, 0]),
        intermediate_dim=64,
        **ENCODER,
    )
    assert moe(hashed).router.table == [2, 0]
    assert (moe(hashed).experts.num_experts, moe(hashed).experts.hidden_dim) == (3, 64)
    assert zoo.dense_transformer(tiny, hidden_dim=32).hidden_dim == 32


def test_one_router_serves_many_models(tiny):
    router = keras_moe.SwitchRouter()
    zoo.switch_transformer(tiny, num_experts=2, router=router)
    zoo.switch_transformer(tiny, num_experts=4, router=router)
    assert router.num_experts is None


def test_sparse_encoders_with_decoders(tiny):
    """The decoder routes by what does not look ahead: top-2 beside expert choice."""
    routers = {
        zoo.switch_transformer: (keras_moe.SwitchRouter, keras_moe.SwitchRouter),
        zoo.hash_transformer: (keras_moe.HashRouter, keras_moe.HashRouter),
        zoo.expert_choice_transformer: (keras_moe.ExpertChoiceRouter, keras_moe.TopKRouter),
    }
    for build, kinds in routers.items():
        model = build(tiny)
        for side, kind in zip(("encoder", "decoder"), kinds, strict=True):
            dense, sparse = (block.feed_forward for block in getattr(model, f"{side}_blocks"))
            assert type(sparse.router) is kind and not hasattr(dense, "router")
            width = 16 if build is zoo.expert_choice_transformer else 32
            assert (sparse.experts.num_experts, sparse.experts.hidden_dim) == (8, width)
    assert sparse.router.k == 2
    assert model.tie_embeddings


def test_decoders(tiny):
    for build in BUILDERS:
        model = build(tiny, architecture="decoder")
        assert isinstance(model, zoo.DecoderBackbone) and model.tie_embeddings
    model = zoo.expert_choice_transformer(tiny, architecture="decoder")
    assert moe(model).router.inference == "threshold"
    assert moe(model).experts.hidden_dim == 16
    assert zoo.expert_choice_transformer(tiny).expert_dim == 16


# Of google's checkpoints as transformers counts them, of T5's, and of the paper's Table 9.
PUBLISHED = [
    (zoo.switch_transformer, "base", 8, 619_339_008),
    (zoo.switch_transformer, "base", 16, 1_072_397_568),
    (zoo.switch_transformer, "base", 32, 1_978_514_688),
    (zoo.switch_transformer, "base", 64, 3_790_748_928),
    (zoo.switch_transformer, "base", 128, 7_415_217_408),
    (zoo.switch_transformer, "base", 256, 14_664_154_368),
    (zoo.switch_transformer, "large", None, 26_309_291_008),
    (zoo.switch_transformer, "xxl", None, 395e9),
    (zoo.switch_transformer, "c-2048", None, 1571e9),
    (zoo.dense_transformer, "small", None, 60_506_624),
    (zoo.dense_transformer, "base", None, 222_903_552),
    (zoo.dense_transformer, "large", None, 737_668_096),
    (zoo.dense_transformer, "xl", None, 2_849_757_184),
    (zoo.dense_transformer, "xxl", None, 11_135_332_352),
]


@pytest.mark.parametrize(("build", "size", "num_experts", "parameters"), PUBLISHED)
def test_published_numbers_of_parameters(build, size, num_experts, parameters):
    options = {} if num_experts is None else {"num_experts": num_experts}
    ours = zoo.figures(without_weights(build, size, **options)).parameters
    if isinstance(parameters, int):
        assert ours == parameters
    else:
        assert round(ours, -9) == parameters


@pytest.mark.parametrize(
    ("size", "num_experts", "millions"),
    [("100m", 16, 548), ("100m", 64, 1900), ("100m", 128, 3700), ("8b", 64, 143_000)],
)
def test_numbers_of_parameters_of_expert_choice(size, num_experts, millions):
    """The paper's Table 1 (https://arxiv.org/abs/2202.09368), as far as it is rounded there."""
    model = without_weights(
        zoo.expert_choice_transformer, size, num_experts, architecture="decoder"
    )
    assert zoo.figures(model).parameters / 1e6 == pytest.approx(millions, rel=0.02)


def test_the_decoder_sees_as_many_experts(tiny):
    for factor, k, width in ((1.0, 1, 32), (2.0, 2, 16), (4.0, 4, 8)):
        router = keras_moe.ExpertChoiceRouter(capacity_factor=factor)
        block = zoo.expert_choice_transformer(tiny, router=router).decoder_blocks[1].feed_forward
        assert (block.router.k, block.experts.hidden_dim) == (k, width)


@pytest.mark.parametrize("builder", BUILDERS)
def test_sizes_of_decoders_only(builder):
    for size in ("100m", "8b"):
        message = f"`architecture`.*'decoder'.*size='{size}'.*architecture='encoder_decoder'"
        with pytest.raises(ValueError, match=message):
            builder(size)


def test_vocabularies():
    for size, rows in (("mini", 8192), ("small", 32128)):
        model = without_weights(zoo.dense_transformer, size, **ENCODER)
        assert model.token_embedding.input_dim == rows


def test_a_dense_model_has_no_experts():
    with pytest.raises(ValueError, match="`num_experts`.*num_experts=4"):
        zoo.dense_transformer("mini", num_experts=4)


@pytest.mark.parametrize("builder", BUILDERS)
def test_what_is_no_router(builder):
    with pytest.raises(ValueError, match="`router`.*router='switch'"):
        builder("mini", router="switch")


@pytest.mark.parametrize("builder", BUILDERS)
def test_unknown_size_or_architecture(builder):
    with pytest.raises(ValueError, match="`size`.*mini.*size='smal'.*'small'"):
        builder("smal")
    message = "`architecture`.*'encoder_decoder', 'encoder', 'decoder'.*architecture='encoders'"
    with pytest.raises(ValueError, match=message):
        builder("mini", architecture="encoders")
