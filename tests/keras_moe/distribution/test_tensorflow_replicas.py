"""`tf.distribute.MirroredStrategy`: two replicas against one, by plain `fit`."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("TensorFlow's strategies", allow_module_level=True)

SCRIPT = """
import contextlib, json
import keras, numpy as np, tensorflow as tf
import keras_moe
from zoo.models.encoder import EncoderBackbone

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
ids = np.random.default_rng(0).integers(1, 50, size=(32, 8))
inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
result = []
for scope in (contextlib.nullcontext, tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope):
    with scope():
        keras.utils.set_random_seed(0)
        router = keras_moe.ExpertChoiceRouter(inference="threshold")
        backbone = EncoderBackbone(
            50, 2, 2, 8, 4, 16, router=router, num_experts=4, group="sequence",
            dropout=0.0, expert_dropout=0.0,
        )
        x = keras.layers.GlobalAveragePooling1D()(backbone.output)
        model = keras.Model(backbone.input, keras.layers.Dense(3)(x))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.3), loss)
    losses = model.fit(inputs, ids[:, 0] % 3, 16, epochs=3, shuffle=False, verbose=0)
    mixture = next(
        layer for layer in model._flatten_layers()
        if isinstance(layer, keras_moe.MixtureOfExperts)
    )
    result.append({
        "losses": losses.history["loss"],
        "totals": mixture.statistics[0].numpy().tolist(),
        "tokens": mixture.statistics[1].numpy().tolist(),
        "threshold": mixture.router.threshold.numpy().tolist(),
    })
print(json.dumps(result))
"""


def test_replicas_change_nothing():
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(two["threshold"], one["threshold"], rtol=0, atol=1e-5)
    assert two["tokens"] == one["tokens"]
    calls, tokens = one["totals"][:2]
    assert (calls, tokens) == (6, 6 * 16 * 8)
    assert two["totals"][:2] == [2 * calls, tokens]  # a step is a call of each replica
