"""Which axis of a weight lies along which axis of the mesh; on TensorFlow those of experts alone.

The mesh has three axes. The batch is sharded over "data" and "expert" together; the experts over
"expert"; hidden units, of experts, attention and dense feed-forward layers, over "model", as in
Megatron-LM (https://arxiv.org/abs/1909.08053), section 3: the first of two products by columns, the
second by rows. The axes of the mesh and the layout are those of T5X and GShard
(https://arxiv.org/abs/2006.16668), section 3.3.
"""

import re

AXES = ("data", "expert", "model")
BATCH = ("data", "expert")

# Of a bank of experts, by name.
EXPERTS = {
    "kernel_in": ("expert", None, "model"),
    "kernel_gate": ("expert", None, "model"),
    "bias_in": ("expert", "model"),
    "kernel_out": ("expert", "model", None),
    "bias_out": ("expert", None),
    "kernel": ("expert", "model", None),
}

# Of everything else, by the end of the path; what no line fits is replicated.
OTHERS = (
    (r"\w*attention\w*/(query|key|value)/kernel", (None, "model", None)),
    (r"\w*attention\w*/(query|key|value)/bias", ("model", None)),
    (r"\w*attention\w*/(output|attention_output)/kernel", ("model", None, None)),
    (r"(feed_forward|shared)\w*/(hidden|gate)/kernel", (None, "model")),
    (r"(feed_forward|shared)\w*/output/kernel", ("model", None)),
    (r"shared\w*/(kernel_in|kernel_gate)", (None, None, "model")),
    (r"shared\w*/kernel_out", (None, "model", None)),
)


def expert_axes(name):
    """Axes of the mesh for a weight of a bank of experts; one of another name goes by experts."""
    return EXPERTS.get(name, ("expert",))


def bank_axes(path, shape, sizes):
    """Axes of the mesh for a weight of a bank of experts.

    Args:
        path: of the weight.
        shape: of the weight, the experts first.
        sizes: name of an axis of the mesh -> devices along it.

    Returns:
        Tuple like `shape`: the name of an axis, or `None`.

    Raises:
        ValueError: if the devices cannot share it evenly.
    """
    axes = (*expert_axes(path.rpartition("/")[2]), None, None)[: len(shape)]
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and size % sizes[axis]:
            raise ValueError(
                f"The devices along {axis!r} must divide the weights of all experts. "
                f"Received: {sizes[axis]} devices for {path!r} of shape {tuple(shape)}"
            )
    return axes


def other_axes(path, shape, model):
    """Axes of the mesh for any other weight.

    Args:
        path: of the weight.
        shape: of the weight.
        model: devices along the axis "model".

    Returns:
        Tuple like `shape`: the name of an axis, or `None`.
    """
    rank = len(shape)
    for pattern, axes in OTHERS:
        if re.search(rf"(^|/){pattern}$", path):
            axes = (*axes, None, None)[:rank]
            fits = all(size % model == 0 for size, axis in zip(shape, axes, strict=True) if axis)
            return axes if fits else (None,) * rank
    return (None,) * rank


def prefix(path):
    """What optimizers begin the names of a weight's moments with."""
    return path.replace("/", "_") + "_"


def moment_axes(name, shape, weights):
    """Axes of the mesh for an optimizer's variable; `None`: it is of none of the weights.

    A moment lies like its weight; a factor of it, of all axes but one (Adafactor), by experts.

    Args:
        name: of the variable.
        shape: of the variable.
        weights: `prefix` of a weight's path -> tuple of its shape and its axes.
    """
    of = [start for start in weights if name.startswith(start)]
    if not of:
        return None
    weight_shape, axes = weights[max(of, key=len)]
    if tuple(weight_shape) == tuple(shape):
        return axes
    if "expert" in axes and tuple(shape[:1]) == tuple(weight_shape[:1]):
        return ("expert", *[None] * (len(shape) - 1))
    return (None,) * len(shape)
