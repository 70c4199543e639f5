# %% [markdown]
# # Sharding experts over devices: the same model on one device and on eight
#
#     KERAS_BACKEND=jax python tutorials/sharding_experts.py
#
# JAX or TensorFlow (a notebook: start Jupyter with `KERAS_BACKEND` set); a minute or two, and 2 GB.
# The eight devices are this machine's CPU, eight times, so that nothing gets faster here. Expected:
# the losses of both agree to four digits, of every expert kernel a device has a fourth, and of the
# whole model and its optimizer about a third. PyTorch refuses, and says why.
#
# What you learn: to make a mesh of devices, to train within its scope by the calls that you know,
# and to see where every weight lies.

# %%
import os

# On a machine with GPUs or TPUs leave this out: they are there by themselves.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import keras
import numpy as np

import keras_moe
from keras_moe.distribution import ExpertParallel

SIZE = 1.0  # 1.0 gives the results on this page; a smaller value trains less and runs faster

# %% [markdown]
# TensorFlow has another way to make eight devices of a CPU (leave this out, too).

# %%
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 8)
    tf.config.threading.set_inter_op_parallelism_threads(16)  # the devices wait for each other

# %% [markdown]
# ## The mesh
# Two groups of four devices:
#
# | | `experts=0` | `experts=1` | `experts=2` | `experts=3` |
# |---|---|---|---|---|
# | `data=0` | experts 1, 2 | experts 3, 4 | experts 5, 6 | experts 7, 8 |
# | `data=1` | experts 1, 2 | experts 3, 4 | experts 5, 6 | experts 7, 8 |
#
# The batch is split by all eight devices, the experts by the four of a row, and both rows have all
# of them. On TensorFlow the mesh is made before any tensor.

# %%
parallel = ExpertParallel(data=2, experts=4)

# %% [markdown]
# ## A task and a model
# Sequences of 16 numbers; the task is to say the last one again at every place. Nothing in the
# model or in its training knows of devices.

# %%
x = np.random.default_rng(0).normal(size=(round(256 * SIZE), 16, 1)).astype("float32")
y = np.broadcast_to(x[:, -1:], x.shape)


def train():
    """A small model with 8 experts, made and trained by Keras' own means."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 1))
    hidden = keras.layers.Dense(32)(inputs)
    hidden = hidden + keras.layers.MultiHeadAttention(2, 16)(hidden, hidden)
    experts = keras_moe.FeedForwardExperts(num_experts=8, hidden_dim=128, seed=0)
    # The noise of the router's jitter is the only thing that devices would draw otherwise.
    router = keras_moe.SwitchRouter(exploration="argmax")
    mixture = keras_moe.MixtureOfExperts(experts, router, name="mixture")
    hidden = hidden + mixture(keras.layers.LayerNormalization()(hidden))
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(keras.optimizers.Adam(3e-3), "mse")
    history = model.fit(x, y, batch_size=64, epochs=3, shuffle=False, verbose=0).history
    return model, history["loss"]


# %% [markdown]
# ## One device, and then eight
# `fit` checks that experts and moments are shared, and moves tokens to the devices of their experts
# and back.

# %%
_, alone = train()
with parallel.scope():
    model, together = train()
print("losses on one device:   ", *(f"{loss:.4f}" for loss in alone))
print("losses on eight devices:", *(f"{loss:.4f}" for loss in together))

# %% [markdown]
# ## Where everything is
# The bytes of every variable, in all and on a device, as they really lie there. The last column of
# `mixture/experts/kernel_in` is a fourth of the one before it.

# %%
with parallel.scope():
    table = parallel.describe(model)

# %% [markdown]
# Next: [From one CPU to a TPU pod](many_devices.md) has the arithmetic of memory and traffic, how
# to choose a mesh, and how several processes share one.
