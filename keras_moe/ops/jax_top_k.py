"""The places of the largest entries on JAX, in a form that can be exported.

`jax.lax.top_k` is the quickest way, but TensorFlow 2.21 cannot read it from a SavedModel. So
an exported program sorts. JAX tells only the lowering of a primitive that it exports.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def largest_places(x, k):
    """The places of the `k` largest entries of the last axis, int32, in descending order.

    Args:
        x: `[..., n]` tensor. Equal entries keep their order.
        k: integer or symbolic dimension, at most `n`.

    Returns:
        `[..., k]` int32 tensor, without gradient.
    """
    return largest_places_p.bind(jax.lax.stop_gradient(x), k=k)


largest_places_p = Primitive("keras_moe_largest_places")


@largest_places_p.def_impl
def _by_top_k(x, *, k):
    # Where only some of the k are used, XLA would see a slice of a sort, and sort all of x.
    return jax.lax.optimization_barrier(jax.lax.top_k(x, k)[1])


def _by_sort(x, *, k):
    place = jax.lax.broadcasted_iota("int32", x.shape, x.ndim - 1)
    return jax.lax.sort((-x, place), num_keys=1)[1][..., :k]


@largest_places_p.def_abstract_eval
def _shape(x, *, k):
    return jax.core.ShapedArray((*x.shape[:-1], k), "int32")


def _lower(ctx, x, *, k):
    exports = ctx.module_context.lowering_parameters.for_export
    return mlir.lower_fun(_by_sort if exports else _by_top_k, multiple_results=False)(ctx, x, k=k)


def _batch(arguments, axes, *, k):
    (x,), (axis,) = arguments, axes
    return largest_places_p.bind(jax.numpy.moveaxis(x, axis, 0), k=k), 0


mlir.register_lowering(largest_places_p, _lower)
batching.primitive_batchers[largest_places_p] = _batch
