# %% [markdown]
# # Your first mixture of experts in a Keras model
#
#     KERAS_BACKEND=jax python tutorials/first_moe_layer.py
#
# Any backend (a notebook: start Jupyter with `KERAS_BACKEND` set); half a minute and 1 GB.
# Expected: both models reach a validation accuracy above 0.9, the expert choice router gives each
# token 2 experts on average, and the last line says 0.0.
#
# What you learn: how to put a sparse layer between the layers of a model of your own, how to use
# your own layers as experts, and how to see in the log whether the experts share the work.

# %%
from pathlib import Path

import keras
import numpy as np

import keras_moe

SIZE = 1.0  # 1.0 gives the results on this page; a smaller value trains less and runs faster

# %% [markdown]
# ## A task
# Sequences of 16 noisy numbers; the class is which of four waves they follow. With your own
# arrays, `[examples, length, width]` and class numbers, change the last line of this cell.

# %%
rng = np.random.default_rng(0)


def waves(examples, length=16):
    """Sequences `[examples, length, 1]` and their classes `[examples]`."""
    time = np.arange(length) / length
    label = rng.integers(0, 4, examples)
    wave = np.sin(2 * np.pi * (label + 1)[:, None] * (time + rng.random((examples, 1))))
    return (wave + 0.3 * rng.normal(size=wave.shape)).astype("float32")[:, :, None], label


x, label = waves(round(2048 * SIZE))

# %% [markdown]
# ## A model with room for a mixture
# A mixture of experts takes `[batch, length, width]` and gives the same shape back. Put a residual
# connection around it: a token that no expert has room for comes out as zero, and is carried by the
# connection.


# %%
def classifier(mixture):
    """A small convolutional classifier with a mixture of experts between its layers."""
    inputs = keras.Input(x.shape[1:])
    hidden = keras.layers.Conv1D(32, 5, padding="same", activation="relu")(inputs)
    hidden = hidden + mixture(keras.layers.LayerNormalization()(hidden))
    hidden = keras.layers.GlobalMaxPooling1D()(hidden)
    return keras.Model(inputs, keras.layers.Dense(int(label.max()) + 1)(hidden))


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


# %% [markdown]
# ## Switch: each token chooses one of eight experts
# The router's load-balancing loss is part of the model's loss by itself. A classifier has no future
# to leak, so that all tokens of a batch may share the experts' capacity (`group="batch"`).
#
# The log shows, for the layer named `switch`: `dropped`, the share of tokens whose expert was full
# (in validation there is more room); `max_share`, how many times its fair share the busiest expert
# gets (1 is perfect); `dead`, the share of experts that nobody chose; `entropy`, 1 where the router
# finds all experts equally good, 0 where it is sure.

# %%
experts = keras_moe.FeedForwardExperts(num_experts=8, hidden_dim=64)
router = keras_moe.SwitchRouter()
switch = train(keras_moe.MixtureOfExperts(experts, router, group="batch", name="switch"))

# %% [markdown]
# ## Expert choice, with experts of your own
# Any Keras layers or models of one output width can be experts, and they need not be alike. Here
# each expert takes the tokens that it likes best, so that all have the same work; `untaken` is the
# share of tokens that none took, and `experts_per_token` the mean.

# %%
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

# %% [markdown]
# ## Saving and loading
# As with any other model; a file made on one backend loads on the others.

# %%
Path("runs").mkdir(exist_ok=True)
choice.save("runs/choice.keras")
loaded = keras.saving.load_model("runs/choice.keras")
print("difference after loading:", np.abs(loaded.predict(x[:64]) - choice.predict(x[:64])).max())

# %% [markdown]
# Next: [four papers side by side](four_papers.ipynb), and
# [reading a router](reading_a_router.ipynb). The routers and their defaults are in the README's
# table.
