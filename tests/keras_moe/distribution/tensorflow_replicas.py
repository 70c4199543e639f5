"""A model of the zoo under a strategy of `tf.distribute`.

`python -m tests.keras_moe.distribution.tensorflow_replicas mirrored` prints what `trained` returns
under `MirroredStrategy` with two devices, as JSON. `workers`, as one of several processes, is for
`MultiWorkerMirroredStrategy`.
"""

import json
import sys

import keras
import numpy as np
import tensorflow as tf

import keras_moe
import zoo


def trained(scope, run_eagerly=False):
    """Makes and trains a model in the scope of a strategy, and returns what it makes of texts."""
    ids = np.random.default_rng(0).integers(1, 50, size=(32, 8))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    with scope:
        keras.utils.set_random_seed(0)
        backbone = zoo.EncoderBackbone(
            vocabulary_size=50,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            key_dim=4,
            intermediate_dim=16,
            router=keras_moe.ExpertChoiceRouter(inference="threshold"),
            num_experts=4,
            sparse_blocks=(1,),
            group="sequence",
            dropout=0.0,
            expert_dropout=0.0,
        )
        model = zoo.EncoderTextClassifier(backbone, 3, dropout=0.0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = keras.optimizers.SGD(0.3)
        model.compile(optimizer, loss, metrics=["accuracy"], run_eagerly=run_eagerly)
    labels = ids[:, 0] % 3
    # Each replica takes its part of the batches of 16, whatever process it is in.
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(16).with_options(options)
    losses = model.fit(batches, epochs=3, verbose=0).history["loss"]
    (layer,) = keras_moe.mixtures(model).values()
    totals, tokens = (total.numpy().tolist() for total in layer.statistics)
    return {
        "losses": losses,
        "totals": totals,
        "tokens": tokens,
        "threshold": layer.router.threshold.numpy().tolist(),
        "evaluated": model.evaluate(batches, verbose=0),
        "predicted": model.predict(batches, verbose=0)[:, 0].tolist(),
    }


def strategy(name):
    if name == "workers":
        return tf.distribute.MultiWorkerMirroredStrategy()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


if __name__ == "__main__":
    print(json.dumps(trained(strategy(sys.argv[1]).scope())))
