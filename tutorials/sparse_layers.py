"""Put a mixture of experts into your own Keras model, and see who goes where.

    KERAS_BACKEND=jax python tutorials/sparse_layers.py

Any backend; half a minute and 1 GB. Expected: both models reach a validation accuracy above 0.9,
the expert choice router gives each token 2 experts on average, and the last line says 0.0.
"""

import keras
import numpy as np

import keras_moe

# Sequences of 16 numbers; the class is which of four waves they follow.
rng = np.random.default_rng(0)
time = np.arange(16) / 16
label = rng.integers(0, 4, 2048)
wave = np.sin(2 * np.pi * (label + 1)[:, None] * (time + rng.random((2048, 1))))
x = (wave + 0.3 * rng.normal(size=wave.shape)).astype("float32")[:, :, None]


def classifier(mixture):
    """A small convolutional classifier with a mixture of experts between its layers."""
    inputs = keras.Input((16, 1))
    hidden = keras.layers.Conv1D(32, 5, padding="same", activation="relu")(inputs)
    # A token that no expert serves comes out as zero: the residual connection carries it.
    hidden = hidden + mixture(keras.layers.LayerNormalization()(hidden))
    hidden = keras.layers.GlobalMaxPooling1D()(hidden)
    return keras.Model(inputs, keras.layers.Dense(4)(hidden))


def train(mixture):
    model = classifier(mixture)
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        x,
        label,
        batch_size=64,
        epochs=4,
        validation_split=0.2,
        verbose=2,
        callbacks=[keras_moe.callbacks.RoutingMetrics()],
    )
    return model


# 1. Switch: every token goes to one of eight feed-forward experts. The router's load-balancing loss
# is part of the model's loss, its routing figures stand in the log. A classifier has no future to
# leak, so that all tokens of a batch may share the experts' capacity.
experts = keras_moe.FeedForwardExperts(num_experts=8, hidden_dim=64)
router = keras_moe.SwitchRouter()
switch = train(keras_moe.MixtureOfExperts(experts, router, group="batch", name="switch"))

# 2. Expert choice, with experts of your own: any Keras layers or models of one output width.
experts = keras_moe.LayerExperts(
    [
        keras.layers.Dense(32, activation="gelu"),
        keras.layers.Dense(32, activation="tanh"),
        keras.Sequential([keras.layers.Dense(64, activation="relu"), keras.layers.Dense(32)]),
        keras.Sequential([keras.layers.Dropout(0.1), keras.layers.Dense(32)]),
    ]
)
router = keras_moe.ExpertChoiceRouter(capacity_factor=2.0)
choice = train(keras_moe.MixtureOfExperts(experts, router, name="choice"))

# 3. Models are saved and loaded like any other; a file made on one backend loads on the others.
choice.save("choice.keras")
loaded = keras.saving.load_model("choice.keras")
print("difference after loading:", np.abs(loaded.predict(x[:64]) - choice.predict(x[:64])).max())
