"""`ExpertParallel` where one device, or another backend, is enough."""

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe.distribution import ExpertParallel, parallel
from keras_moe.distribution.active import active, bank
from keras_moe.distribution.layouts import expert_axes, other_axes

JAX = keras.backend.backend() == "jax"


def test_layouts_of_experts():
    assert expert_axes("kernel_in") == ("expert", None, "model")
    assert expert_axes("kernel_out") == ("expert", "model", None)
    assert expert_axes("anything") == ("expert",)


@pytest.mark.parametrize(
    "path, shape, axes",
    [
        ("block_1/attention/query/kernel", (16, 8), (None, "model")),
        ("attention/query/kernel", (16, 2, 8), (None, "model", None)),
        ("attention/query/bias", (2, 8), ("model", None)),
        ("block_1/attention/output/kernel", (8, 16), ("model", None)),
        ("self_attention/attention_output/kernel", (2, 8, 16), ("model", None, None)),
        ("block_2/feed_forward/hidden/kernel", (16, 32), (None, "model")),
        ("block_2/feed_forward/output/kernel", (32, 16), ("model", None)),
        ("moe/shared/kernel_out", (1, 32, 16), (None, "model", None)),
        ("attention/query/kernel", (16, 9), (None, None)),  # 9 by 2
        ("token_embedding/embeddings", (40, 16), (None, None)),
        ("adam/block_1_attention_query_kernel_momentum", (16, 8), (None, None)),
    ],
)
def test_layouts_of_the_rest(path, shape, axes):
    assert other_axes(path, shape, 2) == axes


@pytest.mark.skipif(not JAX, reason="a mesh of one device, on JAX")
class TestOneDevice:
    def test_the_scope_ends(self):
        assert active() is None and bank() is None
        with pytest.raises(KeyError), ExpertParallel().scope():
            assert active() is not None
            raise KeyError
        assert active() is None
        assert keras.distribution.distribution() is None

    def test_outputs_are_those_without(self):
        layer = keras_moe.MixtureOfExperts(
            keras_moe.FeedForwardExperts(4, 8, seed=0), keras_moe.TopKRouter(2)
        )
        x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype("float32")
        expected = layer(x)
        with ExpertParallel().scope():
            np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", ["data", "experts", "model"])
    def test_arguments(self, name):
        with pytest.raises(ValueError, match=f"`{name}` must be a positive integer"):
            ExpertParallel(**{name: 0})

    def test_a_mesh_larger_than_the_devices(self):
        with pytest.raises(ValueError, match=r"at most the number of devices, 1\..*a mesh of 6"):
            ExpertParallel(data=2, experts=3, devices=["cpu:0"])

    def test_several_processes_share_all_devices(self, monkeypatch):
        monkeypatch.setattr(parallel, "num_processes", lambda: 2)
        with pytest.raises(ValueError, match="`devices` must be None with several processes"):
            ExpertParallel(devices=["cpu:0"])
        four = staticmethod(lambda: ["cpu:0", "cpu:1", "cpu:2", "cpu:3"])
        monkeypatch.setattr(parallel._engine(), "list_devices", four)
        with pytest.raises(ValueError, match="number of devices of all processes, 4. .* mesh of 2"):
            ExpertParallel(data=1, experts=2)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="there is an engine")
def test_where_there_is_no_engine():
    with pytest.raises(ValueError, match="`ExpertParallel` must be used on JAX.*KERAS_BACKEND=jax"):
        ExpertParallel()
