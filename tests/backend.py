"""The few things that tests must do differently on each backend."""

import functools
import math

import keras
import numpy as np
import pytest
from keras import ops


def marked(params, *every_backend):
    """Parameters of which the named ones run on every backend in the default suite."""
    mark = pytest.mark.every_backend
    return [pytest.param(name, marks=mark if name in every_backend else ()) for name in params]


def run(layer, x, cotangent, jit=True, **call):
    """One differentiated call of a layer, compiled where a backend can.

    Args:
        layer: a built Keras layer.
        x: its inputs.
        cotangent: array like its outputs.
        jit: whether it is compiled.
        **call: the other arguments of the call.

    Returns:
        Tuple of the outputs, the sum of `layer.losses`, and the gradients of
        `sum(outputs * cotangent) + sum(layer.losses)` with respect to `x` and, a list, to
        `layer.trainable_variables`, zeros for those that have no part in it.
    """
    return run_each(layer, [x], cotangent, jit, **call)[0]


def run_each(layer, xs, cotangent, jit=True, **call):
    """`run` for several inputs of one shape; it is compiled once."""
    program, results = None, []
    for x in xs:
        function, arguments = _differentiated(layer, x, cotangent, call)
        if program is None:
            program = compiled(function) if jit else function
        y, loss, by_x, by_weight = program(*arguments)
        by_weight = [ops.convert_to_numpy(gradient) for gradient in by_weight]
        result = ops.convert_to_numpy(y), float(loss), ops.convert_to_numpy(by_x), by_weight
        results.append(result)
    return results


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
                loss = tf.reduce_sum(tf.cast(y, tf.float32) * cotangent) + losses
            by_x, *by_weight = tape.gradient(loss, [x, *weights], None, "zero")
            return y, losses, by_x, by_weight

        return function, (tf.constant(x),)
    import torch

    def function(x):
        y = layer(x, **call)
        losses = sum(layer.losses, torch.zeros(()))
        loss = (y * torch.tensor(cotangent)).sum() + losses
        by_x, *by_weight = torch.autograd.grad(loss, [x, *weights], materialize_grads=True)
        return y, losses, by_x, by_weight

    return function, (torch.tensor(x, requires_grad=True),)


def cost(layer, x, cotangent, **call):
    """What one differentiated call makes and multiplies.

    Returns:
        Tuple of the number of entries of the largest tensor that is made on the way (the compiler
        may yet fuse some away), and the multiplications of all matrix products that are run, every
        turn of a loop counted.
    """
    function, arguments = _differentiated(layer, x, cotangent, call)
    measure = {"jax": _jax_cost, "tensorflow": _tensorflow_cost, "torch": _torch_cost}
    return measure[keras.backend.backend()](function, arguments)


def _jax_cost(function, arguments):
    import jax
    from jax.extend.core import Literal

    sizes, products = [], []

    def evaluate(jaxpr, constants, *values):
        """Runs a program step by step, so that a loop's turns can be counted."""
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *values), strict=True))

        def read(v):
            return v.val if isinstance(v, Literal) else known[v]

        for step in jaxpr.eqns:
            inputs, params = [read(v) for v in step.invars], step.params
            inner = params.get("jaxpr") or params.get("call_jaxpr") or params.get("call")
            if step.primitive.name == "keras_moe_derivative":
                inner = jax.make_jaxpr(params["map"])(*inputs)
            if step.primitive.name == "while":
                outputs = repeat(params, inputs)
            elif inner is not None and step.primitive.name != "scan":
                closed = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
                outputs = evaluate(*closed, *inputs)
            else:
                outputs = step.primitive.bind(*inputs, **params)
                outputs = outputs if step.primitive.multiple_results else [outputs]
            if step.primitive.name == "dot_general":
                (contracted, _), _ = params["dimension_numbers"]
                shape = inputs[0].shape
                products.append(outputs[0].size * math.prod(shape[i] for i in contracted))
            sizes.extend(made.size for made in outputs)
            known.update(zip(step.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def repeat(params, inputs):
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        ask, work, carried = inputs[: split[0]], inputs[split[0] : split[1]], inputs[split[1] :]
        condition, body = params["cond_jaxpr"], params["body_jaxpr"]
        while evaluate(condition.jaxpr, condition.consts, *ask, *carried)[0]:
            carried = evaluate(body.jaxpr, body.consts, *work, *carried)
        return carried

    program = jax.make_jaxpr(function)(*arguments)
    evaluate(program.jaxpr, program.consts, *jax.tree.leaves(arguments))
    return max(sizes), sum(products)


def _tensorflow_cost(function, arguments):
    import tensorflow as tf
    from tensorflow.python.framework import op_callbacks

    graph = tf.function(function).get_concrete_function(*arguments).graph
    largest = max(
        made.shape.num_elements() or 0 for step in graph.get_operations() for made in step.outputs
    )

    products = []

    def count(op_type, inputs, attributes, outputs, op_name=None, graph=None):
        if "MatMul" in str(op_type):
            attributes = dict(zip(attributes[::2], attributes[1::2], strict=True))
            transposed = attributes["adj_x" if "Batch" in str(op_type) else "transpose_a"]
            contracted = inputs[0].shape[-2 if transposed else -1]
            products.append(outputs[0].shape.num_elements() * contracted)

    op_callbacks.add_op_callback(count)
    try:
        function(*arguments)
    finally:
        op_callbacks.remove_op_callback(count)
    return largest, sum(products)


def _torch_cost(function, arguments):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from keras_moe.ops import torch_only

    sizes, products = [], []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation.namespace == "keras_moe":  # what it does inside is what counts
                with self:
                    return getattr(torch_only, operation._opname)._init_fn(*args, **kwargs)
            result = operation(*args, **(kwargs or {}))
            if operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
                products.append(result.numel() * args[0].shape[-1])
            if operation.overloadpacket is torch.ops.aten._grouped_mm:
                rows = int(kwargs["offs"][-1] if kwargs else args[2][-1])
                (*_, dim), (*_, hidden) = args[0].shape, args[1].shape
                contracted = dim if args[1].ndim == 3 else len(args[0])
                products.append(rows * contracted * hidden)
            for made in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(made, torch.Tensor):
                    sizes.append(made.untyped_storage().nbytes() // made.element_size())
            return result

    with Recorder():
        function(*arguments)
    return max(sizes), sum(products)


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


def stateless(function):
    """The function without what it would write into variables; JAX compiles it as a whole."""

    def call(*arguments):
        with keras.StatelessScope():
            return function(*arguments)

    return compiled(call) if keras.backend.backend() == "jax" else call


def outputs(model, x):
    """What a model makes of a batch, not in training.

    JAX compiles it as a whole; in a plain call it would compile every operation by itself, and a
    loop again in every call.
    """
    if keras.backend.backend() == "jax":
        state = [
            [variable.value for variable in variables]
            for variables in (model.trainable_variables, model.non_trainable_variables)
        ]
        y, others = compiled(functools.partial(model.stateless_call, training=False))(*state, x)
        for variable, value in zip(model.non_trainable_variables, others, strict=True):
            variable.assign(value)
    else:
        y = model(x, training=False)
    return ops.convert_to_numpy(y)


def numpy(tensor):
    """A tensor, or a tuple of tensors, as NumPy arrays; `None` stays."""
    if isinstance(tensor, tuple):
        values = [numpy(value) for value in tensor]
        return type(tensor)(*values) if hasattr(tensor, "_fields") else tuple(values)
    return None if tensor is None else ops.convert_to_numpy(tensor)
