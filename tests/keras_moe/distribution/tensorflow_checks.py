"""What needs several devices: `python -m tests.keras_moe.distribution.tensorflow_checks NAME`.

It prints JSON. TensorFlow counts its devices when it starts, so a process of its own has eight
that share one CPU.
"""

import json
import os
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf

import keras_moe
import zoo
from keras_moe.distribution import ExpertParallel
from tests.keras_moe.distribution.several import MESH

DIM, LENGTH, EXPERTS, HIDDEN = 8, 8, 8, 16
ROUTERS = {
    "switch": lambda: keras_moe.SwitchRouter(jitter=0.1, min_capacity=1, seed=1),
    "top2": lambda: keras_moe.TopKRouter(
        2, capacity_factor=1.0, eval_capacity_factor=2.0, min_capacity=1, router_z_weight=0.1
    ),
    "dropless": lambda: keras_moe.TopKRouter(2),
    "choice": lambda: keras_moe.ExpertChoiceRouter(inference="threshold"),
}


def model_of(*kinds, group="sequence", optimizer=None):
    """Two dense layers, and a mixture of every kind between them."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((LENGTH, DIM))
    x = keras.layers.Dense(DIM, activation="relu")(inputs)
    for kind in kinds:
        experts = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN, use_bias=True, seed=1)
        x = x + keras_moe.MixtureOfExperts(experts, ROUTERS[kind](), group=group, name=kind)(x)
    model = keras.Model(inputs, keras.layers.Dense(DIM)(x))
    # With Adam's own epsilon a gradient of rounding errors alone would make a whole step.
    model.compile(optimizer or keras.optimizers.Adam(1e-2, epsilon=1e-3), "mse")
    return model


def data(batches, batch=16):
    x = np.random.default_rng(0).normal(size=(batches * batch, LENGTH, DIM)).astype("float32")
    return x, np.roll(x, 1, axis=-1)


class Losses(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(float(logs["loss"]))


def trained(model, batches, rest=0, tested=16):
    """What a run leaves, and what Keras then makes of the first `tested` examples."""
    losses = Losses()
    x, y = data(batches)
    x, y = x[: len(x) - rest], y[: len(y) - rest]
    model.fit(x, y, 16, shuffle=False, verbose=0, callbacks=[losses])
    figures = {
        f"{layer.name}/{name}": value
        for layer in model.layers
        if isinstance(layer, keras_moe.MixtureOfExperts)
        for name, value in keras_moe.metrics.read(layer).items()
    }
    return {
        "losses": losses.values,
        "figures": figures,
        "evaluated": model.evaluate(x[:tested], y[:tested], 16, verbose=0),
        "predicted": model.predict(x[:tested], 16, verbose=0)[:, 0, 0].tolist(),
    }


def curves():
    """10 steps on one device and on eight, and where the experts' weights then are."""
    parallel = ExpertParallel(**MESH)  # before the first tensor
    one = trained(model_of(*ROUTERS), 10)
    with parallel.scope():
        model = model_of(*ROUTERS)
        return {"one": one, "many": trained(model, 10), "shards": shards(model)}


def shards(model):
    variables = [v for v in [*model.weights, *model.optimizer.variables] if "experts_" in v.path]
    variables += [v for v in model.weights if "/experts/" in v.path]
    result = {}
    for variable in variables:
        parts = tf.experimental.dtensor.unpack(variable.value.read_value())
        sizes = [int(np.prod(part.shape)) for part in parts]
        result[variable.path] = [int(np.prod(variable.shape)), min(sizes), max(sizes)]
    return result


def details():
    """Several devices and several questions, each with what one device answers."""
    wide, parallel = ExpertParallel(data=2, experts=4), ExpertParallel(data=1, experts=4)
    tall, deep = ExpertParallel(data=4, experts=2), ExpertParallel(data=1, experts=2, model=2)
    result = {}

    def both(name, function, parallel=parallel):
        one = function()
        with parallel.scope():
            result[name] = [one, function()]

    both("batch", lambda: trained(model_of("choice", group="batch"), 4), wide)
    both("rest", lambda: trained(model_of("switch"), 3, rest=3, tested=24), tall)

    def masked():
        x, y = data(3)
        x[:, 5:] = 0
        keras.utils.set_random_seed(0)
        inputs = keras.Input((LENGTH, DIM))
        h = keras.layers.Masking()(inputs)
        experts = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN, seed=1)
        h = keras_moe.MixtureOfExperts(experts, ROUTERS["top2"]())(h)
        model = keras.Model(inputs, keras.layers.Dense(DIM)(h))
        model.compile("sgd", "mse")
        return model.fit(x, y, 16, shuffle=False, verbose=0, epochs=2).history["loss"]

    both("masked", masked)

    def of_the_zoo():
        keras.utils.set_random_seed(0)
        backbone = zoo.EncoderDecoderBackbone(
            20,
            2,
            2,
            DIM,
            4,
            HIDDEN,
            router=keras_moe.SwitchRouter(),
            num_experts=EXPERTS,
            dropout=0.0,
            expert_dropout=0.0,
        )
        ids = np.random.default_rng(0).integers(1, 20, (32, LENGTH))
        mask = (np.arange(LENGTH) < ids[:, :1] % 8 + 1).astype("int32")
        x = {"encoder_token_ids": ids, "encoder_padding_mask": mask}
        x |= {"decoder_token_ids": ids[:, ::-1], "decoder_padding_mask": np.ones_like(mask)}
        model = zoo.Seq2SeqLM(backbone)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-2, epsilon=1e-3), loss)
        return model.fit(x, ids, 16, shuffle=False, verbose=0, epochs=3).history["loss"]

    both("zoo", of_the_zoo, deep)
    with parallel.scope():
        model = model_of("top2", optimizer=keras_moe.optimizers.Adafactor(1e-2))
        model.fit(*data(2), 16, verbose=0)
        result["adafactor"] = shards(model)
        result["table"] = parallel.describe(model)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.keras")
            model.save(path)
            loaded = keras.models.load_model(path)
            result["loaded"] = shards(loaded)
            same = zip(model.trainable_weights, loaded.trainable_weights, strict=True)
            result["saved"] = max(float(np.abs(a.numpy() - b.numpy()).max()) for a, b in same)
    result["environment"] = [name for name in os.environ if name.startswith("DTENSOR_")]
    result["trainer"] = keras.Model.make_train_function.__qualname__
    return result


class Fails(keras.layers.Layer):
    def call(self, inputs):
        return tf.debugging.check_numerics(inputs, "fails on purpose")


def failure():
    """A layer that fails in the third step, on the last device alone."""
    seen = []
    x, y = data(4)
    x[3 * 16 - 1] = np.nan
    with ExpertParallel(data=1, experts=4).scope():
        inputs = keras.Input((LENGTH, DIM))
        model = keras.Model(inputs, keras.layers.Dense(DIM)(Fails()(inputs)))
        model.compile("sgd", "mse")
        losses = Losses()
        try:
            model.fit(x, y, 16, shuffle=False, verbose=0, callbacks=[losses])
        except tf.errors.InvalidArgumentError as error:
            seen.append(str(error))
    return {"errors": seen, "losses": losses.values}


def refusals():
    """Messages of what cannot be."""
    result = {}

    def refused(name, function):
        try:
            function()
        except ValueError as error:
            result[name] = str(error)

    parallel = ExpertParallel(experts=4)
    refused("mesh", lambda: ExpertParallel(data=3, experts=4))

    def uneven():
        with ExpertParallel(data=1, experts=3).scope():
            model_of("switch")

    refused("experts", uneven)

    def outside():
        model = model_of("switch")
        with parallel.scope():
            model.fit(*data(1), 16, verbose=0)

    refused("outside", outside)

    def router():
        with parallel.scope():
            experts = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN)
            keras_moe.MixtureOfExperts(experts, keras_moe.LossFreeRouter(2)).build((4, 8, DIM))

    refused("router", router)

    def afterwards():
        with parallel.scope():
            model = model_of("switch")
            model.fit(*data(1), 16, verbose=0)
        model.fit(*data(1), 16, verbose=0)

    refused("afterwards", afterwards)

    def soft():
        with parallel.scope():
            inputs = keras.Input((LENGTH, DIM))
            experts = keras_moe.FeedForwardExperts(EXPERTS, HIDDEN)
            model = keras.Model(inputs, keras_moe.SoftMoE(experts, slots_per_expert=2)(inputs))
            model.compile("sgd", "mse")
            model.fit(*data(1), 16, verbose=0)

    refused("soft", soft)

    def writes():
        options = {"num_experts": EXPERTS, "intermediate_dim": HIDDEN, "hidden_dim": DIM}
        with parallel.scope():
            lm = zoo.CausalLM(zoo.DecoderBackbone(20, 2, 2, key_dim=4, **options))
            ids = np.ones((2, LENGTH), "int32")
            lm.generate({"token_ids": ids, "padding_mask": ids}, stop_token_ids=None)

    refused("writes", writes)
    return result


if __name__ == "__main__":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 8)
    tf.config.threading.set_inter_op_parallelism_threads(16)  # each device waits for the others
    name, *arguments = sys.argv[1:]
    print(json.dumps(globals()[name](*arguments)))
