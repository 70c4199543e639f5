"""`ExpertParallel` where a mesh of one device, or an error, is enough."""

import os

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe.distribution import ExpertParallel, parallel
from keras_moe.distribution.active import active, bank

BACKEND = keras.backend.backend()
if BACKEND == "torch":
    pytest.skip("PyTorch has no engine", allow_module_level=True)
pytestmark = pytest.mark.every_backend
same_on_tensorflow = pytest.mark.skipif(BACKEND != "jax", reason="the same on JAX and TensorFlow")


def test_scope_ends_with_an_error_inside():
    trainer = keras.Model.make_train_function
    assert active() is None and bank() is None
    with pytest.raises(KeyError), ExpertParallel(data=1).scope():
        assert active() is not None
        assert keras.Model.make_train_function is not trainer
        raise KeyError
    assert active() is None
    assert keras.distribution.distribution() is None
    assert keras.Model.make_train_function is trainer
    assert not [name for name in os.environ if name.startswith("DTENSOR_")]


@pytest.mark.skipif(BACKEND != "jax", reason="TensorFlow calls no layer from outside of the mesh")
@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=pytest.mark.full)])
def test_mesh_of_one_device_leaves_outputs_as_they_are(compiled):
    """Eager calls are for the full suite: JAX compiles each of their operations, every time."""
    import jax

    layer = keras_moe.MixtureOfExperts(
        keras_moe.FeedForwardExperts(4, 8, seed=0), keras_moe.TopKRouter(2)
    )
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype("float32")
    layer.build(x.shape)
    weights = [
        [variable.value for variable in variables]
        for variables in (layer.trainable_variables, layer.non_trainable_variables)
    ]

    def call():
        if not compiled:
            return layer(x)
        return jax.jit(lambda x: layer.stateless_call(*weights, x)[0])(x)

    expected = call()
    with ExpertParallel(data=1).scope():
        np.testing.assert_allclose(call(), expected, rtol=1e-5, atol=1e-6)


@same_on_tensorflow
@pytest.mark.parametrize("name", ["data", "experts", "model"])
def test_size_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}`.*0"):
        ExpertParallel(**{name: 0})


def test_data_axis_takes_the_devices_that_are_left():
    assert ExpertParallel(experts=2, model=2).data == 2  # of 8 devices
    assert len(ExpertParallel(1, 3).devices) == 3


@same_on_tensorflow
@pytest.mark.parametrize(
    ("mesh", "received"),
    [
        ({"data": 2, "experts": 8}, "8.*data=2, experts=8, model=1.*16"),
        ({"data": 2, "experts": 3, "devices": ["cpu:0"]}, "1.*data=2, experts=3, model=1.*6"),
        ({"experts": 3}, "experts=3, model=1.*8 devices"),  # 8 by 3
    ],
)
def test_mesh_must_fit_the_devices(mesh, received):
    with pytest.raises(ValueError, match=received):
        ExpertParallel(**mesh)


@same_on_tensorflow
def test_several_processes_share_all_their_devices(monkeypatch):
    monkeypatch.setattr(parallel, "num_processes", lambda: 2)
    with pytest.raises(ValueError, match="`devices`.*cpu:0"):
        ExpertParallel(devices=["cpu:0"])
    with pytest.raises(ValueError, match="8.*data=1, experts=2, model=1.*2"):
        ExpertParallel(data=1, experts=2)
