"""What the backbones share; LoRA and bytes, which KerasHub and Keras bring."""

import re

import keras
import numpy as np
import pytest

import keras_moe
import zoo
from keras_moe import MixtureOfExperts
from tests.backend import numpy, outputs
from tests.zoo.quantizing import quantize
from zoo.layers import FeedForward
from zoo.models.blocks import Configured, feed_forward, mixture, sparse_numbers

V, L = 30, 6
TINY = {
    "vocabulary_size": V,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "key_dim": 4,
    "intermediate_dim": 12,
    "num_experts": 4,
}
KINDS = ("encoder", "decoder", "encoder and decoder")


def model(kind):
    """Two blocks on each side, the second of them sparse; the same weights on every backend."""
    made = fresh(kind)
    rng = np.random.default_rng(0)
    for variable in made.trainable_variables:
        variable.assign(0.5 * rng.normal(size=variable.shape))
    return made


def fresh(kind):
    if kind == "encoder":
        return zoo.EncoderTextClassifier(
            zoo.EncoderBackbone(**TINY, router=keras_moe.SwitchRouter()), 2
        )
    if kind == "decoder":
        router, options = keras_moe.TopKRouter(2), {"positions": "rotary", "gated": True}
        return zoo.CausalLM(zoo.DecoderBackbone(**TINY, **options, router=router))
    router = keras_moe.SwitchRouter(eval_capacity_factor=None)
    return zoo.Seq2SeqLM(zoo.EncoderDecoderBackbone(**TINY, router=router))


def inputs(lm, given=L):
    """Two texts, of which `given` tokens are there."""
    ids = np.random.default_rng(0).integers(2, V, (2, L)).astype("int32")
    result = {}
    for name in lm.input:
        is_mask = name.endswith("mask")
        result[name] = np.ones_like(ids) if is_mask else ids
        if is_mask and not name.startswith("encoder"):
            result[name] = np.broadcast_to(np.arange(L) < given, ids.shape).astype("int32")
    return result


def predicted(lm):
    return outputs(lm, inputs(lm))


def reloaded(lm, path):
    lm.save(path)
    return keras.saving.load_model(path)


@pytest.mark.parametrize(
    ("blocks", "num_layers", "expected"),
    [(None, 4, (2, 4)), (None, 3, (2,)), (None, 1, ()), ((), 2, ()), ([3, 1], 3, (3, 1))],
)
def test_sparse_numbers(blocks, num_layers, expected):
    assert sparse_numbers("blocks", blocks, num_layers) == expected


@pytest.mark.parametrize("blocks", [(0,), (1, 4), [-1], 2, "2", [1.0]])
def test_sparse_numbers_are_those_of_blocks(blocks):
    with pytest.raises(ValueError, match=f"^`blocks`.*3.*blocks={re.escape(repr(blocks))}$"):
        sparse_numbers("blocks", blocks, 3)


def test_a_mixture_has_its_own_copy_of_the_router():
    router = keras_moe.SwitchRouter(jitter=0.25, seed=3, name="mine")
    layers = [
        mixture(keras_moe.FeedForwardExperts(2, 4), router, 5, "float32", name)
        for name in ("a", "b")
    ]
    assert [layer.name for layer in layers] == ["a", "b"] and layers[0].group == 5
    assert len({id(router), *(id(layer.router) for layer in layers)}) == 3
    for layer in layers:
        expected = router.get_config() | {"name": "router", "num_experts": 2}  # its bank's
        assert layer.router.get_config() == expected


def of_block(**options):
    defaults = {
        "num_experts": 2,
        "expert_dim": 5,
        "intermediate_dim": 7,
        "group": 4,
        "activation": "gelu",
        "gated": True,
        "dropout": 0.1,
        "expert_dropout": 0.2,
        "expert_init_scale": 0.5,
        "dtype": "bfloat16",
        "name": "moe",
    }
    return feed_forward(**{"router": keras_moe.SwitchRouter(), **defaults, **options})


def test_feed_forward():
    layer = of_block()
    assert type(layer) is MixtureOfExperts and (layer.name, layer.group) == ("moe", 4)
    bank = layer.experts
    assert (bank.num_experts, bank.hidden_dim, bank.gated) == (2, 5, True)
    assert (bank.dropout, bank.init_scale) == (0.2, 0.5)
    assert bank.activation is keras.activations.gelu
    assert layer.compute_dtype == bank.compute_dtype == "bfloat16"
    assert of_block(expert_dim=None).experts.hidden_dim == 7
    for options in ({"router": None}, {"num_experts": 0}):
        layer = of_block(**options)
        assert type(layer) is FeedForward and layer.name == "feed_forward"
        assert (layer.hidden_dim, layer.gated, layer.dropout) == (7, True, 0.1)
        assert layer.activation is keras.activations.gelu and layer.compute_dtype == "bfloat16"


def test_arguments_are_attributes_and_config():
    """A router as its config, or Keras would take it for a layer of the backbone."""

    class Kept(Configured, keras.layers.Layer):
        def __init__(self, size, router=None, decoder_router=None, activation="relu", **kwargs):
            super().__init__(**kwargs)
            self.keep(size=size, router=router)
            self.keep(decoder_router=decoder_router, activation=activation)

    router = keras_moe.SwitchRouter(jitter=0.5)
    made = Kept(3, router, activation="gelu", name="kept")
    assert made.size == 3 and made.activation is keras.activations.gelu
    made.trainable = False
    assert router.trainable  # it is no sub-layer
    made.trainable = True
    config = made.get_config()
    assert (config["size"], config["activation"], config["name"]) == (3, "gelu", "kept")
    assert config["decoder_router"] is None and config["router"] == made.router_config
    again = Kept.from_config(config)
    assert again.get_config() == config and again.router_config["config"]["jitter"] == 0.5


class TestLora:
    def test_only_queries_and_values_of_dense_attention_learn(self, tmp_path):
        """Of both blocks and, in a decoder, of its attention to the encoder."""
        for kind, names in (
            ("encoder", {"block_1/attention", "block_2/attention"}),
            (
                "encoder and decoder",
                {f"encoder_block_{n}/attention" for n in (1, 2)}
                | {f"decoder_block_{n}/{a}attention" for n in (1, 2) for a in ("", "cross_")},
            ),
        ):
            backbone = model(kind).backbone
            backbone.enable_lora(2)
            assert {v.path for v in backbone.trainable_variables} == {
                f"{name}/{part}/lora_kernel_{letter}"
                for name in names
                for part in ("query", "value")
                for letter in "ab"
            }

    def test_queries_made_by_experts_do_not_learn(self):
        router = keras_moe.SwitchRouter()
        backbone = zoo.EncoderBackbone(**TINY, router=router, attention_experts=2)
        backbone.enable_lora(2)
        paths = {v.path for v in backbone.trainable_variables}
        assert paths and all(path.startswith("block_1/attention/") for path in paths)

    def test_it_learns_and_comes_back_with_what_it_learnt(self, tmp_path):
        """All else is as it was, experts and routers too; in the file it is part of the kernels."""
        keras.utils.set_random_seed(0)
        lm = model("decoder")
        lm.backbone.enable_lora(2)
        before = {v.path: numpy(v) for v in lm.weights if v.dtype == "float32"}  # not seeds
        at_first = predicted(lm)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        lm.compile(keras.optimizers.Adam(0.03), loss, sampler="greedy")
        x = inputs(lm)
        lm.fit(x, x["token_ids"], epochs=10, verbose=0)
        first, last = (float(loss(x["token_ids"], y)) for y in (at_first, predicted(lm)))
        assert last < first - 0.03
        after = {v.path: numpy(v) for v in lm.weights if v.path in before}
        learnt = {path for path, value in after.items() if (value != before[path]).any()}
        parts = {path for path in before if path.rpartition("/")[2].startswith("lora_")}
        counted = {path for path in before if "moe_2" in path and "kernel" not in path}
        assert len(parts) == 2 * 2 * 2 and parts <= learnt <= parts | counted
        assert np.abs(predicted(lm) - at_first).max() > 1e-3

        again = reloaded(lm, tmp_path / "model.keras")
        np.testing.assert_allclose(predicted(again), predicted(lm), rtol=1e-5, atol=1e-5)
        assert not any("lora" in v.path for v in again.weights)
        query = again.backbone.blocks[0].attention.query.kernel
        merged = lm.backbone.blocks[0].attention.query.kernel
        np.testing.assert_allclose(numpy(query), numpy(merged), rtol=1e-6, atol=1e-6)

    def test_its_weights_in_a_file_of_their_own(self, tmp_path):
        lm = model("decoder")
        lm.backbone.enable_lora(2)
        lm.save_weights(tmp_path / "all.weights.h5")
        for variable in lm.trainable_variables:
            variable.assign(np.random.default_rng(1).normal(size=variable.shape))
        lm.backbone.save_lora_weights(str(tmp_path / "few.lora.h5"))
        again = model("decoder")
        again.load_weights(tmp_path / "all.weights.h5")
        again.backbone.load_lora_weights(str(tmp_path / "few.lora.h5"))
        np.testing.assert_allclose(predicted(again), predicted(lm), rtol=1e-5, atol=1e-5)


class TestBytes:
    @pytest.mark.parametrize("kind", KINDS)
    def test_dense_kernels_are_bytes_and_the_model_comes_back(self, kind, tmp_path):
        """Experts, routers and what makes the classes stay as they are, bit by bit."""
        lm = model(kind)
        before, at_first = {v.path: numpy(v) for v in lm.trainable_variables}, predicted(lm)
        quantize(lm)
        kernels = {v.path: v for v in lm.weights if "/kernel" in v.path and "scale" not in v.path}
        kept = {path for path in kernels if "moe_2" in path or path.startswith("logits")}
        assert len(kept) == {"encoder": 3 + 1, "decoder": 4, "encoder and decoder": 6}[kind]
        assert {path for path, kernel in kernels.items() if kernel.dtype != "int8"} == kept
        for path in kept:
            np.testing.assert_array_equal(numpy(kernels[path]), before[path])
        ours = predicted(lm)
        error = np.abs(ours - at_first).max() / np.abs(at_first).max()
        assert 0 < error < 0.1

        again = reloaded(lm, tmp_path / "model.keras")
        assert [(v.path, v.dtype) for v in again.weights] == [(v.path, v.dtype) for v in lm.weights]
        np.testing.assert_array_equal(predicted(again), ours)

    @pytest.mark.parametrize("kind", ["decoder", "encoder and decoder"])
    def test_texts_are_written_and_the_preset_writes_the_same(self, kind, tmp_path):
        lm = model(kind)
        quantize(lm)
        x = inputs(lm, given=2)
        (name,) = (name for name in x if name.endswith("token_ids") and "encoder" not in name)
        lm.compile(sampler="greedy")
        ours = numpy(lm.generate(x, stop_token_ids=None)[name])
        np.testing.assert_array_equal(ours[:, :2], x[name][:, :2])
        whole = inputs(lm) | {name: ours}
        best = outputs(lm, whole).argmax(axis=-1)
        np.testing.assert_array_equal(ours[:, 2:], best[:, 1:-1])

        lm.save_to_preset(str(tmp_path / "preset"))
        again = zoo.from_preset(tmp_path / "preset")
        again.compile(sampler="greedy")
        np.testing.assert_array_equal(numpy(again.generate(x, stop_token_ids=None)[name]), ours)

    def test_a_classifier_keeps_its_last_layer_unless_told_otherwise(self):
        classifier = model("encoder")
        quantize(classifier)
        assert classifier.get_layer("logits").kernel.dtype == "float32"
        classifier = model("encoder")
        classifier.quantize("int8", filters=lambda layer: layer.name == "logits")
        assert [v.path for v in classifier.weights if v.dtype == "int8"] == ["logits/kernel"]
