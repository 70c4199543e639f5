"""Share experts between devices: the same model on one device and on eight.

    KERAS_BACKEND=jax python tutorials/many_devices.py

JAX or TensorFlow; a minute or two, and 2 GB. The eight devices are this machine's CPU, eight times,
so that nothing gets faster here. Expected: the losses of both agree to four digits, of every
expert kernel a device has a fourth, and of the whole model and its optimizer about a third.
"""

import os

# On a machine with GPUs or TPUs leave this out: they are there by themselves.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import keras
import numpy as np

import keras_moe
from keras_moe.distribution import ExpertParallel

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 8)
    tf.config.threading.set_inter_op_parallelism_threads(16)  # the devices wait for each other

# 1. The mesh: two groups of four devices. The batch is split by all eight; the experts by the four
# of a group, and both groups have all of them. On TensorFlow it is made before any tensor.
parallel = ExpertParallel(data=2, experts=4)

# Sequences of 16 numbers; the task is to say the last one again at every place.
x = np.random.default_rng(0).normal(size=(256, 16, 1)).astype("float32")
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


# 2. One device, and then the same within the scope. `fit` has checked that experts and moments are
# shared, and moves tokens to the devices of their experts and back.
_, alone = train()
with parallel.scope():
    model, together = train()
    print("losses on one device:   ", *(f"{loss:.4f}" for loss in alone))
    print("losses on eight devices:", *(f"{loss:.4f}" for loss in together))

    # 3. Where everything is.
    table = parallel.describe(model)
