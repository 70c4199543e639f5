"""Functions with a gradient of their own."""

import keras
from keras import ops


def with_gradient(forward, backward):
    """A function of one or more tensors that is differentiated by another.

    PyTorch computes the gradients of those inputs alone that want one, and lets go of the inputs
    where the gradient is done; `keras.ops.custom_gradient` keeps them until the next step.

    Args:
        forward: function of the inputs.
        backward: function of the gradient of the output and of the inputs; returns, for every
            input, a function without arguments that computes its gradient.

    Returns:
        The function `forward` with that gradient.
    """
    if keras.backend.backend() == "torch":
        from keras_moe.ops.torch_only import WithGradient

        return lambda *inputs: WithGradient.apply(forward, backward, *inputs)

    @ops.custom_gradient
    def function(*inputs):
        def gradient(upstream):
            return [compute() for compute in backward(upstream, *inputs)]

        return forward(*inputs), gradient

    return function
