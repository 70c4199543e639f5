"""Experts over devices on TensorFlow: a DTensor mesh, and what Keras' trainer needs to run on it.

G groups, S tokens per group, D width, E experts, C slots per expert and group, K experts per token,
F hidden, R rows of slots, N assignments per group. P and Q are the sizes of the two mesh axes that
share the groups, p the one that shares the batch outside of this file.
"""

import contextlib
import os
import re

import keras
import numpy as np
import tensorflow as tf
from keras import ops, tree
from tensorflow.dtensor.python import accelerator_util
from tensorflow.experimental import dtensor

from keras_moe.dispatch import combine, dispatch
from keras_moe.ops import with_gradient

# Weights' paths and the mesh axes of their axes; the first that fits counts, others are whole.
PLACEMENTS = (
    (r"experts/(kernel_in|kernel_gate|kernel)$", ("expert", None, "model")),
    (r"experts/kernel_out$", ("expert", "model", None)),
    (r"experts/bias_in$", ("expert", "model")),
    (r"experts/bias_out$", ("expert", None)),
    (r"attention/(query|key|value)/kernel$", (None, "model")),
    (r"attention/output/kernel$", ("model", None)),
    (r"(hidden|gate)/kernel$", (None, "model")),
    (r"feed_forward/output/kernel$", ("model", None)),
)

# DTensor joins independent all-reduces into one and moves only what reads their results behind it,
# not the reads of variables that are assigned from them: without this the loss of a step is that
# of the step before, 0.0 at first.
ENVIRONMENT = {"DTENSOR_ENABLE_COMBINE_ALL_REDUCES_OPTIMIZATION": "0"}


class TensorFlowEngine:
    """A DTensor mesh of the axes `data`, `expert` and `model`."""

    def __init__(self, data, experts, model, devices=None):
        kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
        if not accelerator_util.is_initialized():
            dtensor.initialize_accelerator_system(kind)
            # A step returns when all devices have done it, and raises what went wrong on any.
            dtensor._reset_dtensor_device(is_async=False)
        devices = devices or dtensor.local_devices(kind)
        data = data or len(devices) // (experts * model)
        sizes = {"data": data, "expert": experts, "model": model}
        self.mesh = dtensor.create_mesh(
            list(sizes.items()), devices=[d if isinstance(d, str) else d.to_string() for d in devices][: data * experts * model]
        )
        self.sizes = sizes
        self.batch_axis = "expert" if experts >= data else "data"
        self.other_axis = "data" if self.batch_axis == "expert" else "expert"
        self._placed = {}

    # --- scope

    @contextlib.contextmanager
    def scope(self):
        from keras.src.backend.tensorflow.trainer import TensorFlowTrainer as trainer

        makers = {
            "make_train_function": lambda m, force=False: self._make(m, "train", force),
            "make_test_function": lambda m, force=False: self._make(m, "test", force),
            "make_predict_function": lambda m, force=False: self._make(m, "predict", force),
        }
        before = {name: getattr(trainer, name) for name in makers}
        environment = {name: os.environ.get(name) for name in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)
        for name, maker in makers.items():
            setattr(trainer, name, maker)
        try:
            with tf.variable_creator_scope(self._create):
                yield
        finally:
            for name, maker in before.items():
                setattr(trainer, name, maker)
            for name, value in environment.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def _make(self, model, what, force):
        name = f"{what}_function"
        if getattr(model, name) is not None and not force:
            return getattr(model, name)
        step = getattr(model, f"{what}_step")
        if not model.run_eagerly:
            step = tf.function(step, autograph=False)

        def run(data):
            return step(self._place_batch(data))

        def function(iterator):
            for _ in range(model.steps_per_execution):
                logs = run(next(iterator))
            return {name: self._whole(value) for name, value in logs.items()}

        def predict(batches):
            outputs = [tree.map_structure(self._whole, run(data)) for data in batches]
            return tree.map_structure(lambda *parts: tf.constant(np.concatenate(parts)), *outputs)

        setattr(model, name, predict if what == "predict" else function)
        return getattr(model, name)

    # --- placement

    def _layout(self, axes):
        axes = [axis or dtensor.UNSHARDED for axis in axes]
        return dtensor.Layout(axes, self.mesh)

    def _place(self, value, layout):
        """A NumPy array, each device's part on the device."""
        value = np.asarray(value)
        places = self.mesh.local_device_locations()
        parts = [tf.constant(value[self._part(layout, value.shape, place)]) for place in places]
        return dtensor.pack(parts, layout)

    def _place_batch(self, data):
        data = tree.map_structure(
            lambda x: None if isinstance(x, tf.experimental.Optional) else x, data
        )
        leaves = [x for x in tree.flatten(data) if x is not None]
        even = all(len(x) % self.sizes[self.batch_axis] == 0 for x in leaves)

        def place(x):
            if x is None:
                return None
            x = np.asarray(x)
            first = self.batch_axis if even else None
            return self._place(x, self._layout([first] + [None] * (x.ndim - 1)))

        return tree.map_structure(place, data)

    def _whole(self, x):
        """A NumPy array; where processes are several, gathered by all of them."""
        if not dtensor.is_dtensor(x):
            return np.asarray(x)
        layout = dtensor.fetch_layout(x)
        places = self.mesh.local_device_locations()
        if len(places) < self.mesh.size and not layout.is_fully_replicated():
            layout = self._layout((None,) * x.shape.rank)
            x = dtensor.relayout(x, layout)
        parts = [part.numpy() for part in dtensor.unpack(x)]
        if layout.is_fully_replicated():
            return parts[0]
        whole = np.empty(x.shape, parts[0].dtype)
        for place, part in zip(places, parts, strict=True):
            whole[self._part(layout, whole.shape, place)] = part
        return whole

    def _part(self, layout, shape, place):
        """Which part of an array of this shape lies on the device at `place` in the mesh."""
        index = []
        for axis, size in zip(layout.sharding_specs, shape, strict=True):
            if axis == dtensor.UNSHARDED:
                index.append(slice(None))
            else:
                length = size // self.sizes[axis]
                index.append(slice(place[axis] * length, (place[axis] + 1) * length))
        return tuple(index)

    def _create(self, next_creator, **kwargs):
        with tf.init_scope():
            value = kwargs["initial_value"]
            value = value() if callable(value) else value
            value = np.asarray(value)
            name = kwargs.get("name") or "variable"
            layout = self._layout_of(name, value.shape)
            return _Variable(
                self._place(value, layout),
                engine=self,
                trainable=kwargs.get("trainable"),
                name=name,
            )

    def _layout_of(self, name, shape):
        from keras.src.backend.common.name_scope import current_path

        path = "/".join(part for part in (current_path(), name) if part)
        axes = self._axes_of(path, name, shape)
        self._placed[path.replace("/", "_")] = (shape, axes)
        return self._layout(axes)

    def _axes_of(self, path, name, shape):
        whole = (None,) * len(shape)
        for pattern, axes in PLACEMENTS:
            if re.search(pattern, path) and len(axes) == len(shape):
                return tuple(
                    a if a and n % self.sizes[a] == 0 else None
                    for a, n in zip(axes, shape, strict=True)
                )
        of_reference = [k for k in self._placed if name.startswith(k + "_")]
        if of_reference:
            of_shape, axes = self._placed[max(of_reference, key=len)]
            if of_shape == shape:
                return axes
        return whole

    # --- in a step

    def _relayout(self, x, *axes):
        axes += (None,) * (len(x.shape) - len(axes))
        return dtensor.relayout(x, self._layout(axes))

    def gathered(self, x):
        return self._relayout(ops.convert_to_tensor(x))

    def seats_for_all(self, tokens):
        return tokens

    def exchange(self, experts, x_GSD, routing, training=False):
        groups, tokens, dim = x_GSD.shape
        routing = type(routing)(
            *(
                self.gathered(x) if x is not None and not isinstance(x, tuple) else x
                for x in routing
            )
        )
        if groups % (self.sizes["data"] * self.sizes["expert"]) != 0:
            return self._pooled(experts, x_GSD, routing, training)

        p, q = self.batch_axis, self.other_axis
        P, Q = self.sizes[p], self.sizes[q]
        g = groups // (P * Q)
        num_experts, capacity = routing.token_index.shape[1:]
        M = num_experts * capacity

        def split(x, *shape):
            x = tf.reshape(self._relayout(x, p), (P, Q, g, *shape))
            return self._relayout(x, p, q)

        x = split(x_GSD, tokens, dim)
        token_M = split(routing.token_index, M)
        weight_M = split(routing.weight, M)
        if routing.slot_index is None:
            taken = tf.cast(token_M[..., None] == tf.range(tokens), x.dtype)  # [..., M, S]

            def to_slots(x):
                return tf.matmul(taken, x)

            def to_tokens(y):
                return tf.matmul(taken, y, transpose_a=True)
        else:
            slot_N = split(routing.slot_index, tokens * routing.slot_index.shape[-1])

            def to_slots(x):
                return take(x, token_M, slot_N, tokens)

            def to_tokens(y):
                return give(y, token_M, slot_N, tokens)

        slots_M = to_slots(x)
        slots_EC = tf.reshape(slots_M, (P, Q, g, num_experts, capacity, dim))
        slots_EC = self._relayout(slots_EC, p, q)
        at_home = ["data" if axis == "data" else None for axis in (p, q)] + [None, "expert"]
        slots_EC = self._relayout(slots_EC, *at_home)
        order = (3, 0, 1, 2, 4, 5) if p == "data" else (3, 1, 0, 2, 4, 5)
        back = tuple(int(i) for i in np.argsort(order))
        slots_RCD = tf.transpose(slots_EC, order)
        shape = slots_RCD.shape
        slots_RCD = tf.reshape(slots_RCD, (num_experts, groups * capacity, dim))
        slots_RCD = self._relayout(slots_RCD, "expert", "data")
        y_RCD = experts(slots_RCD, training=training)
        width = y_RCD.shape[-1]
        y_RCD = self._relayout(y_RCD, "expert", "data")
        y_EC = tf.transpose(tf.reshape(y_RCD, (*shape[:-1], width)), back)
        y_EC = self._relayout(y_EC, *at_home)
        y_EC = self._relayout(y_EC, p, q)
        y_M = tf.reshape(y_EC, (P, Q, g, M, width))
        y = to_tokens(y_M * tf.cast(weight_M[..., None], y_M.dtype))
        y = self._relayout(y, p)
        return self._relayout(tf.reshape(y, (groups, tokens, width)), p)

    def _pooled(self, experts, x_GSD, routing, training):
        groups, tokens, _ = x_GSD.shape
        slots_RCD = self.gathered(dispatch(self.gathered(x_GSD), routing))
        axes = ("expert", "data" if slots_RCD.shape[1] % self.sizes["data"] == 0 else None)
        y_RCD = experts(self._relayout(slots_RCD, *axes), training=training)
        y_RCD = self.gathered(self._relayout(y_RCD, *axes))
        y = self.gathered(combine(y_RCD, routing, groups, tokens))
        return y if groups % self.sizes[self.batch_axis] else self._relayout(y, self.batch_axis)

    # --- checks

    def assert_sharded(self, model):
        pass

    def describe(self, model):
        return ""


def _rows(x, index):
    """`x[..., index, :]` and zeros where the index is past the end."""
    size = x.shape[-2]
    rows = tf.gather(x, tf.minimum(index, size - 1), batch_dims=3, axis=3)
    return tf.where((index < size)[..., None], rows, tf.zeros((), x.dtype))


def _sums(x, index, tokens):
    rows = _rows(x, index)
    k = index.shape[-1] // tokens
    if k == 1:
        return rows
    return tf.reduce_sum(tf.reshape(rows, (*index.shape[:-1], tokens, k, x.shape[-1])), axis=-2)


def take(x, token_M, slot_N, tokens):
    """Tokens to slots."""
    return with_gradient(
        lambda x: _rows(x, token_M), lambda up, x: [lambda: _sums(up, slot_N, tokens)]
    )(x)


def give(y, token_M, slot_N, tokens):
    """Slots to tokens."""
    return with_gradient(
        lambda y: _sums(y, slot_N, tokens), lambda up, y: [lambda: _rows(up, token_M)]
    )(y)


class _Variable(dtensor.DVariable):
    """A DVariable that takes host arrays and can be read whole."""

    def __init__(self, initial_value, engine, **kwargs):
        self._engine = engine
        super().__init__(initial_value, **kwargs)

    def assign(self, value, **kwargs):
        if tf.executing_eagerly() and not dtensor.is_dtensor(value):
            value = self._engine._place(np.asarray(value).astype(self.dtype.as_numpy_dtype), self.layout)
        return super().assign(value, **kwargs)

    def numpy(self):
        return self._engine._whole(self.read_value())
