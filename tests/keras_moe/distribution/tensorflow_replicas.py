"""A model of the zoo under a strategy of `tf.distribute`.

`python -m tests.keras_moe.distribution.tensorflow_replicas one|mirrored|workers` prints JSON.
"""

import contextlib
import json
import sys

import keras
import numpy as np
import tensorflow as tf

import keras_moe
import zoo


def scope(kind):
    if kind == "workers":
        return tf.distribute.MultiWorkerMirroredStrategy().scope()
    if kind == "one":
        return contextlib.nullcontext()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()


def main(kind):
    ids = np.random.default_rng(0).integers(1, 50, size=(32, 8))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    with scope(kind):
        keras.utils.set_random_seed(0)
        backbone = zoo.EncoderBackbone(
            50,
            2,
            2,
            8,
            4,
            16,
            router=keras_moe.ExpertChoiceRouter(inference="threshold"),
            num_experts=4,
            group="sequence",
            dropout=0.0,
            expert_dropout=0.0,
        )
        model = zoo.EncoderTextClassifier(backbone, 3, dropout=0.0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.3), loss, metrics=["accuracy"])
    labels = ids[:, 0] % 3
    # Each replica takes its part of the batches of 16, whatever process it is in.
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(16).with_options(options)
    losses = model.fit(batches, epochs=3, verbose=0).history["loss"]
    mixture = next(
        layer for layer in model._flatten_layers() if isinstance(layer, keras_moe.MixtureOfExperts)
    )
    statistics = [total.numpy().tolist() for total in mixture.statistics]
    result = {
        "losses": losses,
        "totals": statistics[0],
        "tokens": statistics[1],
        "threshold": mixture.router.threshold.numpy().tolist(),
        "evaluated": model.evaluate(batches, verbose=0),
        "predicted": model.predict(batches, verbose=0)[:, 0].tolist(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
