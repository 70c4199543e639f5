import contextlib
import re

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_moe
import zoo
from tests.backend import outputs
from tests.zoo.models.pairs import compared

TINY = {
    "vocabulary_size": 8000,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "key_dim": 8,
    "intermediate_dim": 32,
    "num_experts": 4,
}
ROUTERS = {
    "dense": None,
    "switch": keras_moe.SwitchRouter(),
    "expert_choice": keras_moe.ExpertChoiceRouter(),
    "hash": keras_moe.HashRouter(),
}


def encoder(kind="switch", **options):
    return zoo.EncoderBackbone(**(TINY | {"router": ROUTERS[kind]} | options))


def inputs(lengths=(9, 4, 6), seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    token_ids = np.where(mask, rng.integers(3, 8000, mask.shape), 0)
    return {"token_ids": token_ids.astype("int32"), "padding_mask": mask.astype("int32")}


def test_dense_encoder_is_t5():
    """Equal to transformers' T5 encoder with the same weights."""
    import torch
    import transformers

    config = transformers.T5Config(
        vocab_size=8000, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, dropout_rate=0.0
    )
    torch.manual_seed(0)
    theirs = transformers.T5EncoderModel(config).eval()
    for weight in theirs.parameters():  # norms and biases too, which start at constants
        torch.nn.init.normal_(weight, std=0.4)
    ours = encoder("dense", num_layers=3)

    def copy(path, weight):
        (variable,) = (v for v in ours.variables if v.path.endswith(path))
        variable.assign(weight.detach().numpy())

    copy("token_embedding/embeddings", theirs.shared.weight)
    blocks = theirs.encoder.block
    attention = blocks[0].layer[0].SelfAttention
    copy("position_bias/embedding", attention.relative_attention_bias.weight)
    copy("output_norm/scale", theirs.encoder.final_layer_norm.weight)
    for number, block in enumerate(blocks, start=1):
        attention, dense = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        for name, layer in zip(
            ("query", "key", "value", "output"),
            (attention.q, attention.k, attention.v, attention.o),
            strict=True,
        ):
            copy(f"block_{number}/attention/{name}/kernel", layer.weight.T)
        copy(f"block_{number}/feed_forward/hidden/kernel", dense.wi.weight.T)
        copy(f"block_{number}/feed_forward/output/kernel", dense.wo.weight.T)
        copy(f"block_{number}/attention_norm/scale", block.layer[0].layer_norm.weight)
        copy(f"block_{number}/feed_forward_norm/scale", block.layer[1].layer_norm.weight)

    x = inputs(lengths=(70, 33, 5))  # past the exact buckets of the position bias
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(x["token_ids"]).long(),
            attention_mask=torch.tensor(x["padding_mask"]),
        ).last_hidden_state.numpy()
    valid = x["padding_mask"] > 0
    np.testing.assert_allclose(outputs(ours, x)[valid], expected[valid], atol=2e-4, rtol=1e-4)


def test_every_other_block_is_sparse():
    model = encoder(num_layers=4)
    kinds = [type(model.get_layer(f"block_{n}").feed_forward).__name__ for n in (1, 2, 3, 4)]
    assert kinds == ["FeedForward", "MixtureOfExperts"] * 2
    every = encoder(num_layers=2, sparse_blocks=(1, 2))
    kinds = [type(every.get_layer(f"block_{n}").feed_forward).__name__ for n in (1, 2)]
    assert kinds == ["MixtureOfExperts"] * 2
    paths = [v.path for v in model.trainable_variables if "block_2/moe_2/" in v.path]
    assert sorted(path.split("moe_2/")[1] for path in paths) == [
        "experts/kernel_in",
        "experts/kernel_out",
        "router/kernel",
    ]


def test_experts_in_attention(tmp_path):
    """The three models of Switch Transformers' Table 10, and a name for every figure."""

    def parts(number, kind="switch", **options):
        block = encoder(kind, **options).get_layer(f"block_{number}")
        return type(block.attention).__name__, type(block.feed_forward).__name__

    dense, sparse = ("SelfAttention", "FeedForward"), ("SwitchAttention", "MixtureOfExperts")
    assert parts(2) == (dense[0], sparse[1])
    assert parts(2, attention_experts=3, num_experts=0) == (sparse[0], dense[1])
    assert parts(2, attention_experts=3) == sparse
    assert parts(1, attention_experts=3) == parts(2, "dense", attention_experts=3) == dense

    backbone = encoder(
        attention_experts=3, sparse_blocks=(1, 2), expert_init_scale=0.1, dtype="bfloat16"
    )
    attention = backbone.get_layer("block_1").attention
    for part, scale in ((attention.query, 0.1 / 8), (attention.key_value, 0.1)):
        assert part.group == "batch"
        assert (part.experts.num_experts, part.experts.init_scale) == (3, scale)
        assert part.experts.kernel.dtype == "float32"
    model = keras.Model(backbone.input, keras.layers.Dense(1)(backbone.output))
    model.compile("adam", "mse")
    x, callback = inputs(), keras_moe.callbacks.RoutingMetrics()
    history = model.fit(x, np.ones((3, 9, 1)), verbose=0, callbacks=[callback]).history
    assert np.isfinite(history["loss"]).all()
    layers = {name.removesuffix("/dropped") for name in history if name.endswith("/dropped")}
    assert len(layers) == 6 and {"moe_1", "moe_2"} < layers
    assert {name[-25:] for name in layers if "query" in name} == {
        f"block_{number}/attention/query" for number in (1, 2)
    }


@pytest.mark.parametrize("kind", ROUTERS)
def test_padding_changes_nothing(kind):
    # Capacity counts padding: only where every token finds its place may its length not matter.
    roomy = {
        "dense": None,
        "switch": keras_moe.SwitchRouter(eval_capacity_factor=4.0),
        "expert_choice": keras_moe.ExpertChoiceRouter(capacity_factor=4.0),
        "hash": keras_moe.HashRouter(),
    }
    model = encoder(router=roomy[kind], attention_experts=4)
    x = inputs()
    longer = {name: np.pad(value, ((0, 0), (0, 5))) for name, value in x.items()}
    longer["token_ids"][:, 9:] = 77
    valid = x["padding_mask"] > 0
    a, b = outputs(model, x), outputs(model, longer)[:, :9]
    np.testing.assert_allclose(a[valid], b[valid], atol=1e-5)


@pytest.mark.parametrize("kind", ROUTERS)
def test_config_and_keras_file_round_trip(kind, tmp_path):
    model = encoder(
        kind,
        sparse_blocks=(1,),
        group=5,
        expert_dim=24,
        attention_experts=3,
        activation="gelu",
        dropout=0.2,
        expert_dropout=0.3,
        expert_init_scale=0.5,
    )
    copy = zoo.EncoderBackbone.from_config(model.get_config())
    assert copy.get_config() == model.get_config()
    assert copy.activation is model.activation is keras.activations.gelu
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(outputs(loaded, inputs()), outputs(model, inputs()))


def test_ids_reach_the_hash_router():
    """One expert per parity of the id: if ids do not come, or are another's, the numbers differ."""
    model = encoder(router=keras_moe.HashRouter(), num_experts=2, group=5)
    moe = model.get_layer("block_2").feed_forward
    x = inputs()
    outputs(model, x)
    even = np.sum((x["token_ids"] % 2 == 0) & (x["padding_mask"] > 0))
    odd = np.sum((x["token_ids"] % 2 == 1) & (x["padding_mask"] > 0))
    _, expert_tokens = moe.statistics
    assert ops.convert_to_numpy(expert_tokens).tolist() == [even, odd] and even != odd


def test_options_reach_the_layers():
    model = encoder(expert_dim=24, activation="gelu", expert_dropout=0.3, expert_init_scale=0.5)
    moe = model.get_layer("block_2").feed_forward
    assert moe.experts.hidden_dim == 24
    assert moe.experts.dropout == 0.3
    assert moe.experts.init_scale == 0.5
    assert moe.experts.activation is keras.activations.gelu
    assert moe.group == "batch"
    gated = encoder(gated=True)
    norms = encoder(epsilon=0.1)
    assert norms.get_layer("output_norm").epsilon == 0.1
    for number in (1, 2):
        block = norms.get_layer(f"block_{number}")
        assert block.attention_norm.epsilon == block.feed_forward_norm.epsilon == 0.1
    bias = encoder(num_buckets=8, max_distance=20).get_layer("position_bias")
    assert (bias.num_buckets, bias.max_distance, bias.bidirectional) == (8, 20, True)
    for number, layer in ((1, "feed_forward"), (2, "experts")):
        block = gated.get_layer(f"block_{number}").feed_forward
        assert (block if layer == "feed_forward" else block.experts).gated
    assert encoder(expert_dim=None).get_layer("block_2").feed_forward.experts.hidden_dim == 32
    x = {name: ops.convert_to_tensor(value) for name, value in inputs().items()}
    calm = {"router": keras_moe.SwitchRouter(jitter=0.0), "dropout": 0.0, "expert_dropout": 0.0}
    still, noisy = encoder(**calm), encoder(**(calm | {"dropout": 0.5}))
    for model, changes in ((still, False), (noisy, True)):
        a, b = (ops.convert_to_numpy(model(x, training=True)) for _ in range(2))
        assert np.array_equal(a, b) != changes


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_bfloat16(policy):
    model = encoder(dtype=policy)
    y = model(inputs())
    assert ops.dtype(y) == "bfloat16"
    assert np.isfinite(ops.convert_to_numpy(ops.cast(y, "float32"))).all()
    assert model.get_layer("block_2").feed_forward.router.kernel.dtype == "float32"


def test_with_experts_rematerialised_it_trains_the_same():
    def losses(scope):
        keras.utils.set_random_seed(0)
        with scope:
            backbone = encoder("switch", dropout=0.5, expert_dropout=0.5)
        model = keras.Model(backbone.input, keras.layers.Dense(1)(backbone.output))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        history = model.fit(x, np.ones((3, 9, 1)), batch_size=3, epochs=3, verbose=0, shuffle=False)
        return history.history["loss"]

    x, experts = inputs(), keras.RematScope("list_of_layers", layer_names=["experts"])
    plain, remat = losses(contextlib.nullcontext()), losses(experts)
    assert len(set(plain)) == 3
    assert remat == pytest.approx(plain, rel=1e-5)


def classifier(num_classes=2, **options):
    preprocessor = zoo.EncoderTextClassifierPreprocessor(
        zoo.default_tokenizer(), sequence_length=12
    )
    return zoo.EncoderTextClassifier(encoder(**options), num_classes, preprocessor)


def test_preprocessor_packs_sentences_and_pairs():
    preprocessor = classifier().preprocessor
    tokenizer = zoo.default_tokenizer()
    one, two = ops.convert_to_numpy(tokenizer("A dog.")), ops.convert_to_numpy(tokenizer("It ran."))
    x = preprocessor(["A dog."])
    expected = [1, *one.tolist(), 1]
    assert sorted(x) == ["padding_mask", "token_ids"]
    tokens = ops.convert_to_numpy(x["token_ids"])[0]
    assert tokens.tolist() == expected + [0] * (12 - len(expected))
    mask = ops.convert_to_numpy(x["padding_mask"])[0]
    assert mask.astype(bool).tolist() == (tokens != 0).tolist()
    pair = preprocessor((["A dog."], ["It ran."]), y=None)
    tokens = ops.convert_to_numpy(pair["token_ids"])[0]
    expected = [1, *one.tolist(), 1, *two.tolist(), 1]
    assert tokens.tolist() == expected + [0] * (12 - len(expected))


def test_classifier_learns_from_strings_and_round_trips_through_a_preset(tmp_path):
    model = classifier()
    texts = ["a fine good film", "a poor bad film"] * 8
    labels = np.array([1, 0] * 8)
    model.compile(optimizer=keras.optimizers.Adam(3e-3))
    history = model.fit(texts, labels, batch_size=8, epochs=12, verbose=0)
    assert history.history["sparse_categorical_accuracy"][-1] == 1.0
    model.save_to_preset(str(tmp_path))
    for loaded in (
        zoo.from_preset(tmp_path),
        keras_hub.models.TextClassifier.from_preset(str(tmp_path)),
    ):
        np.testing.assert_allclose(
            loaded.predict(texts, batch_size=16, verbose=0),
            model.predict(texts, batch_size=16, verbose=0),
            atol=1e-6,
        )
    other_head = zoo.from_preset(tmp_path, num_classes=3)
    assert other_head.predict(texts[:2], verbose=0).shape == (2, 3)


def test_two_texts_that_are_read_apart(tmp_path):
    """As the encoder reads each on its own, but for the padding, and then compared."""
    backbone = encoder("dense", dropout=0.0)
    preprocessor = zoo.EncoderTextClassifierPreprocessor(zoo.default_tokenizer(), 16)
    end = preprocessor.tokenizer.end_token_id
    model = zoo.EncoderTextClassifier(backbone, 3, preprocessor, separator=end)
    first, second = ["a red dog", "one"], ["two cats sat", "rain fell on all of us"]
    given = preprocessor((first, second), y=None)
    ends = np.argwhere(np.asarray(given["token_ids"]) == end)
    layer = [ops.convert_to_numpy(weight) for weight in model.get_layer("pooler").weights]
    features = []
    for row in range(2):
        begin, between, last = ends[ends[:, 0] == row, 1]
        parts = (slice(begin, between + 1), slice(between + 1, last + 1))
        alone = [{name: x[row : row + 1, part] for name, x in given.items()} for part in parts]
        features.append(compared(*(outputs(backbone, text)[0] for text in alone), *layer))
    features = np.array(features)
    kernel, bias = (ops.convert_to_numpy(weight) for weight in model.weights[-2:])
    logits = outputs(model, given)
    np.testing.assert_allclose(logits, features @ kernel + bias, rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.separator == end
    np.testing.assert_allclose(outputs(again, given), logits, rtol=1e-5, atol=1e-6)


def test_what_every_layer_puts_out():
    backbone, x = encoder(num_layers=3, name="mine"), inputs()
    embedded, *blocks = (ops.convert_to_numpy(y) for y in backbone.layer_outputs()(x))
    assert len(blocks) == 3
    (table,) = backbone.get_layer("token_embedding").weights
    right = ops.convert_to_numpy(table)[x["token_ids"]]
    np.testing.assert_allclose(embedded, right, rtol=1e-6)
    normed = ops.convert_to_numpy(backbone.get_layer("output_norm")(blocks[-1]))
    np.testing.assert_allclose(normed, outputs(backbone, x), rtol=1e-5, atol=1e-6)
    assert np.abs(blocks[0] - blocks[1]).max() > 0.1


@pytest.mark.parametrize("kind", ["switch", "expert_choice"])
def test_what_a_sparse_classifier_that_mixes_layers_learns_from(kind, tmp_path):
    """The same losses of its routers as one that does not, each once, and gradients everywhere."""
    plain, mixed = (
        zoo.EncoderTextClassifier(encoder(kind, dropout=0.0, expert_dropout=0.0), 2, mix_layers=mix)
        for mix in (False, True)
    )
    for one, other in zip(mixed.backbone.weights, plain.backbone.weights, strict=True):
        one.assign(other)
    x, labels = inputs(), np.array([0, 1, 1])
    losses = []
    for model in (plain, mixed):
        model(x, training=True)
        losses.append([float(loss) for loss in model.losses])
    assert len(losses[0]) == (kind == "switch")
    np.testing.assert_allclose(*losses, rtol=0.1)  # routers explore

    before = {weight.path: ops.convert_to_numpy(weight) for weight in mixed.trainable_weights}
    mixed.compile(keras.optimizers.SGD(1.0))
    mixed.fit(x, labels, epochs=2, verbose=0)
    for weight in mixed.trainable_weights:
        moved = np.abs(ops.convert_to_numpy(weight) - before[weight.path]).max()
        assert moved > 0, weight.path
    mixed.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(outputs(again, x), outputs(mixed, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("separator", [None, 1])
def test_a_classifier_that_mixes_layers(tmp_path, separator):
    """Trained, saved, loaded; one layer alone, and its head has what that one puts out."""
    backbone = encoder("dense", num_layers=3)
    preprocessor = zoo.EncoderTextClassifierPreprocessor(zoo.default_tokenizer(), 16)
    options = {"separator": separator, "mix_layers": True}
    model = zoo.EncoderTextClassifier(backbone, 2, preprocessor, **options)
    texts = (["a fine film", "a poor film"] * 4, ["a good one", "a bad one"] * 4)
    texts = texts[0] if separator is None else texts
    model.compile(keras.optimizers.Adam(3e-3))
    model.fit(texts, np.array([1, 0] * 4), batch_size=8, epochs=2, verbose=0)
    mixed = model.get_layer("mixed_layers")
    assert np.abs(ops.convert_to_numpy(mixed.scores)).min() > 0
    trained = {id(weight) for weight in model.trainable_weights}
    assert {id(weight) for weight in backbone.get_layer("block_1").weights} <= trained
    assert not backbone.get_layer("output_norm").trainable_weights

    model.save_to_preset(str(tmp_path))
    again = zoo.from_preset(tmp_path)
    assert again.mix_layers and again.separator == separator
    scores = [again.predict(texts, verbose=0), model.predict(texts, verbose=0)]
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-6)

    mixed.scores.assign([-50.0, -50.0, 0.0, -50.0])  # the second block
    x = inputs() if separator is None else preprocessor(texts, y=None)
    seen = keras.Model(model.input, mixed.output)
    if separator is None:
        block = ops.convert_to_numpy(backbone.layer_outputs()(x)[2])
        unit = block / np.sqrt(np.mean(block**2, axis=-1, keepdims=True))
        np.testing.assert_allclose(outputs(seen, x), unit, rtol=1e-4, atol=1e-5)
    else:  # the two texts do not see each other
        other = {name: ops.convert_to_numpy(value).copy() for name, value in x.items()}
        first_end = np.argwhere(other["token_ids"][0] == separator)[1, 0]
        other["token_ids"][:, first_end + 1] = 77
        one, two = outputs(seen, x), outputs(seen, other)
        np.testing.assert_allclose(one[0, :first_end], two[0, :first_end], rtol=1e-5, atol=1e-6)
        assert np.abs(one[0, first_end + 1] - two[0, first_end + 1]).max() > 0.1


def test_a_dense_classifier_learns_from_a_sparse_one():
    """It begins with all but the experts and routers; the labels, all 0, weigh nothing."""
    keras.utils.set_random_seed(0)
    teacher, student = (classifier(router=router) for router in (ROUTERS["switch"], None))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    x, labels = inputs(), np.array([0, 1, 1])

    trained = keras.Model(teacher.input, teacher.output)
    trained.compile(keras.optimizers.Adam(1e-2), loss)
    trained.fit(x, labels, epochs=20, verbose=0)
    report = keras_moe.surgery.copy_weights(teacher, student)
    assert report.kept == [f"block_2/feed_forward/{name}/kernel" for name in ("hidden", "output")]
    assert len(report.copied) == len(student.weights) - 2

    distiller = keras_moe.surgery.Distiller(student, teacher, teacher_weight=1.0)
    distiller.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])
    distiller.fit(x, 0 * labels, epochs=20, verbose=0)
    assert distiller.evaluate(x, labels, verbose=0, return_dict=True)["accuracy"] == 1.0


def test_regressor():
    model = classifier(num_classes=1)
    assert model.loss == "mean_squared_error"
    history = model.fit(["two", "five"] * 4, np.array([2.0, 5.0] * 4), verbose=0)
    assert np.isfinite(history.history["mean_absolute_error"][0])


def test_empty_text_is_finite():
    assert np.isfinite(classifier().predict(["", "word"], verbose=0)).all()


@pytest.fixture(scope="module")
def ready():
    return classifier(router=None)  # dense: no row depends on the others


@pytest.mark.parametrize(
    "x",
    [
        None,
        "a film",
        [],
        (),
        [1, 2],
        ["a film", None],
        np.array(["a", "b"])[:0],
        [["a", "b"], ["c", "d"]],
        ("a", "b"),
        ([], []),
        (["a"], ["b", "c"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("verb", ["predict", "evaluate", "fit"])
def test_what_is_no_text_is_refused_in_one_sentence(ready, verb, x):
    with pytest.raises(ValueError, match=f"^`x`.*x={re.escape(repr(x))}$") as error:
        getattr(ready, verb)(x, verbose=0)
    assert "\n" not in str(error.value)


def test_a_pair_is_a_tuple_of_two_lists(ready):
    """The same scores as of the tokens that the preprocessor makes of it, row by row."""
    pairs = (["a dog", "a cat"], ["it ran", "it sat"])
    tokens = ready.preprocessor(pairs, y=None)
    scores = ready.predict(pairs, verbose=0)
    np.testing.assert_allclose(scores, outputs(ready, tokens), atol=1e-5)
    swapped = ready.predict(tuple(texts[::-1] for texts in pairs), verbose=0)
    np.testing.assert_allclose(swapped, scores[::-1], atol=1e-5)
    assert not np.allclose(scores, ready.predict(pairs[::-1], verbose=0))


def test_other_forms_of_text_are_let_through(ready):
    import tensorflow as tf

    texts = ["a dog", "a cat"]
    expected = ready.predict(texts, verbose=0)
    for x in (
        np.array(texts),
        np.array(texts, "object"),
        [text.encode() for text in texts],
        tf.constant(texts),
        tf.data.Dataset.from_tensor_slices(texts).batch(2),
    ):
        np.testing.assert_allclose(ready.predict(x, verbose=0), expected, atol=1e-5)


def test_tokens_need_no_preprocessor():
    model = zoo.EncoderTextClassifier(encoder("dense"), 2)
    assert model.predict(inputs(), verbose=0).shape == (3, 2)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="'num_expert'"):
        zoo.switch_transformer(num_expert=4)
    with pytest.raises(TypeError, match="'rate'"):
        zoo.EncoderTextClassifier(encoder("dense"), 2, rate=0.1)


def test_name_and_trainable(tmp_path):
    model = zoo.EncoderTextClassifier(
        encoder("dense", name="body", trainable=False), 2, name="whole", trainable=False
    )
    assert (model.name, model.backbone.name) == ("whole", "body")
    assert not model.trainable_variables and not model.backbone.trainable_variables
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert (loaded.name, loaded.backbone.name) == ("whole", "body")
    np.testing.assert_array_equal(outputs(loaded, inputs()), outputs(model, inputs()))


def test_sparse_blocks_are_there():
    with pytest.raises(ValueError, match=r"`sparse_blocks`.*2.*sparse_blocks=\(3,\)"):
        encoder(sparse_blocks=(3,))


def test_configs_of_earlier_versions():
    config = encoder(num_layers=4).get_config()
    for name, default in (("epsilon", 1e-6), ("num_buckets", 32), ("max_distance", 128)):
        assert config.pop(name) == default
        assert zoo.EncoderBackbone.from_config(config).get_config()[name] == default
    del config["sparse_blocks"]
    for step, blocks in ((2, (2, 4)), (3, (3,))):
        earlier = {**config, "sparse_step": step}
        assert zoo.EncoderBackbone.from_config(earlier).sparse_blocks == blocks
