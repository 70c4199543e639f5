import contextlib
import inspect
import weakref

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import (
    FeedForwardExperts,
    LayerExperts,
    LinearExperts,
    MixtureOfExperts,
    SwitchRouter,
    TopKRouter,
)
from tests import oracle
from tests.backend import compiled, numpy, run

tensor = ops.convert_to_tensor
VARIANTS = pytest.mark.parametrize(
    "options",
    [{}, {"gated": True}, {"use_bias": True}, {"gated": True, "use_bias": True}],
    ids=["plain", "gated", "biased", "gated and biased"],
)


def random_weights(layer, seed=0):
    """Draws every weight from a normal; returns them as float64 arrays by name."""
    rng = np.random.default_rng(seed)
    weights = {v.name: rng.normal(size=v.shape) for v in layer.trainable_variables}
    for variable in layer.trainable_variables:
        variable.assign(weights[variable.name])
    return weights


class TestFeedForwardExperts:
    @pytest.mark.every_backend
    @VARIANTS
    @pytest.mark.parametrize("row_expert", [None, [0, 0, 1, 2, 2]], ids=["capacity", "dropless"])
    def test_output_and_gradients_are_the_oracles(self, options, row_expert):
        experts = FeedForwardExperts(3, 4, **options)
        rows = 3 if row_expert is None else 5
        experts.build((None, None, 3))
        weights = random_weights(experts)
        rng = np.random.default_rng(1)
        x, cotangent = rng.normal(size=(2, rows, 2, 3))

        def loop():
            y = np.zeros(x.shape)
            for row, slot in np.ndindex(rows, 2):
                expert = row if row_expert is None else row_expert[row]
                y[row, slot] = oracle.feed_forward(x[row, slot], weights, expert)
            return y

        call = {} if row_expert is None else {"row_expert": np.array(row_expert, "int32")}
        y, _, by_x, by_weight = run(experts, x, cotangent, **call)
        np.testing.assert_allclose(y, loop(), rtol=1e-5, atol=1e-5)
        slopes = oracle.gradient(lambda: np.sum(loop() * cotangent), [x, *weights.values()])
        np.testing.assert_allclose(by_x, slopes[0], rtol=1e-5, atol=1e-5)
        for ours, slope in zip(by_weight, slopes[1:], strict=True):
            np.testing.assert_allclose(ours, slope, rtol=1e-5, atol=1e-5)

    @VARIANTS
    def test_weights(self, options):
        experts = FeedForwardExperts(3, 4, **options)
        experts.build((None, None, 5))
        shapes = {v.name: tuple(v.shape) for v in experts.weights if "seed" not in v.path}
        expected = {"kernel_in": (3, 5, 4), "kernel_out": (3, 4, 5)}
        if options.get("gated"):
            expected["kernel_gate"] = (3, 5, 4)
        if options.get("use_bias"):
            expected |= {"bias_in": (3, 4), "bias_out": (3, 5)}
        assert shapes == expected
        assert all((numpy(v) == 0).all() for v in experts.weights if "bias" in v.name)

    @pytest.mark.parametrize(
        ("activation", "expected"), [("relu", [0, 2]), ("linear", [-1, 2]), (ops.square, [1, 4])]
    )
    def test_activation(self, activation, expected):
        experts = FeedForwardExperts(1, 1, activation=activation)
        experts.build((None, None, 1))
        for kernel in experts.trainable_variables:
            kernel.assign(np.ones((1, 1, 1)))
        assert numpy(experts(tensor([[[-1.0], [2.0]]])))[0, :, 0].tolist() == expected

    @pytest.mark.parametrize("num_experts", [1, 32])
    @pytest.mark.parametrize("init_scale", [1.0, 0.1])
    def test_initial_variance_is_that_of_one_experts_matrix(self, num_experts, init_scale):
        """However many experts there are: Keras would count them as part of the fan."""
        keras.utils.set_random_seed(0)
        experts = FeedForwardExperts(num_experts, 128, gated=True, init_scale=init_scale)
        experts.build((None, None, 64))
        for name, fan_in in (("kernel_in", 64), ("kernel_gate", 64), ("kernel_out", 128)):
            kernel = numpy(getattr(experts, name))
            # 8,192 numbers per expert: the standard deviation is known to 1 %.
            expected = np.sqrt(init_scale / fan_in)
            assert kernel.std() == pytest.approx(expected, rel=0.04)
            assert kernel.std(axis=(1, 2)) == pytest.approx(
                np.full(num_experts, expected), rel=0.06
            )

    def test_every_kernel_of_every_expert_is_another(self):
        experts = FeedForwardExperts(3, 4, gated=True, seed=5)
        experts.build((None, None, 4))
        kernels = np.concatenate([numpy(v) for v in experts.trainable_variables])
        assert len(np.unique(np.round(kernels, 6), axis=0)) == 9

    def test_seed(self):
        a, b, c = (FeedForwardExperts(2, 4, seed=seed) for seed in (5, 5, 6))
        for experts in (a, b, c):
            experts.build((None, None, 3))
        np.testing.assert_array_equal(numpy(a.kernel_in), numpy(b.kernel_in))
        assert (numpy(a.kernel_in) != numpy(c.kernel_in)).any()

    def test_dropout_of_hidden_units_only_while_training(self):
        experts = FeedForwardExperts(2, 1000, activation="linear", dropout=0.4, seed=1)
        experts.build((None, None, 1))
        for kernel in experts.trainable_variables:
            kernel.assign(np.full(kernel.shape, 1.0))
        x = ops.ones((2, 3, 1))
        assert (numpy(experts(x)) == 1000).all()
        first, second = (numpy(experts(x, training=True)) for _ in range(2))
        # A sum of 1,000 numbers that are 0 (40 %) or 1 / .6: mean 1,000, standard deviation 26.
        assert first == pytest.approx(np.full((2, 3, 1), 1000.0), abs=130)
        assert first.std() > 5 and (first != second).any()

    @pytest.mark.every_backend
    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
    def test_computes_in_the_dtype_of_its_policy(self, policy):
        experts = FeedForwardExperts(2, 4, gated=True, use_bias=True, dropout=0.5, dtype=policy)
        y = experts(np.ones((2, 3, 5), "float32"), training=True)
        assert ops.dtype(y) == "bfloat16"

    @pytest.mark.parametrize("implementation", ["batched", "loop"])
    def test_implementation_is_the_one_that_is_asked_for(self, implementation, monkeypatch):
        asked = []

        def product(x_RCD, kernel_EDF, row_expert, implementation, before):
            asked.append(implementation)
            return ops.matmul(x_RCD if before is None else before(*x_RCD), kernel_EDF)

        monkeypatch.setattr("keras_moe.experts.expert_product", product)
        FeedForwardExperts(2, 3, implementation=implementation)(ops.ones((2, 1, 4)))
        assert set(asked) == {implementation}

    def test_compute_output_shape(self):
        assert FeedForwardExperts(2, 4).compute_output_shape((None, None, 5)) == (None, None, 5)

    ARGUMENTS = {
        "num_experts": 3,
        "hidden_dim": 4,
        "activation": "gelu",
        "gated": True,
        "use_bias": True,
        "dropout": 0.25,
        "init_scale": 0.5,
        "implementation": "loop",
        "seed": 7,
    }

    def test_every_config_key_makes_the_round_trip(self):
        parameters = inspect.signature(FeedForwardExperts.__init__).parameters
        assert set(self.ARGUMENTS) == set(parameters) - {"self", "kwargs"}
        made = FeedForwardExperts(**self.ARGUMENTS, name="mine", dtype="mixed_bfloat16")
        copy = FeedForwardExperts.from_config(made.get_config())
        assert copy.get_config() == made.get_config()
        assert (copy.name, copy.dtype_policy.name) == ("mine", "mixed_bfloat16")
        for name, value in self.ARGUMENTS.items():
            expected = keras.activations.gelu if name == "activation" else value
            assert getattr(copy, name) == expected != parameters[name].default

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_experts": 0}, "`num_experts`.*num_experts=0"),
            ({"hidden_dim": 0}, "`hidden_dim`.*hidden_dim=0"),
            ({"dropout": 1.0}, "`dropout`.*dropout=1.0"),
            ({"dropout": -0.5}, "`dropout`.*dropout=-0.5"),
            ({"init_scale": 0}, "`init_scale`.*init_scale=0"),
            ({"implementation": "fast"}, "`implementation`.*implementation='fast'"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            FeedForwardExperts(**{"num_experts": 2, "hidden_dim": 4, **arguments})


@pytest.mark.every_backend
class TestRematerialisation:
    """In a `keras.RematScope`; whole layers are tested in `test_moe.py`."""

    # Compiled anew, the program may round to bfloat16 (2^-8) elsewhere.
    @pytest.mark.parametrize(("policy", "rtol"), [("float32", 1e-6), ("mixed_bfloat16", 2**-7)])
    @pytest.mark.parametrize("row_expert", [None, [0, 0, 1, 2, 2]], ids=["capacity", "dropless"])
    def test_gradients_are_the_plain_ones(self, row_expert, policy, rtol):
        def of(scope):
            with scope:
                experts = FeedForwardExperts(3, 4, gated=True, use_bias=True, dtype=policy, seed=1)
            experts.build((None, None, 3))
            random_weights(experts)
            rows = None if row_expert is None else tensor(row_expert, "int32")
            return run(experts, x, cotangent, row_expert=rows)

        x, cotangent = np.random.default_rng(1).normal(
            size=(2, 3 if row_expert is None else 5, 2, 3)
        )
        plain, remat = of(contextlib.nullcontext()), of(keras.RematScope("full"))
        np.testing.assert_allclose(remat[0], plain[0], rtol=rtol)
        for ours, expected in zip([remat[2], *remat[3]], [plain[2], *plain[3]], strict=True):
            np.testing.assert_allclose(ours, expected, rtol=rtol)

    @pytest.mark.skipif(keras.backend.backend() != "torch", reason="the others compile")
    @pytest.mark.parametrize("row_expert", [None, [0, 0, 1, 2, 2]], ids=["capacity", "dropless"])
    def test_hidden_units_do_not_stay_in_memory(self, row_expert):
        def stay(scope):
            made = []

            def activation(x):
                made.append(weakref.ref(hidden := ops.relu(x)))
                return hidden

            with scope:
                experts = FeedForwardExperts(3, 4, activation)
            outputs = experts(
                ops.ones((3 if row_expert is None else 5, 2, 3)), row_expert=row_expert
            )
            assert outputs.requires_grad
            return made[-1]() is not None

        assert stay(contextlib.nullcontext())
        assert not stay(keras.RematScope("full"))


class TestLinearExperts:
    @pytest.mark.parametrize("row_expert", [None, [0, 0, 1, 2, 2]], ids=["capacity", "dropless"])
    def test_output_and_gradients(self, row_expert):
        experts = LinearExperts(3, 4)
        experts.build((None, None, 5))
        kernel_EDF = random_weights(experts)["kernel"]
        each = np.arange(3) if row_expert is None else np.array(row_expert)
        rng = np.random.default_rng(1)
        x, cotangent = rng.normal(size=(len(each), 2, 5)), rng.normal(size=(len(each), 2, 4))
        call = {} if row_expert is None else {"row_expert": np.array(row_expert, "int32")}
        y, _, by_x, (by_kernel,) = run(experts, x, cotangent, **call)
        np.testing.assert_allclose(y, x @ kernel_EDF[each], rtol=1e-5, atol=1e-5)
        by_x_expected = cotangent @ kernel_EDF[each].transpose(0, 2, 1)
        np.testing.assert_allclose(by_x, by_x_expected, rtol=1e-5, atol=1e-5)
        by_kernel_expected = np.zeros(kernel_EDF.shape)
        for row, expert in enumerate(each):
            by_kernel_expected[expert] += x[row].T @ cotangent[row]
        np.testing.assert_allclose(by_kernel, by_kernel_expected, rtol=1e-5, atol=1e-5)

    def test_initial_weights(self):
        """Of each expert's own fan; 8,192 numbers: the standard deviation is known to 1 %."""
        experts, same = (LinearExperts(3, 128, init_scale=0.1, seed=5) for _ in range(2))
        for bank in (experts, same):
            bank.build((None, None, 64))
        kernel = numpy(experts.kernel)
        assert kernel.std(axis=(1, 2)) == pytest.approx(np.full(3, np.sqrt(0.1 / 64)), rel=0.06)
        np.testing.assert_array_equal(kernel, numpy(same.kernel))

    def test_in_a_mixture(self):
        layer = MixtureOfExperts(LinearExperts(2, 5, dtype="bfloat16"), SwitchRouter())
        assert layer.compute_output_shape((None, 4, 3)) == (None, 4, 5)
        assert tuple(layer(np.ones((2, 4, 3), "float32")).shape) == (2, 4, 5)
        assert ops.dtype(layer.experts(np.ones((2, 4, 3), "float32"))) == "bfloat16"

    def test_every_config_key_makes_the_round_trip(self):
        arguments = {"num_experts": 3, "output_dim": 4, "init_scale": 0.5, "seed": 7}
        copy = LinearExperts.from_config(LinearExperts(**arguments, name="mine").get_config())
        assert copy.name == "mine"
        assert {name: getattr(copy, name) for name in arguments} == arguments

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_experts": 0}, "`num_experts`.*num_experts=0"),
            ({"output_dim": 0}, "`output_dim`.*output_dim=0"),
            ({"init_scale": 0}, "`init_scale`.*init_scale=0"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            LinearExperts(**{"num_experts": 2, "output_dim": 4, **arguments})


def dense():
    return keras.layers.Dense(2)


def sequential():
    return keras.Sequential([keras.layers.Dense(4, activation="relu"), keras.layers.Dense(2)])


def functional():
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, activation="tanh")(inputs)
    hidden = keras.layers.Dropout(0.5)(hidden)
    return keras.Model(inputs, keras.layers.Dense(2)(hidden) + keras.layers.Dense(2)(inputs))


ROUTERS = pytest.mark.parametrize(
    "router",
    [
        lambda: TopKRouter(2, 3, capacity_factor=0.75, eval_capacity_factor=0.75, min_capacity=1),
        lambda: TopKRouter(2, 3),
    ],
    ids=["capacity", "dropless"],
)


class TestLayerExperts:
    def mixture(self, router, layers):
        layer = MixtureOfExperts(LayerExperts(layers), router())
        layer.build((None, None, 3))
        layer.router.kernel.assign(np.random.default_rng(3).normal(size=(3, 3)))
        return layer

    def combine_weights(self, layer, x):
        """What the oracle says of the router: `[groups, tokens, experts]`."""
        router = layer.router
        p = oracle.softmax(x @ numpy(router.kernel).astype("float64"))
        factor = router.eval_capacity_factor
        capacity = factor and oracle.capacity(x.shape[1], 3, factor, router.k)
        return oracle.token_choice(p, router.k, capacity)[0]

    @ROUTERS
    def test_is_each_layer_on_its_own_tokens(self, router):
        layers = [dense(), sequential(), functional()]
        layer = self.mixture(router, layers)
        x = np.random.default_rng(0).normal(size=(2, 6, 3))
        weight = self.combine_weights(layer, x)
        assert (weight.sum(axis=-1) == 0).any() or router().eval_capacity_factor is None
        each = [numpy(one(tensor(x.reshape(12, 3), "float32"))) for one in layers]
        each = np.stack(each, axis=1).reshape(2, 6, 3, 2)
        expected = np.einsum("gse,gsed->gsd", weight, each)
        np.testing.assert_allclose(numpy(layer(x)), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.every_backend
    @ROUTERS
    def test_gradients(self, router):
        """Of linear experts, which the oracle knows by heart: `y = w (x kernel + bias)`."""
        layer = self.mixture(router, [dense() for _ in range(3)])
        for number, one in enumerate(layer.experts.layers):
            random_weights(one, number)
        rng = np.random.default_rng(0)
        x, cotangent = rng.normal(size=(2, 6, 3)), rng.normal(size=(2, 6, 2))
        kernels, biases = (
            np.stack([numpy(getattr(one, name)) for one in layer.experts.layers]).astype("float64")
            for name in ("kernel", "bias")
        )

        def loss():
            weight = self.combine_weights(layer, x)
            y = np.einsum("gse,gsd,edf->gsf", weight, x, kernels) + weight @ biases
            return np.sum(y * cotangent)

        layer.router.load_balancing_weight = 0.0
        _, _, by_x, by_weight = run(layer, x, cotangent)
        by_kernel, by_bias = by_weight[0:6:2], by_weight[1:6:2]  # then the router's
        slopes = oracle.gradient(loss, [x, kernels, biases])
        for ours, expected in zip((by_x, by_kernel, by_bias), slopes, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.every_backend
    @ROUTERS
    def test_state_of_the_layers(self, router):
        """Batch statistics move and dropout drops, while training and then only."""
        layers = [
            keras.Sequential([keras.layers.BatchNormalization(), keras.layers.Dropout(0.5, seed=1)])
            for _ in range(3)
        ]
        layer = self.mixture(router, layers)
        x = np.random.default_rng(0).normal(size=(2, 6, 3)).astype("float32")

        def states():
            return [numpy(v) for one in layers for v in one.non_trainable_variables]

        before = states()
        np.testing.assert_array_equal(numpy(layer(x)), numpy(layer(x)))
        for a, b in zip(before, states(), strict=True):
            np.testing.assert_array_equal(a, b)
        first, second = (numpy(layer(x, training=True)) for _ in range(2))
        assert (first != second).any()
        for a, b in zip(before, states(), strict=True):
            assert (a != b).any()

    def test_statistics_are_those_of_the_layers_own_tokens(self):
        """Expert 0 sees 1 and 3, expert 1 sees 10: one step of momentum 0 shows the means."""
        layers = [keras.layers.BatchNormalization(momentum=0.0) for _ in range(2)]
        layer = MixtureOfExperts(LayerExperts(layers), SwitchRouter(capacity_factor=None, jitter=0))
        layer.build((None, None, 1))
        # Dropless with 3 assignments and 2 experts: rows of one slot. Where XLA compiles, each
        # is a batch, so that the last one has the last word; elsewhere an expert's rows are one.
        first = -3 if keras.backend.backend() == "jax" else -2
        layer.router.kernel.assign([[-1.0, 1.0]])
        layer(np.array([[[-1.0], [-3.0], [10.0]]], "float32"), training=True)
        assert [float(numpy(one.moving_mean)[0]) for one in layers] == [first, 10]

    @ROUTERS
    def test_trains_compiled(self, router):
        layers = [
            keras.Sequential(
                [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), dense()]
            )
            for _ in range(3)
        ]
        inputs = keras.Input((6, 3))
        outputs = MixtureOfExperts(LayerExperts(layers), router())(inputs)
        model = keras.Model(inputs, outputs)
        jit = keras.backend.backend() != "torch"
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
        before = [numpy(one.layers[-1].kernel) for one in layers]
        rng = np.random.default_rng(0)
        history = model.fit(rng.normal(size=(8, 6, 3)), np.ones((8, 6, 2)), 4, verbose=0)
        assert np.isfinite(history.history["loss"]).all()
        for one, kernel in zip(layers, before, strict=True):
            assert (numpy(one.layers[-1].kernel) != kernel).any()
            assert (numpy(one.layers[0].moving_mean) != 0).any()

    def test_other_output_width(self):
        experts = LayerExperts([keras.layers.Dense(5), keras.layers.Dense(5)])
        assert experts.num_experts == 2
        assert experts.compute_output_shape((2, None, 3)) == (2, None, 5)
        layer = MixtureOfExperts(experts, SwitchRouter())
        assert layer.compute_output_shape((None, 4, 3)) == (None, 4, 5)
        assert tuple(layer(np.ones((2, 4, 3), "float32")).shape) == (2, 4, 5)

    def test_config_makes_the_round_trip(self):
        experts = LayerExperts(
            [keras.layers.Dense(5, activation="relu"), functional()], name="mine"
        )
        copy = LayerExperts.from_config(experts.get_config())
        assert copy.get_config() == experts.get_config()
        assert [type(layer) for layer in copy.layers] == [type(layer) for layer in experts.layers]
        assert copy.layers[0].activation is keras.activations.relu

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            (lambda: [], r"`layers`.*layers=\[\]"),
            (lambda: [dense(), "dense"], "`layers`.*'dense'"),
            (lambda: [dense()] * 2, "`layers`.*different"),
        ],
    )
    def test_errors(self, layers, message):
        with pytest.raises(ValueError, match=message):
            LayerExperts(layers())

    def test_widths_that_differ(self):
        experts = LayerExperts([keras.layers.Dense(2), keras.layers.Dense(3)])
        with pytest.raises(ValueError, match=r"`layers`.*\[2, 3\]"):
            experts.build((None, None, 4))


@pytest.mark.every_backend
def test_compiles():
    experts = FeedForwardExperts(3, 4, gated=True, use_bias=True)
    x, row_expert = ops.ones((5, 2, 3)), tensor([0, 0, 1, 2, 2], "int32")
    experts.build((None, None, 3))
    jitted = compiled(lambda x: experts(x, row_expert=row_expert))(x)
    np.testing.assert_allclose(
        numpy(jitted), numpy(experts(x, row_expert=row_expert)), rtol=1e-5, atol=1e-6
    )
