import inspect
import re

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_moe
import zoo
from tests.backend import numpy

V = 40
TINY = {
    "vocabulary_size": V,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 8,
    "key_dim": 4,
    "intermediate_dim": 12,
    "num_experts": 4,
}
ROTARY = {
    "positions": "rotary",
    "num_key_value_heads": 2,
    "max_wavelength": 50,
    "normalize_queries": True,
    "gated": True,
}
THRESHOLD = keras_moe.ExpertChoiceRouter(capacity_factor=1.0, inference="threshold")
KINDS = {
    "relative, expert choice": {"router": THRESHOLD, "gated_experts": True},
    "rotary, top-2": {"router": keras_moe.TopKRouter(2), **ROTARY},
    "dense": {"router": None},
}


def model(kind="relative, expert choice", **options):
    """Weights of normal size, so that all of them matter."""
    backbone = zoo.DecoderBackbone(**(TINY | KINDS[kind] | options))
    rng = np.random.default_rng(0)
    for variable in backbone.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    for block in backbone.blocks:
        if hasattr(getattr(block.feed_forward, "router", None), "threshold"):
            block.feed_forward.router.threshold.assign([0.2, 0.3, 0.4, 0.1])
    return zoo.CausalLM(backbone)


def inputs(lengths=(8, 5), seed=0):
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    token_ids = np.random.default_rng(seed).integers(2, V, mask.shape)
    return {"token_ids": np.where(mask, token_ids, 0), "padding_mask": mask.astype("int32")}


@pytest.fixture(scope="module", params=KINDS)
def lm(request):
    return model(request.param)


def logits(lm, x):
    return lm.predict(x, verbose=0)


@pytest.mark.every_backend
def test_no_token_sees_a_later_one(lm):
    x, later = inputs(), inputs()
    later["token_ids"][0, 5:] = V + 1 - later["token_ids"][0, 5:]
    before, after = logits(lm, x), logits(lm, later)
    np.testing.assert_allclose(after[:, :5], before[:, :5], rtol=1e-5, atol=1e-5)
    assert (np.abs(after[0, 5:] - before[0, 5:]).max(axis=-1) > 1e-3).all()


def test_order_matters(lm):
    """The last token's logits, when two tokens before it change places."""
    x, other = inputs(), inputs()
    other["token_ids"][0, [2, 5]] = x["token_ids"][0, [5, 2]]
    assert np.abs(logits(lm, other) - logits(lm, x))[0, 7].max() > 1e-3


class TestGenerate:
    def prompts(self):
        """Prompts of 2 and of 4 tokens, to be filled up to 8."""
        x = inputs((8, 8))
        given = np.arange(8) < np.array([[2], [4]])
        x["token_ids"] = np.where(given, x["token_ids"], 0)
        return {**x, "padding_mask": given.astype("int32")}

    def generated(self, lm, x, sampler="greedy"):
        lm.compile(sampler=sampler)
        return numpy(lm.generate(x, stop_token_ids=None)["token_ids"])

    @pytest.mark.every_backend
    def test_greedy_is_the_best_token_of_the_whole_model(self, lm):
        x = self.prompts()
        ours = self.generated(lm, x)
        tokens, given = x["token_ids"].copy(), x["padding_mask"] == 1
        for place in range(2, 8):
            mask = np.broadcast_to(np.arange(8) < place, (2, 8)).astype("int32")
            scores = logits(lm, {"token_ids": tokens, "padding_mask": mask})
            best = scores[:, place - 1].argmax(axis=-1)
            tokens[:, place] = np.where(given[:, place], tokens[:, place], best)
        np.testing.assert_array_equal(ours, tokens)
        assert len(np.unique(ours)) > 4

    def test_a_batch_says_what_each_says_alone(self, lm):
        x = self.prompts()
        together = self.generated(lm, x)
        for row in range(2):
            alone = {name: value[row : row + 1] for name, value in x.items()}
            np.testing.assert_array_equal(self.generated(lm, alone), together[row : row + 1])

    @pytest.mark.parametrize(
        "sampler",
        [
            keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.7),
            keras_hub.samplers.BeamSampler(num_beams=3),
        ],
        ids=["contrastive", "beam"],
    )
    def test_a_batch_says_what_each_says_alone_whatever_the_sampler(self, sampler):
        lm, x = model("rotary, top-2"), self.prompts()
        together = self.generated(lm, x, sampler)
        assert (together != self.generated(lm, x)).any()
        for row in range(2):
            alone = {name: value[row : row + 1] for name, value in x.items()}
            ours = self.generated(lm, alone, sampler)
            np.testing.assert_array_equal(ours, together[row : row + 1])


def test_a_text_does_not_depend_on_the_length_it_is_filled_up_to():
    """Though the router's capacity in inference does, which writing a text does without."""
    router = keras_moe.SwitchRouter(eval_capacity_factor=0.5, min_capacity=1)
    lm = model(router=router, num_experts=2)
    x = TestGenerate().prompts()
    texts = {}
    for length in (8, 24):
        longer = {name: np.pad(value, ((0, 0), (0, length - 8))) for name, value in x.items()}
        texts[length] = numpy(lm.generate(longer, stop_token_ids=None)["token_ids"])[:, :8]
    np.testing.assert_array_equal(texts[8], texts[24])
    scores = logits(lm, {"token_ids": texts[8], "padding_mask": np.ones((2, 8), "int32")})
    assert (scores[:, :-1].argmax(axis=-1) != texts[8][:, 1:])[0, 2:].any()  # where tokens drop


def test_writing_leaves_no_trace_in_the_statistics():
    lm = model()
    (mixture,) = (b.feed_forward for b in lm.backbone.blocks if hasattr(b.feed_forward, "router"))
    lm.generate(TestGenerate().prompts(), stop_token_ids=None)
    assert not numpy(mixture.statistics[0]).any()
    logits(lm, inputs())
    lm.evaluate(inputs(), inputs()["token_ids"], verbose=0)
    assert numpy(mixture.statistics[0]).any()


@pytest.mark.parametrize(
    "mask", [[[0, 0, 0], [1, 0, 0]], [[0, 1, 1], [1, 1, 0]], [[1, 0, 1], [1, 1, 0]]]
)
def test_prompts_that_are_none(lm, mask):
    x = {"token_ids": np.ones((2, 3), "int32"), "padding_mask": np.array(mask)}
    with pytest.raises(ValueError, match=f"`padding_mask`.*{re.escape(str(mask))}"):
        lm.generate(x, stop_token_ids=None)


def test_samplers():
    lm = model()
    assert type(lm.sampler) is keras_hub.samplers.GreedySampler
    with pytest.raises(ValueError, match="`sampler`.*return_all_beams=True"):
        lm.compile(sampler=keras_hub.samplers.BeamSampler(return_all_beams=True))


def test_other_weights_say_something_else_and_so_do_other_variables():
    lm, x = model(), TestGenerate().prompts()
    first = TestGenerate().generated(lm, x)
    lm.backbone.token_embedding.embeddings.assign(np.random.default_rng(1).normal(size=(V, 8)))
    second = numpy(lm.generate(x, stop_token_ids=None)["token_ids"])
    assert (second != first).any()
    lm.backbone.blocks[0].attention.query.enable_lora(2)
    lm.backbone.blocks[0].attention.query.lora_kernel_b.assign(10 * np.ones((2, 16)))
    assert (TestGenerate().generated(lm, x) != second).any()


def test_compiling_anew_and_eagerly_forgets_what_was_recorded():
    lm, x = model("dense"), TestGenerate().prompts()
    first = TestGenerate().generated(lm, x)
    lm.backbone.logits = lambda outputs: -zoo.DecoderBackbone.logits(lm.backbone, outputs)
    assert (TestGenerate().generated(lm, x) != first).any()
    steps = []
    lm.step = lambda *arguments: steps.append(1) or type(lm).step(lm, *arguments)
    lm.compile(run_eagerly=True)
    for _ in range(2):
        steps.clear()
        lm.generate(x, stop_token_ids=None)
        # Every one of them; JAX traces the loop also then.
        assert len(steps) >= (1 if keras.backend.backend() == "jax" else 6)


def test_generates_in_lower_precision():
    lm = model("rotary, top-2", dtype="bfloat16")
    x = TestGenerate().prompts()
    ours, given = TestGenerate().generated(lm, x), x["padding_mask"] == 1
    np.testing.assert_array_equal(ours[given], x["token_ids"][given])
    full = np.ones((2, 8), "int32")
    scores = lm.predict({"token_ids": ours, "padding_mask": full}, verbose=0).astype("float32")
    chosen = np.take_along_axis(scores[:, :-1], ours[:, 1:, None], axis=-1)[..., 0]
    best = scores[:, :-1].max(axis=-1)
    assert (chosen >= best - 0.1 * np.abs(best))[~given[:, 1:]].all()  # nearly the best


def test_texts(tmp_path):
    keras.utils.set_random_seed(0)  # first: on TensorFlow it does away with tokenizers
    preprocessor = zoo.CausalLMPreprocessor(zoo.default_tokenizer(), sequence_length=8)
    options = {**ROTARY, "vocabulary_size": 8000, "router": keras_moe.TopKRouter(2), "dropout": 0.0}
    lm = zoo.CausalLM(zoo.DecoderBackbone(**(TINY | options)), preprocessor)
    lm.compile(keras.optimizers.Adam(0.03), sampler="greedy")
    losses = lm.fit(["a fox runs", "the dog"], batch_size=2, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    said = lm.generate(["a fox", "the"], max_length=6)
    assert len(said) == 2 and said[0].startswith("a fox")

    lm.save_to_preset(tmp_path / "preset")
    loaded = zoo.CausalLM.from_preset(str(tmp_path / "preset"))
    loaded.compile(sampler="greedy")
    assert loaded.generate(["a fox", "the"], max_length=6) == said


def test_options_reach_the_layers():
    options = {"expert_dropout": 0.3, "expert_init_scale": 0.5, "group": 4, "expert_dim": 20}
    options |= {"num_buckets": 8, "max_distance": 16, "dropout": 0.2, "activation": "gelu"}
    backbone = model("relative, expert choice", **options, epsilon=1e-3).backbone
    bias = backbone.position_bias
    assert (bias.num_buckets, bias.max_distance, bias.bidirectional) == (8, 16, False)
    dense, sparse = backbone.blocks
    assert dense.feed_forward.dropout == dense.dropout == dense.attention.dropout == 0.2
    assert not dense.feed_forward.gated
    moe = sparse.feed_forward
    assert (moe.group, moe.experts.hidden_dim, moe.experts.gated) == (4, 20, True)
    assert (moe.experts.dropout, moe.experts.init_scale) == (0.3, 0.5)
    assert moe.experts.activation is keras.activations.gelu
    assert backbone.output_norm.epsilon == dense.attention_norm.epsilon == 1e-3
    assert backbone.get_layer("embedding_dropout").rate == 0.2

    backbone = model("rotary, top-2", sparse_blocks=[1], epsilon=1e-3).backbone
    sparse, dense = backbone.blocks
    assert hasattr(sparse.feed_forward, "router") and not hasattr(dense.feed_forward, "router")
    assert sparse.feed_forward.experts.gated and dense.feed_forward.gated
    attention = dense.attention
    assert (attention.num_key_value_heads, attention.max_wavelength) == (2, 50)
    assert attention.normalize and attention.epsilon == 1e-3


def test_logits_are_made_by_the_table_or_by_weights_of_their_own():
    ones = np.ones((1, 8), "float32")
    for options, factor in (
        ({}, 8**-0.5),
        ({"scale_outputs": False}, 1.0),
        ({"tie_embeddings": False}, 1.0),
    ):
        backbone = model("dense", **options).backbone
        table = backbone.token_embedding
        kernel = numpy(table.embeddings).T if table.tie_weights else table.reverse_embeddings
        expected = ones @ numpy(ops.convert_to_tensor(kernel)) * factor
        np.testing.assert_allclose(
            numpy(backbone.logits(ops.convert_to_tensor(ones))), expected, rtol=1e-5, atol=1e-6
        )


def test_every_config_key_makes_the_round_trip():
    changed = {
        **TINY,
        **ROTARY,
        "num_experts": 3,
        "router": keras_moe.TopKRouter(2),
        "expert_dim": 5,
        "sparse_blocks": (1,),
        "group": 4,
        "activation": "gelu",
        "gated_experts": False,
        "num_buckets": 8,
        "max_distance": 20,
        "tie_embeddings": False,
        "scale_outputs": True,
        "dropout": 0.2,
        "expert_dropout": 0.3,
        "expert_init_scale": 0.5,
        "epsilon": 1e-3,
        "facts": {"max_position_embeddings": 30},
    }
    parameters = inspect.signature(zoo.DecoderBackbone).parameters
    assert set(changed) | {"dtype", "name", "trainable"} == set(parameters)
    backbone = zoo.DecoderBackbone(**changed)
    config = backbone.get_config()
    for name in set(changed) - {"router"}:
        assert config[name] == changed[name], name
        assert config[name] != parameters[name].default, name
    again = zoo.DecoderBackbone.from_config(config)
    assert again.get_config() == config
    assert [v.shape for v in again.variables] == [v.shape for v in backbone.variables]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse_blocks": [3]}, r"`sparse_blocks`.*2.*sparse_blocks=\[3\]"),
        ({"positions": "sinusoidal"}, "`positions`.*'relative', 'rotary'.*positions='sinusoidal'"),
        (
            {"router": keras_moe.ExpertChoiceRouter()},
            "`router`.*`inference='threshold'`.*router=<ExpertChoiceRouter",
        ),
        (
            {"router": keras_moe.SwitchRouter(), "group": "batch"},
            "`group`.*'sequence'.*group='batch', router=<SwitchRouter",
        ),
        (
            {"positions": "rotary", "num_key_value_heads": 3},
            "`num_heads`.*`num_key_value_heads`.*num_key_value_heads=3",
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.DecoderBackbone(**(TINY | options))
