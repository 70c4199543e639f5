import inspect
import math

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_moe
import zoo
from tests import oracle
from tests.backend import numpy, outputs, stateless
from zoo.models import moe_lstm
from zoo.models.deferred import Deferred
from zoo.models.moe_lstm import ProjectedLSTMCell

V, D = 40, 8
TINY = {"vocabulary_size": V, "hidden_dim": D, "expert_dim": 6, "num_experts": 8}
STACK = ("lstm", "moe", "lstm")
ROUTERS = {
    "flat": keras_moe.NoisyTopKRouter(k=2),
    "hierarchical": keras_moe.HierarchicalRouter(4),
}


def backbone(kind="flat", **options):
    model = zoo.LstmBackbone(**(TINY | {"router": ROUTERS.get(kind)} | options))
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return model


def inputs(lengths=(7, 3, 5), seed=0):
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    tokens = np.random.default_rng(seed).integers(1, V, mask.shape)
    return {
        "token_ids": np.where(mask, tokens, 0).astype("int32"),
        "padding_mask": mask.astype("int32"),
    }


def output(model, x):
    return model.predict(x, verbose=0)  # compiled


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(x_LD, kernel, recurrent_kernel, bias, projection=None, forget=0.0):
    """One sequence; gates in Keras' order: in, forget, new, out."""
    cell, h, result = 0.0, np.zeros(len(recurrent_kernel)), []
    for x_D in x_LD:
        i, f, n, o = np.split(x_D @ kernel + h @ recurrent_kernel + bias, 4)
        cell = sigmoid(f + forget) * cell + sigmoid(i) * np.tanh(n)
        h = sigmoid(o) * np.tanh(cell)
        h = h if projection is None else h @ projection
        result.append(h)
    return np.stack(result)


def weights_of(model, name):
    layer = model.get_layer(name)
    return {v.name: numpy(v).astype("float64") for v in layer.trainable_variables}


def test_is_the_papers_model():
    """Embedding, LSTM, sigmoid of the mixture, LSTM; each input is added to what comes out."""
    model, x = backbone(dropout=0.5), inputs()
    embeddings = weights_of(model, "token_embedding")["embeddings"]
    moe = weights_of(model, "moe_2")
    for row, length in enumerate((7, 3, 5)):
        h = embeddings[x["token_ids"][row, :length]]
        h = h + lstm(h, **weights_of(model, "lstm_1"))
        gates, _ = oracle.token_choice(oracle.softmax(h @ moe["kernel"])[None], k=2)
        y = oracle.mixture(h[None], gates, lambda x_D, e: oracle.feed_forward(x_D, moe, e))[0]
        h = h + sigmoid(y)
        h = h + lstm(h, **weights_of(model, "lstm_3"))
        np.testing.assert_allclose(output(model, x)[row, :length], h, rtol=1e-4, atol=1e-4)


def test_dense_and_projected_layers():
    model = backbone(None, stack=("lstm", "dense"), lstm_dim=11, dense_dims=(5, 6))
    x = inputs((7,))
    h = weights_of(model, "token_embedding")["embeddings"][x["token_ids"][0]]
    cell = weights_of(model, "lstm_1")
    assert cell["projection_kernel"].shape == (11, D)
    projection = cell.pop("projection_kernel")
    h = h + lstm(h, **cell, projection=projection, forget=1.0)
    y = h
    *hidden, last = (numpy(v) for v in model.get_layer("dense_2").trainable_variables)
    for kernel in hidden:
        y = np.maximum(y @ kernel, 0)
    h = h + sigmoid(y @ last)
    np.testing.assert_allclose(output(model, x)[0], h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ROUTERS)
def test_padding_and_later_tokens_change_nothing(kind):
    model, x = backbone(kind), inputs()
    longer = {name: np.pad(value, ((0, 0), (0, 2))) for name, value in x.items()}
    longer["token_ids"][x["padding_mask"].sum(axis=1) < 6, 6:] = 9  # under the padding
    valid, before = x["padding_mask"] > 0, output(model, x)
    np.testing.assert_allclose(output(model, longer)[:, :7][valid], before[valid], atol=1e-5)
    later = {**x, "token_ids": np.where(np.arange(7) < 4, x["token_ids"], 5)}
    np.testing.assert_allclose(output(model, later)[0, :4], before[0, :4], atol=1e-5)
    moe = model.get_layer("moe_2")
    assert moe.group == "sequence"
    moe.statistics[0].assign(np.zeros(7))
    outputs(model, longer)
    assert numpy(moe.statistics[0])[1] == 15  # tokens: no padding among them


@pytest.mark.every_backend
@pytest.mark.parametrize(("kind", "options"), [("flat", {"lstm_dim": 5}), ("hierarchical", {})])
def test_the_state_carries_all_that_was_read(kind, options):
    model = backbone(kind, **options)
    tokens = inputs((6, 6))["token_ids"]
    whole = output(model, {"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    tokens = ops.convert_to_tensor(tokens)
    read = ops.convert_to_tensor(np.tile(np.arange(6) < 3, (2, 1)))
    step = stateless(model.call_with_state)
    _, state = step(tokens, None, read)  # three of them
    assert state.shape == (2, 2 * (D + (options.get("lstm_dim") or D)))
    for place in range(3, 6):
        y, state = step(tokens[:, place : place + 1], state)
        np.testing.assert_allclose(numpy(y)[:, 0], whole[:, place], rtol=1e-5, atol=1e-5)


def language_model(kind="flat", **options):
    model = zoo.LstmCausalLM(backbone(kind, **options))
    model.compile(keras.optimizers.Adam(0.01), sampler="greedy")
    model.logits.kernel.assign(np.random.default_rng(2).normal(size=(D, V)))
    return model


def test_the_state_does_not_depend_on_padding():
    """Though the capacity of the router in inference does."""
    lm = backbone(router=keras_moe.SwitchRouter(eval_capacity_factor=0.5, min_capacity=1))
    tokens, states = np.random.default_rng(0).integers(1, V, (2, 6)), []
    for length in (6, 30):
        padded = np.pad(tokens, ((0, 0), (0, length - 6)))
        mask = np.tile(np.arange(length) < 6, (2, 1))
        state = lm.first_state(2)
        step = stateless(lm.call_with_state)
        states.append(numpy(step(padded, state, ops.convert_to_tensor(mask))[1]))
    np.testing.assert_allclose(states[0], states[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ROUTERS)
def test_generates_what_the_whole_model_would(kind):
    model, x = language_model(kind), inputs((2, 4, 1))
    prompts = {name: np.pad(value, ((0, 0), (0, 5))) for name, value in x.items()}
    tokens, mask = (value.copy() for value in prompts.values())
    while not mask.all():  # greedy, by the whole model for every token
        best = output(model, {"token_ids": tokens, "padding_mask": mask}).argmax(axis=-1)
        for row, length in enumerate(mask.sum(axis=1)):
            if length < 9:
                tokens[row, length], mask[row, length] = best[row, length - 1], 1
    expected = tokens.tolist()
    found = model.generate(dict(prompts), stop_token_ids=None)
    assert found["token_ids"].tolist() == expected
    assert found["padding_mask"].all()
    # The first token that row 0 writes now ends it; the other rows go on to theirs, or to the end.
    stop = expected[0][2]
    stopped = model.generate(dict(prompts), stop_token_ids=[stop])
    assert stopped["padding_mask"][0].tolist() == [True] * 3 + [False] * 6
    for row, start in ((1, 4), (2, 1)):
        written = expected[row][start:]
        length = start + (written.index(stop) + 1 if stop in written else len(written))
        assert stopped["padding_mask"][row].sum() == length
        assert stopped["token_ids"][row, :length].tolist() == expected[row][:length]


def test_learns_from_strings_saves_and_loads(tmp_path):
    """From texts to texts, with files between; to generate first does not hinder the training."""
    keras.utils.set_random_seed(0)
    preprocessor = zoo.LstmCausalLMPreprocessor(zoo.default_tokenizer(), sequence_length=6)
    model = zoo.moe_lstm(
        "MoE-4", preprocessor=preprocessor, hidden_dim=32, expert_dim=8, dropout=0.0
    )
    model.compile(keras.optimizers.Adam(zoo.InverseSquareRoot(0.05, 10)), sampler="greedy")
    texts = ["the quick brown fox", "a lazy dog"] * 2
    model.generate(["the quick", "a"], max_length=6)
    history = model.fit(
        texts, batch_size=4, epochs=40, verbose=0, callbacks=[keras_moe.callbacks.RoutingMetrics()]
    ).history
    assert history["loss"][-1] < 0.3 * history["loss"][0]
    assert history["moe_2/dropped"][-1] == 0
    assert model.generate(["the quick", "a"], max_length=6) == texts[:2]

    model.save(tmp_path / "model.keras")
    model.save_to_preset(str(tmp_path / "preset"))
    with pytest.raises(ValueError, match="`num_classes`.*num_classes=2"):
        zoo.from_preset(tmp_path / "preset", num_classes=2)
    for loaded in (
        keras.saving.load_model(tmp_path / "model.keras"),
        zoo.from_preset(tmp_path / "preset"),
        keras_hub.models.CausalLM.from_preset(str(tmp_path / "preset")),
    ):
        assert type(loaded) is zoo.LstmCausalLM
        np.testing.assert_allclose(
            output(loaded, texts[:2]), output(model, texts[:2]), rtol=1e-5, atol=1e-5
        )


ARGUMENTS = {
    "vocabulary_size": 30,
    "hidden_dim": 6,
    "stack": ("lstm", "moe", "dense"),
    "lstm_dim": 5,
    "router": ROUTERS["hierarchical"],
    "num_experts": 12,
    "expert_dim": 3,
    "dense_dims": (4, 2),
    "group": 5,
    "dropout": 0.25,
    "dtype": "mixed_bfloat16",
    "name": "mine",
    "trainable": False,
}


def test_every_config_key_makes_the_round_trip():
    parameters = inspect.signature(zoo.LstmBackbone.__init__).parameters
    assert set(ARGUMENTS) == set(parameters) - {"self"}
    model = zoo.LstmBackbone(**ARGUMENTS)
    copy = zoo.LstmBackbone.from_config(model.get_config())
    assert copy.get_config() == model.get_config()
    assert [(v.path, v.shape, v.dtype) for v in copy.weights] == [
        (v.path, v.shape, v.dtype) for v in model.weights
    ]
    for name, value in ARGUMENTS.items():
        if name not in ("router", "dtype"):
            assert getattr(copy, name) == value
    assert (copy.dtype_policy.name, copy.get_layer("moe_2").router.num_groups) == (
        "mixed_bfloat16",
        4,
    )
    assert copy.get_layer("moe_2").group == 5
    assert copy.get_layer("moe_2").experts.hidden_dim == 3
    assert [layer.rate for layer in copy.stack_dropouts] == [0.25] * 4


def test_bfloat16():
    options = {"router": ROUTERS["hierarchical"], "dtype": "mixed_bfloat16", "lstm_dim": 5}
    model = zoo.LstmBackbone(**TINY, **options)
    y = outputs(model, inputs())
    assert y.dtype == "bfloat16"
    assert np.isfinite(y.astype("float32")).all()
    assert model.get_layer("moe_2").router.kernel.dtype == "float32"


def test_dropout_follows_every_layer_while_training():
    model = backbone(None, stack=("dense",), dropout=0.5)
    x = {name: ops.convert_to_tensor(value) for name, value in inputs().items()}
    a, b = (numpy(model(x, training=True)) for _ in range(2))
    assert (a != b).any()
    still = backbone(None, stack=("dense",), dropout=0.0)
    np.testing.assert_array_equal(*(numpy(still(x, training=True)) for _ in range(2)))


class TestPresets:
    # Table 7: millions of parameters but for embedding and softmax, and the dropout rate.
    TABLE = {
        "LSTM-2048-512": (9.4, 0.1),
        "4xLSTM-512": (8.4, 0.1),
        "MoE-1-Wide": (8.4, 0.1),
        "MoE-1-Deep": (8.4, 0.1),
        "MoE-4": (8.4, 0.1),
        "MoE-32": (37.8, 0.1),
        "MoE-256": (272.9, 0.1),
        "MoE-256-h": (272.9, 0.1),
        "MoE-1024-h": (1079.0, 0.2),
        "MoE-4096-h": (4303.4, 0.2),
    }

    def test_parameters_are_table_7s(self, monkeypatch):
        monkeypatch.setattr(moe_lstm, "LstmCausalLM", lambda backbone, _: backbone)
        assert set(moe_lstm.MODELS) == set(self.TABLE)
        for name, (millions, dropout) in self.TABLE.items():
            with Deferred():  # weights have a shape and no values, and they never get any
                model = zoo.moe_lstm(name, vocabulary_size=2)
            layers = [layer for layer in model.layers if layer is not model.token_embedding]
            weights = [v for layer in layers for v in layer.trainable_variables]
            found = sum(math.prod(v.shape) for v in weights) / 1e6
            assert round(found, 1) == millions, name
            assert model.dropout == dropout
            assert model.hidden_dim == 512

    def test_routers_are_the_papers(self):
        tiny = {"vocabulary_size": 2, "hidden_dim": 4, "expert_dim": 4}
        flat = zoo.moe_lstm("MoE-32", **tiny).backbone.get_layer("moe_2").router
        assert type(flat) is keras_moe.NoisyTopKRouter
        assert (flat.k, flat.num_experts, flat.capacity_factor) == (4, 32, None)
        two = zoo.moe_lstm("MoE-256-h", **tiny).backbone.get_layer("moe_2").router
        assert (two.num_groups, two.k, two.secondary_k, two.num_experts) == (16, 2, 2, 256)
        for router in (flat, two):
            assert (router.importance_weight, router.load_weight) == (0.1, 0.1)

    def test_options(self):
        router = keras_moe.SwitchRouter()
        model = zoo.moe_lstm("MoE-256-h", 9, router=router, num_experts=4, hidden_dim=4)
        moe = model.backbone.get_layer("moe_2")
        assert isinstance(moe.router, keras_moe.SwitchRouter)
        assert (moe.experts.num_experts, model.output_shape) == (4, (None, None, 9))

    def test_unknown(self):
        with pytest.raises(ValueError, match="`model`.*model='MoE-3'.*'MoE-32'"):
            zoo.moe_lstm("MoE-3")


def test_projected_cell_round_trip():
    cell = ProjectedLSTMCell(5, 3, name="mine")
    assert ProjectedLSTMCell.from_config(cell.get_config()).get_config() == cell.get_config()
    assert (cell.state_size, cell.output_size) == ([3, 5], 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stack": ("gru",)}, r"`stack`.*'lstm', 'moe', 'dense'.*stack=\('gru',\)"),
        ({"stack": ()}, r"`stack`.*stack=\(\)"),
        ({}, "`router`.*router=None"),
        *(
            ({"router": router}, f"`router`.*router=<{type(router).__name__}")
            for router in (
                keras_moe.ExpertChoiceRouter(),
                keras_moe.HashRouter(),
                keras_moe.TopKRouter(2, priority="probability"),
                keras_moe.SwitchRouter(reroutes=1),
            )
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        zoo.LstmBackbone(V, **arguments)


def test_a_language_model_has_an_lstm():
    with pytest.raises(ValueError, match=r"`backbone`.*LSTM.*stack=\('dense',\)"):
        zoo.LstmCausalLM(zoo.LstmBackbone(V, hidden_dim=D, stack=("dense",)))
