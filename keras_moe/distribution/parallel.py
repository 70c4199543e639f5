"""Experts on several devices: the one object that a user sees, the same on every backend."""

import contextlib
import math

import keras

from keras_moe.distribution.active import activated
from keras_moe.distribution.cluster import num_processes
from keras_moe.distribution.layouts import expert_axes, prefix


class ExpertParallel:
    """A mesh of devices that share the experts, and the batch.

    The devices are `data * experts * model`. Every device has `1 / (data * experts)` of the batch
    and `1 / (experts * model)` of every expert kernel and of the optimizer's moments of it: the
    experts are split into `experts` parts, each expert's hidden units, and on JAX those of
    attention and dense feed-forward layers, into `model` parts. Everything else every device has
    whole. A token goes to the device of its expert and back; router, losses and metrics are those
    of the whole batch, however many devices there are.

    Example:

    ```python
    parallel = keras_moe.distribution.ExpertParallel(experts=8)
    with parallel.scope():
        backbone = zoo.switch_transformer("mini", num_experts=32, architecture="encoder")
        model = zoo.EncoderTextClassifier(backbone, num_classes=2)
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(dataset)
        model.save_weights("switch.weights.h5")
    ```

    Where a router has a capacity and the layer's groups of tokens (`group="sequence"`, or a number
    of tokens) are at least as many as the devices that share the batch, exactly the slots travel,
    by an all-to-all there and another back. Where one group spans devices (`group="batch"`, the
    rest of an epoch), and without a capacity, where any expert may get every token, there is no
    bound below all tokens that never drops one: each device then sees all tokens of the `experts`
    devices of its row of the mesh, and adds up what its own experts make of them (an all-gather and
    a reduce-scatter), `experts / (k * capacity_factor)` times the bytes.

    A mesh lies over the devices of all processes that `keras_moe.launch` joined. Each of them runs
    the same program and reads the same batches, and gives its devices their parts of them;
    `predict` and `save` put together what the processes have, so that all must call them.
    `ShardedBackup` saves parts.

    On TensorFlow shapes are static and no axis lies along two of the mesh: a router without a
    capacity has every expert compute a slot for every token, and outside of the experts the batch
    lies along the longer of the axes "data" and "expert", while devices along the other one do the
    same work. There the mesh must be made before the program's first tensor, and models must be
    fitted and called within its scope. Routers other than Switch, top-k and expert choice are
    refused, and so is `SoftMoE`. The noise of dropout depends on the mesh, that of routers does
    not.

    Args:
        data: devices along the axis that shares the batch only; `None`: as many as there are for
            the other two, which must divide them.
        experts: devices along the axis that shares the experts, and the batch too; must divide the
            number of experts of every layer.
        model: devices along the axis that shares hidden units; must divide the experts' hidden
            width.
        devices: list of names, on JAX as `keras.distribution.list_devices()` returns them, on
            TensorFlow "CPU:0" and so on; `None`: all, and of several processes always.

    Raises:
        ValueError: if an argument is out of range, if the mesh is larger than the devices, on
            PyTorch, or on TensorFlow once it has made a tensor.
    """

    def __init__(self, data=None, experts=1, model=1, devices=None):
        from keras_moe.routing.base import positive_integer  # here: routers import this package

        positive_integer("data", data, optional=True)
        positive_integer("experts", experts)
        positive_integer("model", model)
        engine = _engine()
        if devices is not None and num_processes() > 1:
            raise ValueError(
                "`devices` must be None with several processes, and is all of theirs. "
                f"Received: {devices}"
            )
        devices = engine.list_devices() if devices is None else list(devices)
        among = experts * model
        if data is None and len(devices) > among and len(devices) % among:
            raise ValueError(
                "`experts * model` must divide the number of devices where `data` is None. "
                f"Received: experts={experts}, model={model} for {len(devices)} devices"
            )
        data = data or max(1, len(devices) // among)
        size = data * among
        if size > len(devices):
            raise ValueError(
                f"`data * experts * model` must be at most the number of devices, {len(devices)}. "
                f"Received: data={data}, experts={experts}, model={model}, a mesh of {size}"
            )
        if num_processes() > 1 and size < len(devices):
            raise ValueError(
                "`data * experts * model` must be the number of devices of all processes, "
                f"{len(devices)}. Received: data={data}, experts={experts}, model={model}, a mesh "
                f"of {size}"
            )
        self.data = data
        self.experts = experts
        self.model = model
        self.devices = devices[:size]
        self._engine = engine({"data": data, "expert": experts, "model": model}, self.devices)

    @contextlib.contextmanager
    def scope(self):
        """Within, models are built, compiled, fitted, evaluated, used and saved on the mesh."""
        with activated(self._engine), self._engine.scope(self):
            yield self

    def assert_sharded(self, model):
        """Raises a ValueError if a device has more than its share of an expert kernel.

        Or of an optimizer's moment of it. `fit` asks before its first step.

        Args:
            model: a built Keras model or layer.
        """
        for variable, share in self._to_share(model):
            size, local = math.prod(variable.shape), math.prod(self._engine.local_shape(variable))
            if local * share > size:
                raise ValueError(
                    "Expert weights and their moments must be shared by the devices, and so be "
                    "made within `scope()`. Received: "
                    f"{variable.path!r} of shape {tuple(variable.shape)}, of which every device "
                    f"has {tuple(self._engine.local_shape(variable))}, not 1/{share}"
                )

    def _to_share(self, model):
        """Variables of which each device has its share, and how many shares there are."""
        optimizer = getattr(model, "optimizer", None)
        moments = list(optimizer.variables) if optimizer is not None else []
        for layer in model._flatten_layers():
            if not (hasattr(getattr(layer, "experts", None), "num_experts") and layer.built):
                continue
            for weight in layer.experts.weights:
                by_experts = weight.shape[:1] == (layer.experts.num_experts,)
                axes = expert_axes(weight.name) if by_experts else ()
                share = math.prod(self._engine.size[axis] for axis in axes if axis)
                yield weight, share
                for moment in moments:
                    if not moment.path.rpartition("/")[2].startswith(prefix(weight.path)):
                        continue
                    like = tuple(moment.shape) == tuple(weight.shape)
                    yield moment, share if like else self.experts

    def describe(self, model):
        """Prints where everything is: weight, shape, layout, bytes per device.

        Args:
            model: a built Keras model or layer; of a model the optimizer's variables are shown too.

        Returns:
            The table that was printed.
        """
        variables = list(model.weights)
        if getattr(model, "optimizer", None) is not None:
            variables += model.optimizer.variables
        rows, total = [("weight", "shape", "layout", "bytes per device")], 0
        for variable in variables:
            local = self._engine.local_bytes(variable)
            total += local
            shape, layout = str(tuple(variable.shape)), self._engine.layout(variable)
            rows.append((variable.path, shape, layout, f"{local:,}"))
        rows.append(("all", "", "", f"{total:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(
                text.rjust(width) if column == 3 else text.ljust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        table = "\n".join(lines)
        print(table)
        return table


def _engine():
    """The class of the engine for this backend."""
    backend = keras.backend.backend()
    if backend == "jax":
        from keras_moe.distribution.jax_engine import JaxEngine

        return JaxEngine
    if backend == "tensorflow":
        from keras_moe.distribution.tensorflow_engine import TensorFlowEngine

        return TensorFlowEngine
    raise ValueError(
        "`ExpertParallel` must be used on JAX or TensorFlow, whose engines share weights among "
        f"devices. Received: the backend {backend}; start with KERAS_BACKEND=jax, or train "
        "data-parallel with the backend's own means"
    )
