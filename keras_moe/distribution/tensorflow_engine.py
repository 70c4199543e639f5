"""The engine of `ExpertParallel` on TensorFlow: a DTensor mesh, and what `model.fit` needs on it.

DTensor runs a function of whole tensors on parts of them, by a rule for each operation. Where a
rule is missing or wrong, the functions here say where tensors lie:

* Routers see their logits whole, and route all groups on every device. Gradients of `top_k` and of
  gathers with batch axes take positions in the whole tensor for positions in a part. What is
  gathered is `tokens * experts` numbers, little beside the tokens themselves.
* Tokens go to their slots, and back, within their group and device, by gathers whose gradients are
  gathers; a layout by groups becomes one by experts, and back, by an all-to-all.
* No axis of a tensor may lie along two axes of the mesh. So outside of the experts the batch lies
  along the longer of "data" and "expert", and devices along the other one do the same work.

G groups, S tokens per group, D width, E experts, C slots per expert and group, R rows of slots,
M = E*C slots per group, N = S*K choices per group. The groups are P*Q*B: P along the batch's axis
of the mesh, Q along the other one, B on each device.
"""

import contextlib
import os

import keras
import numpy as np
import tensorflow as tf
from keras import ops, tree
from keras.src.backend.common.name_scope import current_path
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from tensorflow.dtensor.python import accelerator_util, api
from tensorflow.experimental import dtensor

from keras_moe.dispatch import combine, dispatch
from keras_moe.distribution.active import active, bank
from keras_moe.distribution.engine import Engine
from keras_moe.distribution.layouts import AXES, bank_axes, moment_axes, prefix
from keras_moe.ops import with_gradient

COMBINE = "DTENSOR_ENABLE_COMBINE_ALL_REDUCES_OPTIMIZATION"


class TensorFlowEngine(Engine):
    """Layouts and steps of one `ExpertParallel`."""

    # The others select by tensors of their own, whose gradients on shards nobody has checked.
    ROUTERS = ("SwitchRouter", "TopKRouter", "ExpertChoiceRouter")
    GENERATES = False

    def __init__(self, size, devices):
        _start()
        super().__init__(size, devices)
        axes = [(axis, self.size[axis]) for axis in AXES]
        if dtensor.num_clients() == 1:
            self.mesh = dtensor.create_mesh(axes, devices=devices)
        else:
            self.mesh = dtensor.create_distributed_mesh(axes, device_type=_kind())
        self.batch_axis, self.other_axis = "expert", "data"
        if size["data"] > size["expert"]:
            self.batch_axis, self.other_axis = "data", "expert"
        self._axes = {}  # of variables by the names that optimizers make of their paths

    @staticmethod
    def list_devices():
        _start()
        return [device.name for device in tf.config.list_logical_devices(_kind())]

    @contextlib.contextmanager
    def scope(self, parallel):
        """Variables lie on the mesh, and models that are fitted or called step on it."""

        def maker(what):
            def make(model, force=False):
                name = f"{what}_function"
                made = getattr(model, name)
                if getattr(made, "parallel", None) is not parallel or force:
                    setattr(model, name, self._step(model, what, parallel))
                if what == "train":
                    if model.built and model.optimizer is not None and not model.optimizer.built:
                        model.optimizer.build(model.trainable_variables)
                    parallel.assert_sharded(model)
                return getattr(model, name)

            return make

        with contextlib.ExitStack() as stack:
            for what in ("train", "test", "predict"):
                name = f"make_{what}_function"
                stack.callback(setattr, TensorFlowTrainer, name, getattr(TensorFlowTrainer, name))
                setattr(TensorFlowTrainer, name, maker(what))
            stack.enter_context(tf.variable_creator_scope(self._create))
            yield

    def _step(self, model, what, parallel):
        """Keras' train, test or predict function, without its `tf.experimental.Optional`."""
        step = getattr(model, f"{what}_step")
        if not model.run_eagerly:
            step = tf.function(step, autograph=False)

        def run(data):
            if active() is not self:
                raise ValueError(
                    "A model that was fitted or called within `ExpertParallel.scope()` must be so "
                    f"again. Received: `{what}` of the model {model.name!r} outside of it"
                )
            return tree.map_structure(self.whole, step(self._place_batch(data)))

        def function(iterator):
            logs = run(next(iterator))
            for _ in range(model.steps_per_execution - 1):
                try:
                    logs = run(next(iterator))
                except StopIteration:
                    break
            return logs

        def predict(batches):
            outputs = [run(data) for data in batches]
            return tree.map_structure(lambda *parts: tf.constant(np.concatenate(parts)), *outputs)

        made = predict if what == "predict" else function
        made.parallel = parallel
        return made

    # Where variables and batches lie

    def _layout(self, axes):
        return dtensor.Layout([axis or dtensor.UNSHARDED for axis in axes], self.mesh)

    def _create(self, next_creator, initial_value, name=None, trainable=None, dtype=None, **unused):
        """A variable on the mesh; Keras makes metrics and moments within a step."""
        with tf.init_scope():
            value = initial_value() if callable(initial_value) else initial_value
            constant = tf.get_static_value(value)  # of the step that makes the variable
            dtype = None if dtype is None else tf.as_dtype(dtype).as_numpy_dtype
            value = np.asarray(value if constant is None else constant, dtype)
            path = "/".join(part for part in (current_path(), name) if part)
            axes = self._axes_of(path, name or "", value.shape)
            self._axes[prefix(path)] = (value.shape, axes)
            placed = self.placed(value, self._layout(axes))
            return _Variable(placed, engine=self, name=name, trainable=trainable)

    def _axes_of(self, path, name, shape):
        if bank() is not None and len(shape) > 0 and shape[0] == bank().num_experts:
            return bank_axes(path, shape, self.size)
        of_moment = moment_axes(name, shape, self._axes)
        # All else is whole on every device: with attention's heads shared a model learnt wrongly,
        # likely by moves that DTensor makes of its own, see `_by_groups`.
        return (None,) * len(shape) if of_moment is None else of_moment

    def placed(self, value, layout):
        """A NumPy array on the mesh: each device is given its part."""
        value = np.asarray(value)
        places = self.mesh.local_device_locations()
        parts = [tf.constant(value[self._part(layout, value.shape, place)]) for place in places]
        return dtensor.pack(parts, layout)

    def whole(self, x):
        """A NumPy array; where there are several processes, gathered by all of them."""
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
        result = np.empty(x.shape, parts[0].dtype)
        for place, part in zip(places, parts, strict=True):
            result[self._part(layout, result.shape, place)] = part
        return result

    def _part(self, layout, shape, place):
        """Which part of an array of this shape lies on the device at `place` in the mesh."""
        index = []
        for axis, size in zip(layout.sharding_specs, shape, strict=True):
            length = size // self.size.get(axis, 1)
            start = place[axis] * length if axis in self.size else 0
            index.append(slice(start, start + length))
        return tuple(index)

    def _place_batch(self, data):
        """A batch by its first axis; whole on every device where it cannot be shared evenly."""
        present = [np.asarray(x) for x in tree.flatten(data) if _is_given(x)]
        even = all(x.ndim and len(x) % self.size[self.batch_axis] == 0 for x in present)

        def place(x):
            if not _is_given(x):
                return None
            x = np.asarray(x)
            axes = (self.batch_axis if even else None, *[None] * (x.ndim - 1))[: x.ndim]
            return self.placed(x, self._layout(axes))

        return tree.map_structure(place, data)

    def place(self, experts):
        """Nothing to remember: a variable has its layout from the start."""

    def local_shape(self, variable):
        if not isinstance(variable.value, _Variable):  # made outside of the scope
            return tuple(variable.shape)
        return tuple(dtensor.unpack(variable.value.read_value())[0].shape)

    def local_bytes(self, variable):
        return int(np.prod(self.local_shape(variable))) * variable.value.dtype.size

    def layout(self, variable):
        """For a reader: the axis of the mesh of each axis of the variable."""
        layout = getattr(variable.value, "layout", None)
        specs = () if layout is None else layout.sharding_specs
        axes = [axis if axis in self.size else None for axis in specs]
        return ", ".join(str(axis) for axis in axes) if any(axes) else "replicated"

    # Within a step

    def _relayout(self, x, *axes):
        axes = (*axes, *[None] * (len(x.shape) - len(axes)))
        return dtensor.relayout(x, self._layout(axes))

    def gathered(self, x):
        return self._relayout(tf.convert_to_tensor(x))

    def seats_for_all(self, tokens):
        """All tokens of the group: shapes may not depend on the routing."""
        return tokens

    def by_groups(self, function, *inputs):
        whole = [None if x is None else self.gathered(x) for x in inputs]
        return tree.map_structure(
            lambda x: None if x is None else self.gathered(x), function(*whole), none_is_leaf=True
        )

    def exchange(self, experts, inputs, routing, training):
        inputs = ops.cast(inputs, experts.compute_dtype)
        whole = {
            name: self.gathered(getattr(routing, name))
            for name in ("token_index", "weight", "slot_index")
            if getattr(routing, name) is not None
        }
        routing = routing._replace(**whole)
        by = self._by_groups if inputs.shape[0] % self.batch_shards == 0 else self._by_all
        return by(experts, inputs, routing, training)

    def spread(self, experts, inputs, training):
        raise ValueError(
            "`SoftMoE` must be on one device on TensorFlow, whose DTensor has no rule for its "
            f"gradient. Received: {experts.num_experts} experts within `ExpertParallel.scope()`"
        )

    def _by_batch(self, y_G):
        """Groups along the batch's axis of the mesh, where it can share them evenly."""
        even = y_G.shape[0] % self.size[self.batch_axis] == 0
        return self._relayout(y_G, self.batch_axis) if even else y_G

    def _by_all(self, experts, x_GSD, routing, training):
        """Every device fills all slots, and hands on its own experts'."""
        groups, tokens, _ = x_GSD.shape
        slots_RCD = self.gathered(dispatch(self.gathered(x_GSD), routing))
        shared = slots_RCD.shape[1] % self.size["data"] == 0
        axes = ("expert", "data" if shared else None)
        y_RCD = experts(self._relayout(slots_RCD, *axes), training=training)
        y_RCD = self.gathered(self._relayout(y_RCD, *axes))
        return self._by_batch(self.gathered(combine(y_RCD, routing, groups, tokens)))

    def _by_groups(self, experts, x_GSD, routing, training):
        """Every device fills the slots of its own groups; an all-to-all takes them to experts.

        "expert" has the first dimension while it does: between two later dimensions DTensor mixes
        up what it moves (TensorFlow 2.21, CPU).
        """
        p, q = self.batch_axis, self.other_axis
        sizes = (self.size[p], self.size[q])
        P, Q = self.size["expert"], self.size["data"]
        groups, tokens, dim = x_GSD.shape
        num_experts, capacity = routing.token_index.shape[1:]
        num_slots = num_experts * capacity

        def experts_first(x):  # and the way back
            return x if p == "expert" else tf.transpose(x, (1, 0, *range(2, len(x.shape))))

        def split(x_G, *shape):  # [G, ...] -> [P, Q, B, ...]
            x = tf.reshape(self._relayout(x_G, p), (*sizes, groups // (P * Q), *shape))
            return self._relayout(experts_first(self._relayout(x, p, q)), "expert", "data")

        token_M, weight_M = (split(x, num_slots) for x in (routing.token_index, routing.weight))
        if routing.slot_index is None:
            to_slots, to_tokens = _by_products(token_M, tokens)
        else:
            k = routing.slot_index.shape[-1]
            to_slots, to_tokens = _by_gathers(token_M, split(routing.slot_index, tokens * k), k)

        # [P, Q, B, E, C, D] <-> [E, groups * C, D], groups along "data" first
        order = (3, 1, 0, 2, 4, 5)
        slots_ECD = tf.reshape(
            to_slots(split(x_GSD, tokens, dim)), (P, Q, -1, num_experts, capacity, dim)
        )
        slots_ECD = self._relayout(slots_ECD, "expert", "data")
        slots_ECD = self._relayout(slots_ECD, None, "data", None, "expert")
        slots_RCD = tf.transpose(slots_ECD, order)
        moved = slots_RCD.shape[:-1]
        slots_RCD = tf.reshape(slots_RCD, (num_experts, groups * capacity, dim))
        y_RCD = experts(self._relayout(slots_RCD, "expert", "data"), training=training)
        width = y_RCD.shape[-1]
        y_ECD = tf.reshape(self._relayout(y_RCD, "expert", "data"), (*moved, width))
        y_ECD = tf.transpose(y_ECD, tuple(np.argsort(order)))
        y_ECD = self._relayout(y_ECD, None, "data", None, "expert")
        y_ECD = self._relayout(y_ECD, "expert", "data")

        y_MD = tf.reshape(y_ECD, (P, Q, -1, num_slots, width))
        wide = keras.backend.result_type(y_MD.dtype.name, "float32")
        y_SD = to_tokens(tf.cast(y_MD, wide) * tf.cast(tf.expand_dims(weight_M, -1), wide))
        y_SD = tf.cast(self._relayout(experts_first(y_SD), p), y_MD.dtype)
        return self._relayout(tf.reshape(y_SD, (groups, tokens, width)), p)


def _by_gathers(token_M, slot_N, k):
    """The two linear maps of `dispatch.py` where tokens chose, each the other's gradient."""

    def to_slots(x_SD):
        return _rows(x_SD, token_M)

    def to_tokens(y_MD):
        y_ND = _rows(y_MD, slot_N)
        if k == 1:
            return y_ND
        return tf.reduce_sum(tf.reshape(y_ND, (*y_ND.shape[:3], -1, k, y_ND.shape[-1])), axis=-2)

    return (
        with_gradient(to_slots, lambda upstream, _: [lambda: to_tokens(upstream)]),
        with_gradient(to_tokens, lambda upstream, _: [lambda: to_slots(upstream)]),
    )


def _by_products(token_M, tokens):
    """The same where experts chose, as products with one-hot matrices, as in GShard.

    A token may then sit in any number of slots, and a sum by token has no rule.
    """
    taken_MS = tf.expand_dims(token_M, -1) == tf.range(tokens)
    return (
        lambda x_SD: tf.matmul(tf.cast(taken_MS, x_SD.dtype), x_SD),
        lambda y_MD: tf.matmul(tf.cast(taken_MS, y_MD.dtype), y_MD, transpose_a=True),
    )


def _rows(x, index):
    """Rows of `x` by position, group by group; zeros where the position is past the last."""
    size = x.shape[-2]
    rows = tf.gather(x, tf.minimum(index, size - 1), batch_dims=3, axis=3)
    return tf.where(tf.expand_dims(index < size, -1), rows, tf.zeros((), x.dtype))


def _is_given(x):
    return x is not None and not isinstance(x, tf.experimental.Optional)


def _start():
    """Begins DTensor, once for all meshes of the process.

    Raises:
        ValueError: if it is too late.
    """
    device = api._dtensor_singleton
    if device is not None and getattr(device, "of_expert_parallel", False):
        return
    try:
        if device is not None:
            raise ValueError("DTensor has a device already")
        if not accelerator_util.is_initialized():
            dtensor.initialize_accelerator_system(_kind())
    except ValueError as error:
        raise ValueError(
            "`ExpertParallel` must be made before the program's first tensor and first DTensor. "
            f"Received: {error}"
        ) from error
    # DTensor joins all-reduces that do not depend on each other, and what reads their results moves
    # behind, but not what reads a variable that was assigned from them: the loss that a step
    # reports would be the one of the step before, 0.0 at first. The device reads this once.
    before = os.environ.get(COMBINE)
    os.environ[COMBINE] = "0"
    try:
        # Not asynchronous: a step raises what went wrong on any device.
        dtensor._reset_dtensor_device(is_async=False)
    finally:
        if before is None:
            del os.environ[COMBINE]
        else:
            os.environ[COMBINE] = before
    api._dtensor_singleton.of_expert_parallel = True


def _kind():
    there = (kind for kind in ("TPU", "GPU") if tf.config.list_physical_devices(kind))
    return next(there, "CPU")


class _Variable(dtensor.DVariable):
    """A variable on the mesh that is given, and read as, NumPy arrays."""

    def __init__(self, initial_value, engine, **kwargs):
        self._engine = engine
        super().__init__(initial_value, **kwargs)

    def assign(self, value, *args, **kwargs):
        if tf.executing_eagerly() and not dtensor.is_dtensor(value):
            value = np.asarray(value).astype(self.dtype.as_numpy_dtype)
            value = self._engine.placed(value, self.layout)
        return super().assign(value, *args, **kwargs)

    def numpy(self):
        return self._engine.whole(self.read_value())
