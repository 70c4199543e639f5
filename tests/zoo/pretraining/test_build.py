import types

import keras
import numpy as np
import pytest

import keras_moe
import zoo
from keras_moe.reading import mixtures
from tests.backend import numpy
from zoo.models import builders
from zoo.pretraining import build

TINY = {"num_layers": 2, "num_heads": 2, "hidden_dim": 8, "key_dim": 4, "intermediate_dim": 16}
SETTINGS = {
    "model": "switch",
    "size": "mini",
    "num_experts": 4,
    "capacity_factor": "default",
    "router_z_weight": 0.0,
    "dropout": 0.0,
    "residual_scale": 1.0,
    "dtype": "float32",
    "optimizer": "adamw",
    "learning_rate": 0.5,
    "schedule": "cosine",
    "steps": 20,
    "warmup_steps": 4,
    "accumulate": 1,
    "clip": 1.0,
}


@pytest.fixture(autouse=True, scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(builders.SIZES, "mini", {**builders.SIZES["mini"], **TINY})
        yield


def backbone(architecture="encoder", **settings):
    return build.initial_backbone({**SETTINGS, **settings}, architecture)


@pytest.mark.parametrize(
    ("model", "architecture", "small_ones"),
    [
        # Attention and feed-forward layer or experts, of each of two blocks.
        ("switch", "encoder", 4),
        ("dense", "decoder", 4),
        # A decoder's blocks have attention to the encoder, too.
        ("expert_choice", "encoder_decoder", 4 + 6),
    ],
)
def test_the_weights_that_end_a_layer_start_small(model, architecture, small_ones):
    whole, small = (backbone(architecture, model=model, residual_scale=x) for x in (1.0, 0.1))
    ratios = [
        np.std(ours) / np.std(theirs)
        for ours, theirs in zip(small.get_weights(), whole.get_weights(), strict=True)
        if np.std(theirs) > 0
    ]
    assert sum(0.03 < ratio < 0.3 for ratio in ratios) == small_ones
    assert sum(0.3 < ratio < 3 for ratio in ratios) == len(ratios) - small_ones


def test_capacities_are_those_asked_for():
    for asked, factors in (("default", (1.25, 2.0)), (None, (None, None)), (3.0, (3.0, 3.0))):
        config = backbone(capacity_factor=asked).router_config["config"]
        assert (config["capacity_factor"], config["eval_capacity_factor"]) == factors


def test_every_router_has_the_z_loss():
    model = backbone("encoder_decoder", model="expert_choice", router_z_weight=0.5)
    weights = [layer.router.router_z_weight for layer in mixtures(model).values()]
    assert weights == [0.5, 0.5]


def test_a_model_of_any_size_has_the_vocabulary_of_the_tokenizer(monkeypatch):
    monkeypatch.setitem(builders.SIZES, "small", {**builders.SIZES["small"], **TINY})
    assert backbone(size="small").vocabulary_size == 8192


def rates(**settings):
    """The learning rate before each of 21 steps."""
    weight = keras.Variable(np.ones((2, 2), "float32"))
    model = types.SimpleNamespace(trainable_weights=[weight])
    optimizer = build.make_optimizer({**SETTINGS, **settings}, model)
    optimizer.build([weight])
    found = []
    for _ in range(21):
        found.append(float(optimizer.learning_rate))
        optimizer.apply([keras.ops.ones((2, 2))], [weight])
    return np.array(found)


def test_schedules():
    # Half the peak 0.5 in the middle of warm-up from a hundredth; half and a hundredth of it at the
    # middle and the end of the cosine.
    cosine = rates()
    expected = [0.005, 0.2525, 0.5, 0.2525, 0.005]
    np.testing.assert_allclose(cosine[[0, 2, 4, 12, 20]], expected, rtol=1e-5)
    # One over the square root: half of the peak at four times the warm-up.
    inverse_sqrt = rates(schedule="inverse_sqrt")[[3, 15]]
    np.testing.assert_allclose(inverse_sqrt, [0.5, 0.25], rtol=1e-5)
    # The steps are counted one by one where two of them make an update.
    np.testing.assert_array_equal(rates(accumulate=2), cosine)


def test_optimizers():
    model = backbone()
    adamw = build.make_optimizer({**SETTINGS, "clip": 0.25}, model)
    assert isinstance(adamw, keras.optimizers.AdamW) and adamw.global_clipnorm == 0.25
    assert build.make_optimizer({**SETTINGS, "clip": 0}, model).global_clipnorm is None
    adafactor = build.make_optimizer({**SETTINGS, "optimizer": "adafactor", "accumulate": 2}, model)
    assert isinstance(adafactor, keras_moe.optimizers.Adafactor)
    assert adafactor.gradient_accumulation_steps == 2


def test_only_matrices_decay():
    preprocessor = zoo.EncoderTextClassifierPreprocessor(zoo.default_tokenizer(), 8)
    model = zoo.EncoderMaskedLM(backbone(), preprocessor)
    optimizer = build.make_optimizer(SETTINGS, model)
    for weight in model.trainable_variables:
        weight.assign(keras.ops.ones(weight.shape))
    optimizer.build(model.trainable_variables)
    # Without gradients only decay changes a weight, by the first rate, 0.005, times 0.01.
    gradients = [keras.ops.zeros(weight.shape) for weight in model.trainable_variables]
    optimizer.apply(gradients, model.trainable_variables)
    decays, of_positions = {}, []
    for weight in model.trainable_variables:
        change = np.unique(1 - numpy(weight))
        assert change == pytest.approx([0.00005], rel=0.01) or change.tolist() == [0]
        if "position_bias" in weight.path:
            of_positions.append(bool(change))
        else:
            decays[weight.path.rpartition("/")[2]] = bool(change)
    assert of_positions == [False]
    assert decays == {
        "embeddings": True,
        "kernel": True,
        "kernel_in": True,
        "kernel_gate": True,
        "kernel_out": True,
        "scale": False,
        "bias": False,
        "gamma": False,
        "beta": False,
        "output_bias": False,
    }
