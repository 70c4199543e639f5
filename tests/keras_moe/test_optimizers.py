import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import ExpertChoiceRouter, FeedForwardExperts, LayerExperts, MixtureOfExperts
from keras_moe.optimizers import Adafactor
from tests import oracle
from tests.backend import numpy

E, D, F = 3, 4, 5
STEPS = 4
# Shapes with what stands for one variable, and how many numbers the second moment takes.
SHAPES = {
    "kernel": ((D, F), False, D + F),
    "bias": ((F,), False, F),
    "number": ((), False, 1),
    "three axes": ((2, D, F), False, 2 * (D + F)),
    "kernels of experts": ((E, D, F), True, E * (D + F)),
    "biases of experts": ((E, F), True, E * F),
    "numbers of experts": ((E,), True, E),
}
CASES = pytest.mark.parametrize(("shape", "per_expert", "size"), SHAPES.values(), ids=SHAPES)


def normal(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape, scale=scale).astype("float32")


def variable_of(value, per_expert=False, dtype="float32"):
    variable = keras.Variable(value, dtype=dtype, name="kernel")
    variable.per_expert = per_expert
    return variable


def train(optimizer, variable, gradients):
    for gradient in gradients:
        gradient = ops.convert_to_tensor(gradient, variable.dtype)
        optimizer.apply([gradient], [variable])
    return numpy(ops.cast(variable, "float32"))


def after(value, gradients, per_expert=False, **kwargs):
    return train(Adafactor(0.5, **kwargs), variable_of(value, per_expert), gradients)


def state(optimizer):
    """How many numbers it keeps, but for the step and the rate."""
    return sum(int(np.prod(variable.shape)) for variable in optimizer.variables[2:])


@pytest.mark.every_backend
class TestUpdates:
    @CASES
    def test_are_the_papers(self, shape, per_expert, size):
        # The second gradient is larger than the first, so that updates are clipped.
        x, gradients = normal(*shape), normal(STEPS, *shape, seed=1)
        gradients[1] *= 9
        expected = oracle.adafactor(x, gradients, 0.5, per_expert)
        np.testing.assert_allclose(after(x, gradients, per_expert), expected, rtol=1e-5, atol=1e-6)

    @CASES
    def test_are_those_of_keras_for_every_expert_alone(self, shape, per_expert, size):
        x, gradients = normal(*shape), normal(STEPS, *shape, seed=1)
        slices = range(E) if per_expert else [...]
        for at in slices:
            theirs = train(
                keras.optimizers.Adafactor(0.5),
                variable_of(x[at]),
                gradients[:, at] if per_expert else gradients,
            )
            ours = after(x, gradients, per_expert)[at]
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_of_the_rows_that_an_embedding_looked_up(self):
        """Row 1 twice and row 3 once, with the gradient 1 for every number."""
        layer = keras.layers.Embedding(4, D)
        model = keras.Sequential([keras.Input((3,), dtype="int32"), layer])
        x = numpy(layer.embeddings)
        model.compile(Adafactor(0.5), lambda y, y_pred: ops.sum(y_pred, axis=(1, 2)))
        model.fit(np.array([[1, 3, 1]]), np.zeros((1, 3, D)), verbose=0)
        gradient = np.repeat([[0.0], [2.0], [0.0], [1.0]], D, axis=1)
        expected = oracle.adafactor(x, [gradient], 0.5)
        np.testing.assert_allclose(numpy(layer.embeddings), expected, rtol=1e-5, atol=1e-6)


class TestState:
    @CASES
    def test_size(self, shape, per_expert, size):
        optimizer = Adafactor()
        optimizer.build([variable_of(normal(*shape), per_expert)])
        assert state(optimizer) == size

    def test_of_a_model(self):
        layer, model = model_of(FeedForwardExperts(E, F, gated=True, use_bias=True))
        model.optimizer.build(model.trainable_variables)
        kernels, biases, router = 3 * E * (D + F), E * (D + F), D + E
        assert state(model.optimizer) == kernels + biases + router

    def test_is_float32(self):
        """So that means over many steps of bfloat16 variables do not stand still."""
        optimizer, variable = Adafactor(0.5), variable_of(normal(E, D, F), True, "bfloat16")
        x = numpy(ops.cast(variable, "float32"))
        gradient = numpy(ops.cast(ops.cast(normal(E, D, F, seed=1), "bfloat16"), "float32"))
        result = train(optimizer, variable, [gradient])
        assert {v.dtype for v in optimizer.variables[2:]} == {"float32"}
        assert variable.dtype == "bfloat16"
        expected = oracle.adafactor(x, [gradient], 0.5, True)
        np.testing.assert_allclose(result, expected, atol=0.01 * np.abs(expected).max())


class TestExpertsAreApart:
    @pytest.mark.parametrize("shape", [(E, D, F), (E, F)])
    def test_permuted(self, shape):
        x, gradients = normal(*shape), normal(STEPS, *shape, seed=1)
        order = [2, 0, 1]
        permuted = after(x[order], gradients[:, order], True)
        np.testing.assert_allclose(permuted, after(x, gradients, True)[order], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("shape", [(E, D, F), (E, F)])
    @pytest.mark.parametrize("scale", [0.0, 1e3])
    def test_what_one_expert_gets_changes_nothing_for_the_others(self, shape, scale):
        x, gradients = normal(*shape), normal(STEPS, *shape, seed=1)
        other_x, other = x.copy(), gradients.copy()
        other_x[1] *= scale
        other[:, 1] *= scale
        ours, theirs = after(x, gradients, True), after(other_x, other, True)
        np.testing.assert_allclose(ours[[0, 2]], theirs[[0, 2]], rtol=1e-6, atol=1e-6)
        assert np.abs(ours[1] - theirs[1]).max() > 0.1

    @pytest.mark.parametrize("shape", [(E, D, F), (E, F)])
    def test_a_dead_expert_stays_and_comes_back_gently(self, shape):
        x, gradients = normal(*shape), normal(STEPS, *shape, seed=1)
        gradients[:-1, 1] = 0
        np.testing.assert_array_equal(after(x, gradients[:-1], True)[1], x[1])
        last = after(x, gradients, True)[1] - x[1]
        size = np.sqrt(np.mean(last**2)) / np.sqrt(np.mean(x[1] ** 2))
        assert size == pytest.approx(min(0.5, STEPS**-0.5), rel=1e-4)  # clipped at 1

    def test_banks_are_known(self):
        layer, model = model_of(FeedForwardExperts(E, F, use_bias=True))
        known = {v.name for v in model.trainable_variables if getattr(v, "per_expert", False)}
        assert known == {"kernel_in", "kernel_out", "bias_in", "bias_out"}
        # An expert that is a layer has matrices of its own: none of their axes counts experts.
        layer, model = model_of(LayerExperts([keras.layers.Dense(D) for _ in range(2)]))
        assert not any(getattr(v, "per_expert", False) for v in model.trainable_variables)


def test_a_row_and_a_column_without_gradient():
    """An input that is always 0 and a hidden unit that never fires: 1e-30 * 1e-30 underflows."""
    x, gradient = normal(D, F), normal(D, F, seed=1)
    gradient[0], gradient[:, 0] = 0, 0
    result = after(x, [gradient] * 2)
    assert np.isfinite(result).all()
    np.testing.assert_array_equal(result[0], x[0])


class TestOptions:
    X, GRADIENTS = normal(E, D, F), normal(STEPS, E, D, F, seed=1)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("beta_2_decay", -0.5),
            ("epsilon_1", 1.0),
            ("epsilon_2", 10.0),
            ("clip_threshold", 0.5),
            ("weight_decay", 0.5),
        ],
    )
    def test_each_does_something(self, name, value):
        one, two = (after(self.X, self.GRADIENTS, True, **kw) for kw in ({}, {name: value}))
        assert np.abs(one - two).max() > 0.01

    # Updates clipped to 1 of weights of size 1: the rate is the size of the first difference.
    @pytest.mark.parametrize(
        ("rate", "relative_step", "steps"),
        [
            (0.9, True, [0.9, 2**-0.5, 3**-0.5]),
            (0.9, False, [0.9, 0.9, 0.9]),
            (keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.9, 0.8]), True, [0.9, 0.8]),
        ],
    )
    def test_rate(self, rate, relative_step, steps):
        optimizer = Adafactor(rate, relative_step=relative_step, clip_threshold=0.1)
        variable = variable_of(np.ones((), "float32"))
        before = 1.0
        for expected in steps:
            now = float(train(optimizer, variable, [np.float32(1.0)]))
            assert before - now == pytest.approx(0.1 * expected * before, rel=1e-5)
            before = now

    def test_config_round_trip(self):
        arguments = {
            "learning_rate": 0.5,
            "beta_2_decay": -0.5,
            "epsilon_1": 1e-20,
            "epsilon_2": 1e-2,
            "clip_threshold": 2.0,
            "relative_step": False,
        }
        made = Adafactor(**arguments, name="mine")
        copy = keras.optimizers.deserialize(keras.optimizers.serialize(made))
        assert type(copy) is Adafactor and copy.get_config() == made.get_config()
        for name, value in arguments.items():
            assert float(getattr(copy, name)) == pytest.approx(float(value))


def model_of(experts, **kwargs):
    inputs = keras.Input((None, D))
    layer = MixtureOfExperts(experts, ExpertChoiceRouter(), **kwargs)
    model = keras.Model(inputs, inputs + layer(inputs))
    model.compile(Adafactor(0.1), "mse")
    return layer, model


X = normal(2, 6, D)


def fit(model, epochs):
    return model.fit(X, np.sin(3 * X), epochs=epochs, verbose=0).history["loss"]


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_fits(policy):
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    try:
        _, model = model_of(FeedForwardExperts(E, F, use_bias=True))
    finally:
        keras.config.set_dtype_policy("float32")
    loss = fit(model, 20)
    assert loss[-1] < 0.8 * loss[0]
    for variable in model.trainable_variables:
        assert variable.dtype == "float32" and np.isfinite(numpy(variable)).all()


def test_saves_its_state_with_the_model(tmp_path):
    keras.utils.set_random_seed(0)
    _, model = model_of(FeedForwardExperts(E, F, use_bias=True))
    fit(model, 3)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is Adafactor
    for ours, theirs in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(numpy(ours), numpy(theirs))
    np.testing.assert_allclose(fit(loaded, 2), fit(model, 2), rtol=1e-6)
    for ours, theirs in zip(model.trainable_variables, loaded.trainable_variables, strict=True):
        np.testing.assert_allclose(numpy(ours), numpy(theirs), rtol=1e-5, atol=1e-6)
