"""It is what `model.fit` does, for many seeds at once."""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("the seeds are a batch axis on JAX only", allow_module_level=True)

from benchmarks.papers.descent import Descent
from benchmarks.papers.vowels_1991 import network
from keras_moe.losses import MixtureOfExpertsLoss

SEEDS, STEP_SIZE, EPOCHS = [3, 4, 5], 8.0, 12
rng = np.random.default_rng(0)
X = rng.uniform(0.3, 3, size=(40, 2)).astype("float32")
Y = (X[:, :1] > 1.5).astype("float32")
SYSTEMS = {
    "mixture": ({"experts": 3}, MixtureOfExpertsLoss()),
    "cooperative": ({"experts": 3}, MixtureOfExpertsLoss("cooperative")),
    "backpropagation": ({"hidden": 4, "init": 0.5}, keras.losses.MeanSquaredError()),
}


def fitted(system, loss, seed, epochs):
    """What `model.fit` makes of one seed: the model, and its error after every epoch."""
    keras.utils.set_random_seed(seed)
    model = network(**system)
    model.compile(keras.optimizers.SGD(STEP_SIZE), loss, metrics=["mse"])
    errors = [model.evaluate(X, Y, len(X), verbose=0)[1]]
    for _ in range(epochs):
        model.fit(X, Y, batch_size=len(X), verbose=0)
        errors.append(model.evaluate(X, Y, len(X), verbose=0)[1])
    return model, errors


@pytest.mark.parametrize("name", SYSTEMS)
def test_is_model_fit(name):
    system, loss = SYSTEMS[name]
    many = Descent(lambda: network(**system), loss, criterion=0.0, max_epochs=EPOCHS)
    epochs, reached, weights = many(many.initial_weights(SEEDS), X, Y, STEP_SIZE)
    assert epochs.tolist() == [EPOCHS] * 3 and not reached.any()
    predictions = many.predictions(weights, X)
    for at, seed in enumerate(SEEDS):
        model, _ = fitted(system, loss, seed, EPOCHS)
        for ours, theirs in zip(weights, model.get_weights(), strict=True):
            np.testing.assert_allclose(ours[at], theirs, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(predictions[at], model.predict(X, verbose=0), atol=1e-4)


def test_every_seed_stops_where_it_reaches_the_criterion():
    system, loss = SYSTEMS["mixture"]
    errors = [fitted(system, loss, seed, EPOCHS)[1] for seed in SEEDS]
    # Between the errors of the first seed after 7 and 8 epochs.
    criterion = (errors[0][7] + errors[0][8]) / 2
    first = [next((n for n, e in enumerate(each) if e < criterion), None) for each in errors]
    many = Descent(lambda: network(**system), loss, criterion, EPOCHS)
    epochs, reached, weights = many(many.initial_weights(SEEDS), X, Y, STEP_SIZE)
    assert first[0] is not None
    assert epochs.tolist() == [EPOCHS if n is None else n for n in first]
    assert reached.tolist() == [n is not None for n in first]
    model, _ = fitted(system, loss, SEEDS[0], first[0])
    for ours, theirs in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_allclose(ours[0], theirs, rtol=1e-4, atol=1e-4)
