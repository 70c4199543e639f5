"""The engine of `ExpertParallel` on JAX: Keras' `ModelParallel`, and collectives by `shard_map`.

Left to itself XLA makes all-gathers of a gather along a sharded axis. So the part between router
and residual is written for one device, with its collectives by name.

G groups, S tokens per group, D width, T tokens of a row of the mesh (those of the devices along
"expert"), E experts, R rows of slots, C slots per row.
"""

import contextlib
import math

import jax
import keras
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P
from keras import ops, tree
from keras.distribution import DeviceMesh, LayoutMap, ModelParallel, TensorLayout
from keras.src import backend as keras_backend
from keras.src.backend.jax import distribution_lib as keras_lib
from keras.src.backend.jax.trainer import JAXTrainer

from keras_moe.dispatch import combine, dispatch
from keras_moe.distribution.active import bank, outside
from keras_moe.distribution.engine import Engine
from keras_moe.distribution.layouts import (
    AXES,
    BATCH,
    bank_axes,
    expert_axes,
    moment_axes,
    other_axes,
    prefix,
)
from keras_moe.ops import take_rows, uniform
from keras_moe.routing.base import Routing, seat_choices
from keras_moe.slots import by_rows, look_up

_convert_to_numpy = keras_backend.convert_to_numpy


class JaxEngine(Engine):
    """Layouts and collectives of one `ExpertParallel`."""

    def __init__(self, size, devices):
        super().__init__(size, devices)
        shape = tuple(size[axis] for axis in AXES)
        self.distribution = _Sharded(DeviceMesh(shape, AXES, devices))
        self.mesh = self.distribution.device_mesh.backend_mesh

    @staticmethod
    def list_devices():
        return keras.distribution.list_devices()

    @contextlib.contextmanager
    def scope(self, parallel):
        """Keras' own scope, with functions of its trainer that know of experts and processes."""
        make_train, make_predict = JAXTrainer.make_train_function, JAXTrainer.make_predict_function

        def place_batch(batch, layout, batch_dim_name):
            """Each batch by its own size: Keras takes the first one's layout for all."""
            if batch is None:
                return None
            layout = self.distribution.get_data_layout(batch.shape).backend_layout
            return jax.make_array_from_process_local_data(layout, batch, batch.shape)

        def make_train_function(model, force=False):
            make_train(model, force)
            parallel.assert_sharded(model)

        def make_predict_function(model, force=False):
            before = model.predict_function
            make_predict(model, force)
            predict = model.predict_function

            def whole(state, data):
                outputs, state = predict(state, data)
                return tree.map_structure(self.whole, outputs), state

            if predict is not before:
                model.predict_function = whole

        patches = {(keras_lib, "distribute_data_input"): place_batch}
        patches[JAXTrainer, "make_train_function"] = make_train_function
        if jax.process_count() > 1:
            patches[JAXTrainer, "make_predict_function"] = make_predict_function
            # What is saved, the first by layers, the second by optimizers.
            patches[keras_backend, "convert_to_numpy"] = self.whole
            patches[keras_backend.Variable, "numpy"] = self.whole
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.distribution.scope())
            for (owner, name), function in patches.items():
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, function)
            yield

    @staticmethod
    def whole(x):
        """A NumPy array; where other processes have parts of it, all of them must ask."""
        value = getattr(x, "value", x)
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            if not value.is_fully_replicated:
                return multihost_utils.process_allgather(value, tiled=True)
            value = value.addressable_data(0)
        return _convert_to_numpy(value)

    def local_shape(self, variable):
        value = variable.value
        return value.sharding.shard_shape(value.shape)

    def local_bytes(self, variable):
        return math.prod(self.local_shape(variable)) * variable.value.dtype.itemsize

    def layout(self, variable):
        """For a reader: the axis of the mesh of each axis of the variable."""
        axes = getattr(variable.value.sharding, "spec", ())
        return ", ".join(str(axis) for axis in axes) if any(axes) else "replicated"

    def place(self, experts):
        if experts.activity_regularizer is not None:
            raise ValueError(
                "`activity_regularizer` of experts must be None on a mesh of JAX's devices, which "
                f"compute a part of their outputs each. Received: {experts.activity_regularizer!r} "
                f"of {experts.name!r}"
            )
        for variable in experts.weights:
            variable._layout = self.distribution.get_variable_layout(variable)

    def exchange(self, experts, inputs, routing, training):
        if routing.row_expert is not None:
            of_device = self._by_choices
        else:
            groups = inputs.shape[0]
            of_device = self._by_tables if groups % self.batch_shards else self._by_slots
        inputs = ops.cast(inputs, experts.compute_dtype)
        return of_device(self._runner(experts, training), experts, inputs, routing)

    def spread(self, experts, inputs, training):
        def on_device(apply, x_GECD):
            groups, num_experts, slots, dim = x_GECD.shape
            x_ECD = ops.reshape(ops.transpose(x_GECD, (1, 0, 2, 3)), (num_experts, -1, dim))
            y_ECD = _there_and_back(apply, x_ECD)
            y_EGCD = ops.reshape(y_ECD, (num_experts, groups, slots, y_ECD.shape[-1]))
            return ops.transpose(y_EGCD, (1, 0, 2, 3))

        groups = inputs.shape[0]
        padding = -groups % self.batch_shards
        inputs = ops.pad(ops.cast(inputs, experts.compute_dtype), ((0, padding), *[(0, 0)] * 3))
        return self._runner(experts, training)(on_device, [P(BATCH)], inputs)[:groups]

    def _runner(self, experts, training):
        """A function that runs another on every device, with the device's part of the experts."""
        weights = experts.cast_weights()
        specs = {name: P(*expert_axes(name)) for name in weights}
        seed = None
        if training and getattr(experts, "dropout", 0) > 0:
            seed = experts.seed_generator.next()

        def run(on_device, in_specs, *arguments):
            def with_experts(weights, seed, *arguments):
                return on_device(self._local(experts, weights, seed), *arguments)

            return jax.shard_map(
                outside(with_experts),
                mesh=self.mesh,
                in_specs=(specs, P(), *in_specs),
                out_specs=P(BATCH),
                check_vma=False,  # the gradients of `with_gradient` do not say what they vary by
            )(weights, seed, *arguments)

        return run

    def by_groups(self, function, *inputs):
        groups = next(x.shape[0] for x in inputs if x is not None)
        if groups % self.batch_shards:
            return function(*inputs)
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=P(BATCH), out_specs=P(BATCH), check_vma=False
        )(*inputs)

    def _local(self, experts, weights, seed):
        """A device's experts: a function from slots to slots, `[rows, slots, ...]` each."""
        model = self.size["model"]

        def apply(slots_RCD, row_expert=None):
            own = dict(weights)
            options = {}
            if seed is not None:
                hidden = own["kernel_in"].shape[2]
                place = _Seed(jax.random.fold_in(seed, _index(AXES, self.size)))
                drawn_RCF = uniform((*slots_RCD.shape[:2], hidden), 0.0, 1.0, place)
                options["kept_RCF"] = drawn_RCF >= experts.dropout
            if model > 1:
                part = lax.axis_index("model")
                if "bias_out" in own:  # added once
                    own["bias_out"] = ops.where(part == 0, own["bias_out"], 0.0)
                if "kernel" in own:  # its rows, the slots' columns
                    width = own["kernel"].shape[1]
                    slots_RCD = lax.dynamic_slice_in_dim(slots_RCD, part * width, width, 2)

            def compute(slots_RCD, weights):
                return experts.compute(slots_RCD, weights, row_expert=row_expert, **options)

            # As it is, unless the bank was made in a `keras.RematScope`.
            compute = keras.Layer.rematerialized_call(experts, compute, slots_RCD, own)
            y_RCD = compute(slots_RCD, own)
            if model == 1:
                return y_RCD
            wide_RCD = ops.cast(y_RCD, keras.backend.result_type(y_RCD.dtype, "float32"))
            return ops.cast(lax.psum(wide_RCD, "model"), y_RCD.dtype)

        return apply

    def _by_slots(self, run, experts, inputs, routing):
        """Each device seats its own groups, and sends the slots to the experts' devices."""

        def on_device(apply, x_GSD, token_index, weight, slot_index):
            local = _seats(token_index, weight, slot_index)
            y_ECD = _there_and_back(apply, dispatch(x_GSD, local))
            return combine(y_ECD, local, *x_GSD.shape[:2])

        arguments = (inputs, routing.token_index, routing.weight, routing.slot_index)
        return run(on_device, [P(BATCH)] * len(arguments), *arguments)

    def _by_tables(self, run, experts, inputs, routing):
        """Each device fills the rows of its experts, from all tokens of its row of the mesh."""
        compact = getattr(experts, "compact", False) and self.size["data"] > 1
        num_tokens, padded = self._padded(inputs)
        row_tokens = padded // self.size["data"]
        token_1EC, weight_1EC = (
            _pooled(x) for x in (_pool(routing.token_index, inputs), routing.weight)
        )

        def on_device(apply, x_TD, token_1EC, weight_1EC):
            x_TD = lax.all_gather(x_TD, "expert", tiled=True)
            token_1EC = token_1EC - lax.axis_index("data") * row_tokens
            here_1EC = (token_1EC >= 0) & (token_1EC < row_tokens)
            token_1EC = ops.where(here_1EC, token_1EC, row_tokens)
            local = _seats(token_1EC, ops.where(here_1EC, weight_1EC, 0.0))
            if compact:  # most slots are another row's of the mesh
                local = _compacted(local, here_1EC, row_tokens)
            slots_RCD = dispatch(x_TD[None], local)
            y_TD = combine(apply(slots_RCD, local.row_expert), local, 1, row_tokens)[0]
            return self._sum_scatter(y_TD)

        token_1EC = ops.where(token_1EC < num_tokens, token_1EC, padded)
        specs = (P(BATCH), P(None, "expert"), P(None, "expert"))
        x_TD = self._flat(inputs, padded)
        return _unflat(run(on_device, specs, x_TD, token_1EC, weight_1EC), inputs)

    def _by_choices(self, run, experts, inputs, routing):
        """Each device seats all tokens of its row of the mesh that chose its experts."""
        num_experts = experts.num_experts
        own_experts = num_experts // self.size["expert"]
        _, padded = self._padded(inputs)
        rows, slots = routing.token_index.shape[1:]
        slot_TK = ops.reshape(routing.slot_index, (-1, routing.slot_index.shape[-1]))
        row_TK = ops.minimum(slot_TK // slots, rows - 1)
        expert_TK = ops.where(
            slot_TK < rows * slots, ops.take(routing.row_expert, row_TK, axis=0), num_experts
        )
        weight_M1 = ops.reshape(routing.weight, (-1, 1))
        weight_TK = take_rows(weight_M1, slot_TK)[..., 0]
        pad = ((0, padded - slot_TK.shape[0]), (0, 0))
        expert_TK = ops.pad(expert_TK, pad, constant_values=num_experts)
        weight_TK = ops.pad(weight_TK, pad)

        def on_device(apply, x_TD, expert_TK, weight_TK):
            x_TD, expert_TK, weight_TK = (
                lax.all_gather(x, "expert", tiled=True) for x in (x_TD, expert_TK, weight_TK)
            )
            own_TK = expert_TK - lax.axis_index("expert") * own_experts
            own_TK = ops.where((own_TK >= 0) & (own_TK < own_experts), own_TK, own_experts)
            seats = seat_choices(own_TK[None], weight_TK[None], own_experts)
            local = _seats(*seats)
            slots_RCD = dispatch(x_TD[None], local)
            y_TD = combine(apply(slots_RCD, local.row_expert), local, 1, x_TD.shape[0])[0]
            return self._sum_scatter(y_TD)

        x_TD = self._flat(inputs, padded)
        return _unflat(run(on_device, [P(BATCH)] * 3, x_TD, expert_TK, weight_TK), inputs)

    def _sum_scatter(self, y_TD):
        """The sum over the experts' devices, in float32 at least; each gets its own tokens'."""
        wide_TD = ops.cast(y_TD, keras.backend.result_type(y_TD.dtype, "float32"))
        sum_TD = lax.psum_scatter(wide_TD, "expert", scatter_dimension=0, tiled=True)
        return ops.cast(sum_TD, y_TD.dtype)

    def _padded(self, inputs):
        """Tokens in all, and as many as the devices that share the batch can share alike."""
        num_tokens = inputs.shape[0] * inputs.shape[1]
        return num_tokens, num_tokens + -num_tokens % self.batch_shards

    def _flat(self, inputs, padded):
        x_TD = ops.reshape(inputs, (-1, inputs.shape[-1]))
        return ops.pad(x_TD, ((0, padded - x_TD.shape[0]), (0, 0)))


def _there_and_back(apply, slots_ECD):
    """All experts' slots of this device, through the experts on their devices."""
    slots_ECD = lax.all_to_all(slots_ECD, "expert", 0, 1, tiled=True)
    return lax.all_to_all(apply(slots_ECD), "expert", 1, 0, tiled=True)


def _unflat(y_TD, inputs):
    groups, tokens = inputs.shape[:2]
    return ops.reshape(y_TD[: groups * tokens], (groups, tokens, y_TD.shape[-1]))


def _pool(token_index, inputs):
    """Positions among the tokens of all groups, `[G, R, C]`; all of them: an empty slot."""
    groups, tokens = inputs.shape[:2]
    first = ops.reshape(ops.arange(groups, dtype="int32") * tokens, (-1, 1, 1))
    return ops.where(token_index == tokens, groups * tokens, token_index + first)


def _pooled(x_GEC):
    """The slots of all groups in one row per expert, `[1, E, G*C]`."""
    return ops.reshape(ops.transpose(x_GEC, (1, 0, 2)), (1, x_GEC.shape[1], -1))


def _seats(token_index, weight, slot_index=None, row_expert=None):
    """As much of a `Routing` as dispatch and combine read."""
    return Routing(token_index, weight, slot_index, row_expert, *[None] * 4)


def _compacted(table, taken_1EC, empty):
    """The slots that are taken, in rows as needed; `empty` is the token of an empty one."""
    _, experts, slots = taken_1EC.shape
    expert_1EC = ops.where(taken_1EC, np.arange(experts, dtype="int32")[:, None], experts)
    rows = by_rows(ops.reshape(expert_1EC, (1, experts * slots)), experts)
    index_M = ops.minimum(rows.assignment_index, experts * slots - 1)
    token_1RC = ops.where(
        rows.assignment_index < experts * slots,
        ops.take(ops.reshape(table.token_index, (-1,)), index_M, axis=0),
        empty,
    )
    weight_1RC = look_up(ops.reshape(table.weight, (1, experts * slots)), rows.assignment_index)
    return _seats(token_1RC, weight_1RC, row_expert=rows.row_expert)


def _index(axes, size):
    """This device's number along several axes of the mesh."""
    index = 0
    for axis in axes:
        index = index * size[axis] + lax.axis_index(axis)
    return index


class _Seed:
    """What `uniform` draws its seed from, where the generator cannot be stepped."""

    def __init__(self, seed):
        self.seed = seed

    def next(self):
        return self.seed


class _BatchLayout(TensorLayout):
    """One axis over two of the mesh, which a layout of Keras' does not allow."""

    def _validate_axes(self):
        pass


class _Sharded(ModelParallel):
    """Keras' `ModelParallel` with the layouts of `layouts.py`."""

    def __init__(self, device_mesh):
        # Every process reads all batches, of datasets too.
        super().__init__(
            layout_map=LayoutMap(device_mesh), batch_dim_name="data", auto_shard_dataset=False
        )
        self._of_experts = {}

    @property
    def num_model_replicas(self):
        data, experts, _ = self.device_mesh.shape
        return data * experts

    def get_data_layout(self, data_shape):
        """The first axis over the devices that share the batch; a batch they cannot share, whole.

        The rest of an epoch, say: every device then has all of it.
        """
        axes = [None] * len(data_shape)
        shards = self.num_model_replicas
        if data_shape and data_shape[0] % shards == 0:
            axes[0] = BATCH
        return _BatchLayout(axes, self.device_mesh)

    def get_variable_layout(self, variable):
        if getattr(variable, "_layout", None) is not None:  # an optimizer's, like the weight's
            return variable._layout
        return TensorLayout(self._axes(variable), self.device_mesh)

    def _axes(self, variable):
        path, shape = variable.path, tuple(variable.shape)
        if bank() is not None:
            if shape[:1] != (bank().num_experts,):
                return (None,) * len(shape)
            sizes = dict(zip(AXES, self.device_mesh.shape, strict=True))
            axes = bank_axes(path, shape, sizes)
            self._of_experts[prefix(path)] = (shape, axes)
            return axes
        of_moment = moment_axes(path.rpartition("/")[2], shape, self._of_experts)
        return of_moment or other_axes(path, shape, self.device_mesh.shape[2])
