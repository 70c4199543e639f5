import os
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest

from keras_moe import (
    ExpertChoiceRouter,
    FeedForwardExperts,
    LayerExperts,
    LossFreeRouter,
    MixtureOfExperts,
    NoisyTopKRouter,
    StrictlyBalancedRouter,
    SwitchRouter,
    TopKRouter,
)
from tests.backend import numpy

X = np.random.default_rng(0).normal(size=(2, 6, 3)).astype("float32")
ROUTERS = {
    "switch": lambda: SwitchRouter(eval_capacity_factor=0.75, min_capacity=1),
    "top-k": lambda: TopKRouter(2, normalize=False, kernel_initializer="random_normal"),
    "expert choice": lambda: ExpertChoiceRouter(capacity_factor=1.0, max_experts_per_token=2),
    "threshold": lambda: ExpertChoiceRouter(inference="threshold", threshold_momentum=0.5),
    "strict": lambda: StrictlyBalancedRouter(capacity_factor=1.0, max_experts_per_token=4),
    "loss-free": lambda: LossFreeRouter(2, num_groups=2, top_groups=1, scale=2.5),
}


def experts():
    layers = [
        keras.layers.Dense(3, activation="tanh"),
        keras.Sequential([keras.layers.Dense(5), keras.layers.Dropout(0.1), keras.layers.Dense(3)]),
    ]
    return LayerExperts(layers)


def every_router():
    """All routers and both kinds of experts in one model, with weights and state of their own."""
    inputs = keras.Input((None, 3))
    outputs = inputs
    for number, router in enumerate(ROUTERS.values()):
        bank = FeedForwardExperts(4, 5, gated=number % 2 == 0, use_bias=True)
        outputs = outputs + MixtureOfExperts(bank, router(), group=4 if number else "batch")(
            outputs
        )
    outputs = outputs + MixtureOfExperts(experts(), SwitchRouter(eval_capacity_factor=None))(
        outputs
    )
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=keras.backend.backend() == "jax")
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(0.5 * rng.normal(size=variable.shape))
    for layer in model.layers:
        if isinstance(layer, MixtureOfExperts):
            layer.statistics[0].assign(np.ones(7))
            if hasattr(layer.router, "threshold"):
                layer.router.threshold.assign([0.1, 0.3, 0.5, 0.2])
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = every_router()
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    model.save(path)
    return model, path


def test_comes_back_exactly_and_trains_on(saved):
    model, path = saved
    loaded = keras.models.load_model(path)
    for old, new in zip(model.trainable_variables, loaded.trainable_variables, strict=True):
        # A Sequential that is made from its config builds itself, before it has a place.
        assert new.path == old.path or "sequential" in old.path
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    first = loaded.fit(X, np.ones(X.shape), epochs=5, verbose=0).history["loss"]
    assert first[-1] < first[0]


def test_weights_file(saved, tmp_path):
    model, _ = saved
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    other = keras.models.clone_model(model)
    other.load_weights(path)
    for ours, theirs in zip(other.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(numpy(ours), numpy(theirs))


def test_statistics_are_not_in_the_file(saved, tmp_path):
    model, _ = saved
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        layer = file["layers/mixture_of_experts"]
        assert "vars" not in layer or len(layer["vars"]) == 0
        assert set(layer) >= {"experts", "router"}


def test_the_learnt_threshold_is_saved_and_statistics_are_not(saved):
    model, path = saved
    loaded = keras.models.load_model(path)
    old, new = (
        next(layer for layer in each.layers if hasattr(getattr(layer, "router", None), "threshold"))
        for each in (model, loaded)
    )
    threshold = numpy(old.router.threshold)
    assert threshold.tolist() == pytest.approx([0.1, 0.3, 0.5, 0.2])
    np.testing.assert_array_equal(threshold, numpy(new.router.threshold))
    assert numpy(old.statistics[0])[0] > 0
    assert (numpy(new.statistics[0]) == 0).all()


TIGHT = {"capacity_factor": 0.75, "eval_capacity_factor": 0.75, "min_capacity": 1}
WITH_CAPACITY = {
    "switch": lambda: SwitchRouter(**TIGHT),
    "top-k": lambda: TopKRouter(2, **TIGHT),
    "surest_first": lambda: TopKRouter(2, priority="probability", **TIGHT),
    "noisy": lambda: NoisyTopKRouter(2, **TIGHT),
    "loss-free": lambda: LossFreeRouter(2, **TIGHT),
}


class TestDroplessEvaluation:
    """Of what was trained with a capacity; expert choice has none in that sense."""

    def test_after_loading(self, tmp_path):
        inputs = keras.Input((None, 3))
        outputs = {
            name: MixtureOfExperts(FeedForwardExperts(4, 5), router(), name=name)(inputs)
            for name, router in WITH_CAPACITY.items()
        }
        model = keras.Model(inputs, outputs)
        rng = np.random.default_rng(1)
        for variable in model.trainable_variables:
            variable.assign(rng.normal(size=variable.shape))
        model.compile(keras.optimizers.SGD(1e-3), "mse")
        model.fit(X, dict.fromkeys(WITH_CAPACITY, X), verbose=0)
        model.save(tmp_path / "tight.keras")

        loaded = keras.models.load_model(tmp_path / "tight.keras")
        for name in WITH_CAPACITY:
            loaded.get_layer(name).router.eval_capacity_factor = None
        for ours, theirs in zip(loaded.trainable_variables, model.trainable_variables, strict=True):
            np.testing.assert_array_equal(numpy(ours), numpy(theirs))
        loaded.save(tmp_path / "dropless.keras")
        again = keras.models.load_model(tmp_path / "dropless.keras")
        tight, dropless, kept = (m.predict(X, verbose=0) for m in (model, loaded, again))
        # Without drops a token comes out as it does alone, which with a capacity some do not.
        alone = model.predict(X.reshape(12, 1, 3), verbose=0)
        for name in WITH_CAPACITY:
            expected = alone[name].reshape(X.shape)
            np.testing.assert_allclose(dropless[name], expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(kept[name], dropless[name])
            assert 0 < (np.abs(tight[name] - expected).max(axis=-1) > 1e-3).sum() < 12

    def test_not_with_batched_experts(self):
        experts = FeedForwardExperts(4, 5, implementation="batched")
        layer = MixtureOfExperts(experts, SwitchRouter())
        layer(X)
        layer.router.eval_capacity_factor = None
        with pytest.raises(ValueError, match="`implementation='batched'`.*'auto'"):
            layer(X)


LOAD = """
import sys
import keras
import numpy as np
import keras_moe

model = keras.models.load_model(sys.argv[1], compile=False)
np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), verbose=0))
"""


@pytest.mark.every_backend
def test_loads_on_the_other_backends_with_equal_outputs(saved, tmp_path, full):
    """PyTorch's file on the other two; in the default suite their files on PyTorch alone."""
    model, path = saved
    np.save(tmp_path / "x.npy", X)
    backend = keras.backend.backend()
    others = {"tensorflow", "jax", "torch"} if full or backend == "torch" else {"torch"}
    others -= {backend}
    runs = []
    for backend in others:
        arguments = [path, tmp_path / "x.npy", tmp_path / f"{backend}.npy"]
        environment = {**os.environ, "KERAS_BACKEND": backend}
        runs.append(subprocess.Popen([sys.executable, "-c", LOAD, *arguments], env=environment))
    codes = [run.wait() for run in runs]
    assert not any(codes)
    for backend in others:
        np.testing.assert_allclose(
            np.load(tmp_path / f"{backend}.npy"), numpy(model(X)), rtol=1e-5, atol=1e-5
        )
