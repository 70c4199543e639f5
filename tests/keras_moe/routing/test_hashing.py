import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import (
    ExpertChoiceRouter,
    FeedForwardExperts,
    HashRouter,
    MixtureOfExperts,
    SwitchRouter,
    TopKRouter,
    metrics,
)
from tests import oracle
from tests.backend import numpy
from tests.keras_moe.routing.examples import check_layer, random_weights

E, D, F = 4, 3, 5
X = np.random.default_rng(0).normal(size=(2, 6, D))
MASK = np.array([[True] * 6, [True, True, True, False, True, False]])
IDS = np.array([[0, 5, 2, 9, 7, 13], [4, 8, 12, 3, 11, 6]], "int32")


class WithIds(MixtureOfExperts):
    """`check_layer` knows of no ids."""

    def call(self, inputs, mask=None, training=False):
        return super().call(inputs, mask, training, token_ids=ops.convert_to_tensor(IDS))


@pytest.mark.every_backend
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padding"])
@pytest.mark.parametrize("group", ["sequence", "batch", 5])
@pytest.mark.parametrize("capacity_factor", [None, 0.75])
def test_is_the_expert_of_the_id_with_weight_1(group, mask, capacity_factor):
    router = HashRouter(capacity_factor=capacity_factor, min_capacity=1)
    layer = WithIds(FeedForwardExperts(E, F), router, group)
    layer.build((None, None, D))
    weights, x = random_weights(layer), X.copy()
    assert set(weights) == {"kernel_in", "kernel_out"}

    def loop():
        x_GSD, mask_GS = oracle.in_groups(x, mask, group)
        ids_GS1, _ = oracle.in_groups(IDS[..., None], mask, group)
        tokens = x_GSD.shape[1]
        capacity = capacity_factor and oracle.capacity(tokens, E, capacity_factor)
        one_hot = np.eye(E)[ids_GS1[..., 0].astype(int) % E]
        gates, _ = oracle.token_choice(one_hot, 1, capacity, mask=mask_GS)
        y = oracle.mixture(x_GSD, gates, lambda x_D, e: oracle.feed_forward(x_D, weights, e))
        return y.reshape(-1, D)[:12].reshape(x.shape), 0.0

    check_layer(layer, loop, x, weights, mask, compiles=group == 5)


def routed(router, ids, **call):
    return numpy(router(np.ones((*np.shape(ids), D), "float32"), token_ids=np.array(ids), **call))


class TestHashRouter:
    def test_is_the_remainder(self):
        routing = routed(HashRouter(3), [[0, 1, 2, 3, 7, 8191]])
        assert routing.expert_index[..., 0].tolist() == [[0, 1, 2, 0, 1, 1]]  # 8191 = 3 * 2730 + 1
        assert routing.logits is None
        assert routing.weight.sum() == 6 and set(routing.weight.reshape(-1)) <= {0.0, 1.0}

    def test_table(self):
        # Ids past the table's end begin again: 5 is 1, 6 is 2.
        routing = routed(HashRouter(3, table=[2, 2, 0, 1]), [[0, 1, 2, 3, 5, 6]])
        assert routing.expert_index[..., 0].tolist() == [[2, 2, 0, 1, 2, 0]]

    def test_capacity_is_filled_in_token_order(self):
        # ceil(6 tokens * .5 / 2 experts) = 2 slots
        router = HashRouter(2, capacity_factor=0.5, eval_capacity_factor=1.0, min_capacity=1)
        routing = routed(router, [[0, 2, 1, 4, 6, 8]], training=True)
        assert routing.token_index.tolist() == [[[0, 1], [2, 6]]]  # 6: empty
        assert routed(router, [[0, 2, 1, 4, 6, 8]]).token_index.shape[2] == 3

    def test_padding_takes_no_slot(self):
        mask = np.array([[True, False, True]])
        routing = routed(HashRouter(2), [[0, 0, 0]], mask=mask)
        assert routing.expert_index[..., 0].tolist() == [[0, 2, 0]]
        assert 1 not in routing.token_index

    def test_has_no_weights_and_no_losses(self):
        router = HashRouter(2)
        routing = routed(router, [[0, 1]])
        assert router.trainable_variables == [] and router.auxiliary_losses(routing) == []

    def test_every_config_key_makes_the_round_trip(self):
        arguments = {
            "num_experts": 4,
            "table": [3, 1, 2],
            "capacity_factor": 1.5,
            "eval_capacity_factor": 3.0,
            "min_capacity": 2,
        }
        assert set(arguments) == set(inspect.signature(HashRouter).parameters) - {"kwargs"}
        made = HashRouter(**arguments, name="mine")
        copy = HashRouter.from_config(made.get_config())
        assert copy.get_config() == made.get_config() and copy.name == "mine"
        for name, value in arguments.items():
            assert getattr(copy, name) == value
        assert HashRouter.from_config(HashRouter().get_config()).table is None


class TestInALayer:
    def layer(self, router=None, **kwargs):
        return MixtureOfExperts(FeedForwardExperts(E, F, seed=1), router or HashRouter(), **kwargs)

    def test_2d(self):
        layer = self.layer()
        y = numpy(layer(X.reshape(12, D), token_ids=IDS.reshape(12)))
        np.testing.assert_allclose(y, numpy(layer(X, token_ids=IDS)).reshape(12, D), rtol=1e-5)

    def test_no_tokens(self):
        y = self.layer()(ops.zeros((0, 6, D)), token_ids=ops.zeros((0, 6), "int32"))
        assert tuple(y.shape) == (0, 6, D)

    def test_statistics(self):
        layer = self.layer(HashRouter(eval_capacity_factor=0.5, min_capacity=1))
        # One slot per expert and sequence. Ids modulo 4: 0 1 2 1 3 1 and 0 0 0 3 3 2, of which the
        # second's 3 and 2 at places 3 and 5 are padding.
        layer(X, mask=MASK, token_ids=IDS)
        figures = metrics.read(layer)
        # 6 + 4 choices, of which 4 + 2 were kept; experts have 4, 3, 1 and 2.
        assert figures == pytest.approx(
            {"dropped": 0.4, "max_share": 1.6, "dead": 0.0, "entropy": 0.0}
        )

    def test_learns_by_fit_and_comes_back_from_a_file(self, tmp_path):
        keras.utils.set_random_seed(0)
        inputs, ids = keras.Input((None, D)), keras.Input((None,), dtype="int32")
        outputs = inputs + self.layer(HashRouter(table=[0, 3, 1, 2]))(inputs, token_ids=ids)
        model = keras.Model([inputs, ids], outputs)
        model.compile(
            keras.optimizers.Adam(0.02), "mse", jit_compile=keras.backend.backend() != "torch"
        )
        x = np.random.default_rng(0).normal(size=(16, 6, D)).astype("float32")
        ids = np.tile(IDS, (8, 1))
        losses = model.fit([x, ids], np.sin(2 * x), 8, epochs=8, verbose=0).history["loss"]
        assert losses[-1] < 0.9 * losses[0]
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(
            loaded.predict([x, ids], verbose=0), model.predict([x, ids], verbose=0)
        )

    def test_float32_whatever_the_policy(self):
        layer = MixtureOfExperts(FeedForwardExperts(E, F, dtype="mixed_bfloat16"), HashRouter())
        routing = layer.router(ops.cast(X, "bfloat16"), token_ids=IDS)
        assert {ops.dtype(routing.weight), ops.dtype(routing.probabilities)} == {"float32"}


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: HashRouter(table=[0.5]), r"`table`.*table=\[0.5\]"),
            (lambda: HashRouter(table=[[0], [1]]), r"`table`.*table=\[\[0\], \[1\]\]"),
            (lambda: HashRouter(2)(np.zeros((1, 2, 3))), "`token_ids`.*token_ids=None"),
            (lambda: HashRouter(table=[]), r"`table`.*table=\[\]"),
            (lambda: HashRouter(table=[0, -1]), r"`table`.*table=\[0, -1\]"),
            (
                lambda: HashRouter(4, table=[0, 4]),
                "`table`.* 4 .*num_experts=4",
            ),
            (lambda: HashRouter(min_capacity=0), "`min_capacity`.*min_capacity=0"),
        ],
    )
    def test_when_it_is_made(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_of_the_number_of_experts(self):
        with pytest.raises(ValueError, match="`num_experts`.*num_experts=None"):
            routed(HashRouter(), [[0]])

    def test_without_ids(self):
        layer = MixtureOfExperts(FeedForwardExperts(2, F), HashRouter())
        with pytest.raises(ValueError, match="`token_ids`.*token_ids=None.*HashRouter"):
            layer(X)

    @pytest.mark.parametrize("router", [SwitchRouter(), TopKRouter(2), ExpertChoiceRouter()])
    def test_ids_for_nothing(self, router):
        layer = MixtureOfExperts(FeedForwardExperts(2, F), router)
        with pytest.raises(ValueError, match=rf"`token_ids`.*\(2, 6\).*{type(router).__name__}"):
            layer(X, token_ids=IDS)

    def test_shape_of_the_ids(self):
        layer = MixtureOfExperts(FeedForwardExperts(2, F), HashRouter())
        with pytest.raises(ValueError, match=r"`token_ids`.*token_ids.*\(2, 4\)"):
            layer(X, token_ids=IDS[:, :4])
