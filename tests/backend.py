"""The few things that tests must do differently on each backend."""

import math

import keras
import numpy as np
from keras import ops


def run(layer, x, cotangent, **call):
    """One differentiated call of a layer, compiled where a backend can.

    Args:
        layer: a built Keras layer.
        x: its inputs.
        cotangent: array like its outputs.
        **call: the other arguments of the call.

    Returns:
        Tuple of the outputs, the sum of `layer.losses`, and the gradients of
        `sum(outputs * cotangent) + sum(layer.losses)` with respect to `x` and, a list, to
        `layer.trainable_variables`.
    """
    function, arguments = _differentiated(layer, x, cotangent, call)
    y, loss, by_x, by_weight = compiled(function)(*arguments)
    by_weight = [ops.convert_to_numpy(gradient) for gradient in by_weight]
    return ops.convert_to_numpy(y), float(loss), ops.convert_to_numpy(by_x), by_weight


def gradients(layer, x, cotangent, **call):
    """The two gradients of `run`."""
    return run(layer, x, cotangent, **call)[2:]


def _differentiated(layer, x, cotangent, call):
    """The function behind `run`, and its arguments."""
    x, cotangent = np.asarray(x, "float32"), np.asarray(cotangent, "float32")
    weights = [v.value for v in layer.trainable_variables]
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def loss(weights, x, others):
            y, _, losses = layer.stateless_call(weights, others, x, return_losses=True, **call)
            return ops.sum(y * cotangent) + sum(losses), (y, sum(losses))

        def function(weights, x, others):
            gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
            (by_weight, by_x), (y, losses) = gradient(weights, x, others)
            return y, losses, by_x, by_weight

        return function, (weights, x, [v.value for v in layer.non_trainable_variables])
    if backend == "tensorflow":
        import tensorflow as tf

        def function(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, **call)
                losses = sum(layer.losses, tf.zeros(()))
                loss = tf.reduce_sum(y * cotangent) + losses
            by_x, *by_weight = tape.gradient(loss, [x, *weights])
            return y, losses, by_x, by_weight

        return function, (tf.constant(x),)
    import torch

    def function(x):
        y = layer(x, **call)
        losses = sum(layer.losses, torch.zeros(()))
        loss = (y * torch.tensor(cotangent)).sum() + losses
        by_x, *by_weight = torch.autograd.grad(loss, [x, *weights])
        return y, losses, by_x, by_weight

    return function, (torch.tensor(x, requires_grad=True),)


def cost(layer, x, cotangent, **call):
    """What one differentiated call makes and multiplies.

    Returns:
        Tuple of the number of entries of the largest tensor that is made on the way (the compiler
        may yet fuse some away), and the multiplications of all matrix products.
    """
    function, arguments = _differentiated(layer, x, cotangent, call)
    backend = keras.backend.backend()
    steps = {"jax": _jax_steps, "tensorflow": _tensorflow_steps, "torch": _torch_steps}[backend]
    sizes, products = zip(*steps(function, arguments), strict=True)
    return max(sizes), sum(products)


def _jax_steps(function, arguments):
    import jax

    def walk(jaxpr):
        for step in jaxpr.eqns:
            for parameter in jax.tree.leaves(
                list(step.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
            ):
                parameter = getattr(parameter, "jaxpr", parameter)
                if hasattr(parameter, "eqns"):
                    yield from walk(parameter)
            product = 0
            if step.primitive.name == "dot_general":
                (contracted, _), _ = step.params["dimension_numbers"]
                shape = step.invars[0].aval.shape
                product = step.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
            for made in step.outvars:
                yield made.aval.size, product
                product = 0

    return list(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


def _tensorflow_steps(function, arguments):
    import tensorflow as tf

    steps = []
    for step in tf.function(function).get_concrete_function(*arguments).graph.get_operations():
        product = 0
        if "MatMul" in step.type:
            transposed = step.get_attr("adj_x" if "Batch" in step.type else "transpose_a")
            contracted = step.inputs[0].shape[-2 if transposed else -1]
            product = step.outputs[0].shape.num_elements() * contracted
        steps += [(made.shape.num_elements() or 0, 0) for made in step.outputs]
        steps.append((0, product))
    return steps


def _torch_steps(function, arguments):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    steps = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            product = 0
            if operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
                product = result.numel() * args[0].shape[-1]
            for made in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(made, torch.Tensor):
                    steps.append((made.untyped_storage().nbytes() // made.element_size(), product))
                    product = 0
            return result

    with Recorder():
        function(*arguments)
    return steps


def compiled(function):
    """The function under XLA; as it is on PyTorch."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(function)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    return function


def numpy(tensor):
    """A tensor, or a tuple of tensors, as NumPy arrays; `None` stays."""
    if isinstance(tensor, tuple):
        values = [numpy(value) for value in tensor]
        return type(tensor)(*values) if hasattr(tensor, "_fields") else tuple(values)
    return None if tensor is None else ops.convert_to_numpy(tensor)
