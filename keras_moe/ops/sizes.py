"""Arithmetic of sizes.

A size is an integer; or a scalar tensor, in a TensorFlow graph whose shapes are free; or a symbolic
dimension, while JAX or PyTorch export a model with a free batch size. Python must not compare
the last two.
"""

import keras
from keras import ops


def smallest(*sizes):
    """The smallest of several sizes."""
    return _one_of(min, "min", *sizes)


def largest(*sizes):
    """The largest of several sizes."""
    return _one_of(max, "max", *sizes)


def as_number(size):
    """A size as a number that tensors can be compared and combined with."""
    if isinstance(size, int) or keras.backend.backend() != "torch" or ops.is_tensor(size):
        return size
    import torch

    return torch.full((), size, dtype=torch.int32)


def _one_of(of_integers, name, first, *others):
    for other in others:
        if isinstance(first, int) and isinstance(other, int):
            first = of_integers(first, other)
        elif ops.is_tensor(first) or ops.is_tensor(other):
            first = getattr(ops, f"{name}imum")(first, other)
        elif keras.backend.backend() == "jax":
            import jax

            first = getattr(jax.core, f"{name}_dim")(first, other)
        else:
            import torch

            first = getattr(torch, f"sym_{name}")(first, other)
    return first
