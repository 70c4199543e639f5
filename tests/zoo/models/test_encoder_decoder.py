import inspect

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
    "num_heads": 2,
    "hidden_dim": 8,
    "key_dim": 4,
    "intermediate_dim": 12,
    "num_experts": 4,
}
TEXTS = {"encoder_text": ["a fox", "the dog runs home"], "decoder_text": ["fox", "a dog"]}


def model(router=None, seed=0, **options):
    """Weights of normal size, so that all of them matter; nothing is dropped in inference."""
    router = router or keras_moe.SwitchRouter(eval_capacity_factor=None)
    backbone = zoo.EncoderDecoderBackbone(**(TINY | {"router": router} | options))
    rng = np.random.default_rng(seed)
    for variable in backbone.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return zoo.Seq2SeqLM(backbone)


def inputs(seed=0, lengths=(7, 4), decoder_length=6):
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return {
        "encoder_token_ids": np.where(mask, rng.integers(2, V, mask.shape), 0),
        "encoder_padding_mask": mask.astype("int32"),
        "decoder_token_ids": rng.integers(2, V, (len(lengths), decoder_length)),
        "decoder_padding_mask": np.ones((len(lengths), decoder_length), "int32"),
    }


@pytest.fixture(scope="module")
def lm():
    return model()


def logits(lm, x):
    return lm.predict(x, verbose=0)


def test_no_token_sees_a_later_one(lm):
    x = inputs()
    later = {**x, "decoder_token_ids": x["decoder_token_ids"].copy()}
    later["decoder_token_ids"][:, 4:] = [[3, 9], [11, 5]]
    before, after = logits(lm, x), logits(lm, later)
    np.testing.assert_allclose(after[:, :4], before[:, :4], rtol=1e-5, atol=1e-5)
    assert (np.abs(after[:, 4:] - before[:, 4:]).max(axis=-1) > 1e-3).all()


def test_padding_of_the_encoder_does_not_matter(lm):
    x, other = inputs(), inputs()
    other["encoder_token_ids"][1, 4:] = 7
    np.testing.assert_allclose(logits(lm, other), logits(lm, x), rtol=1e-5, atol=1e-5)
    other["encoder_token_ids"][0, 6] += 1  # a token that is none
    assert np.abs(logits(lm, other) - logits(lm, x))[0].max() > 1e-3


class TestGenerate:
    def prompts(self):
        """Prompts of 1 and of 3 tokens, to be filled up to 8."""
        x = inputs(decoder_length=8)
        given = np.arange(8) < np.array([[1], [3]])
        x["decoder_token_ids"] = np.where(given, x["decoder_token_ids"], 0)
        x["decoder_padding_mask"] = given.astype("int32")
        return x

    def generated(self, lm, x, sampler="greedy", stop_token_ids=None):
        lm.compile(sampler=sampler)
        return lm.generate(x, stop_token_ids=stop_token_ids)

    @pytest.mark.every_backend
    def test_greedy_is_the_best_token_of_the_whole_model(self, lm):
        x = self.prompts()
        ours = self.generated(lm, x)["decoder_token_ids"]
        tokens, given = x["decoder_token_ids"].copy(), x["decoder_padding_mask"] == 1
        whole = {**x, "decoder_padding_mask": np.ones((2, 8), "int32")}
        for place in range(1, 8):
            scores = logits(lm, {**whole, "decoder_token_ids": tokens})
            best = scores[:, place - 1].argmax(axis=-1)
            tokens[:, place] = np.where(given[:, place], tokens[:, place], best)
        np.testing.assert_array_equal(ours, tokens)
        assert len(np.unique(ours)) > 4

    def test_a_batch_says_what_each_says_alone(self, lm):
        x = self.prompts()
        together = self.generated(lm, x)["decoder_token_ids"]
        for row in range(2):
            alone = {name: value[row : row + 1] for name, value in x.items()}
            ours = self.generated(lm, alone)["decoder_token_ids"]
            np.testing.assert_array_equal(ours, together[row : row + 1])

    def test_several_beams_are_at_least_as_probable(self, lm):
        x = self.prompts()

        def log_probability(tokens):
            whole = {**x, "decoder_token_ids": tokens}
            whole["decoder_padding_mask"] = np.ones((2, 8), "int32")
            p = numpy(ops.log_softmax(logits(lm, whole), axis=-1))
            return np.take_along_axis(p[:, :-1], tokens[:, 1:, None], axis=-1).sum(axis=(1, 2))

        greedy = self.generated(lm, x)["decoder_token_ids"]
        beams = self.generated(lm, x, keras_hub.samplers.BeamSampler(num_beams=4))
        assert (log_probability(beams["decoder_token_ids"]) >= log_probability(greedy) - 1e-4).all()

    def test_padding_of_the_encoder_costs_nothing(self, lm, monkeypatch):
        x = self.prompts()
        longer = dict(x)
        for name in ("encoder_token_ids", "encoder_padding_mask"):
            longer[name] = np.pad(x[name], ((0, 0), (0, 200)))
        lengths = []
        encode = lm.backbone.encode
        monkeypatch.setattr(
            lm.backbone,
            "encode",
            lambda ids, mask: lengths.append(ids.shape[1]) or encode(ids, mask),
        )
        np.testing.assert_array_equal(
            self.generated(lm, longer)["decoder_token_ids"],
            self.generated(lm, x)["decoder_token_ids"],
        )
        assert lengths == [64, 7]

    def test_padding_of_the_encoder_is_kept_where_a_capacity_depends_on_it(self, monkeypatch):
        """Or a text would be routed as the longest of its batch is padded."""
        lm = model(keras_moe.SwitchRouter(eval_capacity_factor=0.5, min_capacity=1))
        x, lengths = self.prompts(), []
        for name in ("encoder_token_ids", "encoder_padding_mask"):
            x[name] = np.pad(x[name], ((0, 0), (0, 200)))
        encode = lm.backbone.encode
        monkeypatch.setattr(
            lm.backbone,
            "encode",
            lambda ids, mask: lengths.append(ids.shape[1]) or encode(ids, mask),
        )
        self.generated(lm, x)
        assert lengths == [207]

    def test_stops(self, lm):
        x = self.prompts()
        greedy = numpy(self.generated(lm, x)["decoder_token_ids"])
        stop = int(greedy[0, 2])
        ours = self.generated(lm, x, stop_token_ids=[stop])
        first = list(greedy[0]).index(stop, 1)
        np.testing.assert_array_equal(numpy(ours["decoder_padding_mask"])[0], np.arange(8) <= first)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16"])
def test_generates_with_hashes_and_in_lower_precision(dtype):
    lm = model(keras_moe.HashRouter(), dtype=dtype)
    lm.compile(sampler="greedy")
    x = TestGenerate().prompts()
    ours = numpy(lm.generate(x, stop_token_ids=None)["decoder_token_ids"])
    given = x["decoder_padding_mask"] == 1
    np.testing.assert_array_equal(ours[given], x["decoder_token_ids"][given])


def test_texts(tmp_path):
    keras.utils.set_random_seed(0)  # first: on TensorFlow it does away with tokenizers
    preprocessor = zoo.Seq2SeqLMPreprocessor(zoo.default_tokenizer(), 8, 6)
    x, y, weight = preprocessor(TEXTS)
    tokenizer = preprocessor.tokenizer
    encoder, decoder = (numpy(x[f"{side}_token_ids"]) for side in ("encoder", "decoder"))
    fox = numpy(tokenizer("a fox")).tolist()
    assert encoder[0].tolist() == fox + [1] + [0] * (7 - len(fox))
    fox = numpy(tokenizer("fox")).tolist()
    assert decoder[0].tolist() == [0, *fox, 1, 0, 0, 0][:6]
    assert numpy(y)[0].tolist() == [*fox, 1, 0, 0, 0, 0][:6]
    assert numpy(weight)[0].tolist() == [True] * (len(fox) + 1) + [False] * (5 - len(fox))

    backbone = zoo.EncoderDecoderBackbone(
        **(TINY | {"vocabulary_size": 8000, "router": keras_moe.SwitchRouter(), "dropout": 0.0})
    )
    lm = zoo.Seq2SeqLM(backbone, preprocessor)
    lm.compile(keras.optimizers.Adam(0.03), sampler="greedy")
    losses = lm.fit(TEXTS, batch_size=2, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    said = lm.generate(TEXTS["encoder_text"], max_length=5)
    assert len(said) == 2 and all(isinstance(text, str) for text in said)

    lm.save_to_preset(tmp_path / "preset")
    loaded = zoo.Seq2SeqLM.from_preset(str(tmp_path / "preset"))
    loaded.compile(sampler="greedy")
    assert loaded.generate(TEXTS["encoder_text"], max_length=5) == said
    assert loaded.preprocessor.encoder_sequence_length == 8
    assert loaded.preprocessor.decoder_sequence_length == 6


def test_options_reach_the_layers():
    options = {"expert_dropout": 0.3, "expert_init_scale": 0.5, "gated": True, "group": 4}
    options |= {"num_buckets": 8, "max_distance": 16, "dropout": 0.2, "activation": "gelu"}
    backbone = model(**options).backbone
    for side in ("encoder", "decoder"):
        bias = getattr(backbone, f"{side}_position_bias")
        assert (bias.num_buckets, bias.max_distance) == (8, 16)
        assert bias.bidirectional == (side == "encoder")
        dense, sparse = getattr(backbone, f"{side}_blocks")
        assert dense.feed_forward.gated and dense.feed_forward.dropout == dense.dropout == 0.2
        assert dense.attention.dropout == 0.2
        moe = sparse.feed_forward
        assert moe.group == (4 if side == "encoder" else "sequence")
        assert (moe.experts.dropout, moe.experts.init_scale) == (0.3, 0.5)
        assert moe.experts.gated and moe.experts.activation is keras.activations.gelu
    assert dense.cross_attention.dropout == 0.2
    assert backbone.get_layer("embedding_dropout").rate == 0.2


def test_logits_are_made_by_the_table_or_by_weights_of_their_own():
    ones = ops.ones((1, 8))
    for options, factor in (
        ({}, 8**-0.5),
        ({"scale_outputs": False}, 1.0),
        ({"tie_embeddings": False}, 1.0),
    ):
        backbone = model(**options).backbone
        table = backbone.token_embedding
        kernel = numpy(table.embeddings).T if table.tie_weights else numpy(table.reverse_embeddings)
        expected = np.sum(kernel, axis=0, keepdims=True) * factor
        np.testing.assert_allclose(numpy(backbone.logits(ones)), expected, rtol=1e-5, atol=1e-5)


def test_every_config_key_makes_the_round_trip():
    options = {
        "num_decoder_layers": 3,
        "router": keras_moe.SwitchRouter(jitter=0.25),
        "decoder_router": keras_moe.TopKRouter(2, eval_capacity_factor=1.5),
        "expert_dim": 6,
        "sparse_blocks": (1,),
        "decoder_sparse_blocks": (2, 3),
        "group": 4,
        "activation": "gelu",
        "gated": True,
        "tie_embeddings": False,
        "scale_outputs": True,
        "num_buckets": 8,
        "max_distance": 16,
        "dropout": 0.2,
        "expert_dropout": 0.3,
        "expert_init_scale": 0.5,
        "epsilon": 1e-5,
        "dtype": "mixed_bfloat16",
        "name": "mine",
        "trainable": False,
    }
    made = zoo.EncoderDecoderBackbone(**TINY, **options)
    assert set(TINY | options) == set(inspect.signature(type(made)).parameters)
    copy = zoo.EncoderDecoderBackbone.from_config(made.get_config())
    assert copy.get_config() == made.get_config()
    assert [w.path for w in copy.weights] == [w.path for w in made.weights]
    sparse = [isinstance(b.feed_forward, keras_moe.MixtureOfExperts) for b in copy.decoder_blocks]
    assert sparse == [False, True, True]
    block = copy.decoder_blocks[1]
    assert block.feed_forward.router.k == 2 and block.feed_forward.group == "sequence"
    assert block.epsilon == 1e-5 and block.feed_forward.experts.hidden_dim == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"router": keras_moe.ExpertChoiceRouter()},
            "`decoder_router`.*decoder_router=<ExpertChoiceRouter",
        ),
        (
            {"num_experts": 0, "sparse_blocks": (3,)},
            r"`sparse_blocks`.*2.*sparse_blocks=\(3,\)",
        ),
        ({"decoder_sparse_blocks": (0,)}, r"`decoder_sparse_blocks`.*2.*blocks=\(0,\)"),
        ({"sparse_blocks": 2}, "`sparse_blocks`.*2.*sparse_blocks=2"),
        ({"router": "switch"}, "`router`.*router='switch'"),
        ({"decoder_router": 1}, "`decoder_router`.*decoder_router=1"),
        ({"hidden_dim": 0}, "`hidden_dim`.*hidden_dim=0"),
        ({"vocabulary_size": 1.5}, "`vocabulary_size`.*vocabulary_size=1.5"),
        ({"dtype": "int32"}, "`dtype`.*dtype='int32'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.EncoderDecoderBackbone(**(TINY | options))


def test_what_no_task_can_be_made_of(lm):
    decoder = zoo.DecoderBackbone(**TINY)
    encoder = zoo.EncoderBackbone(**TINY)
    for make, message in (
        (lambda: zoo.Seq2SeqLM(decoder), "`Seq2SeqLM`.*`EncoderDecoderBackbone`.* Decoder"),
        (lambda: zoo.CausalLM(lm.backbone), "`CausalLM`.*`DecoderBackbone`.* EncoderDecoder"),
        (lambda: zoo.LstmCausalLM(decoder), "`LstmCausalLM`.*`LstmBackbone`.* Decoder"),
        (
            lambda: zoo.EncoderTextClassifier(decoder, 2),
            "`EncoderTextClassifier`.*`EncoderBackbone`.* Decoder",
        ),
    ):
        with pytest.raises(ValueError, match=f"`backbone`.*{message}Backbone$"):
            make()
    tokenizer = zoo.default_tokenizer()
    for make in (
        lambda: zoo.Seq2SeqLM(lm.backbone, zoo.Seq2SeqLMPreprocessor(tokenizer)),
        lambda: zoo.CausalLM(decoder, zoo.CausalLMPreprocessor(tokenizer)),
        lambda: zoo.EncoderTextClassifier(
            encoder, 2, zoo.EncoderTextClassifierPreprocessor(tokenizer)
        ),
    ):
        with pytest.raises(ValueError, match="`preprocessor`.*40.*8000"):
            make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": []}, r"`inputs`.*inputs=\[]"),
        ({"inputs": 3}, "`inputs`.*inputs=3"),
        ({"inputs": None}, "`inputs`.*inputs=None"),
        ({"inputs": "a", "max_length": 0}, "`max_length`.*max_length=0"),
        ({"inputs": "a", "strip_prompt": True}, "`strip_prompt`.*strip_prompt=True"),
    ],
)
def test_what_cannot_be_written(lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(**arguments)


def test_no_such_sampler(lm):
    with pytest.raises(ValueError, match="`sampler`.*greedy, .*sampler='gredy'"):
        lm.compile(sampler="gredy")


@pytest.mark.parametrize(
    "decoder", [{"decoder_router": keras_moe.TopKRouter(2)}, {"decoder_sparse_blocks": ()}]
)
def test_expert_choice_in_the_encoder_alone(decoder):
    lm = model(keras_moe.ExpertChoiceRouter(), **decoder)
    assert np.isfinite(logits(lm, inputs())).all()
    assert type(lm.backbone.encoder_blocks[1].feed_forward.router) is keras_moe.ExpertChoiceRouter
