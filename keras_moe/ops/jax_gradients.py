"""Custom gradients on JAX that every transformation can pass.

`jax.custom_vjp` refuses forward mode, and JAX cannot reverse a loop whose number of steps is known
only at run time. So the two directions of a derivative are one primitive here:

    push: tangents of the inputs -> tangent of the output
    pull: gradient of the output -> gradients of the inputs

The two are each other's transpose. Reverse mode turns `push` into `pull`, and `pull` calls the
`backward` that was given. All other derivatives, and all that `jax.vmap` maps, are computed by
`plain`: in a mapped loop every step would copy the whole result.
"""

import dataclasses
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def with_gradient(forward, backward, plain):
    """Implements `keras_moe.ops.with_gradient` on JAX."""

    @jax.custom_batching.custom_vmap
    def mappable(*inputs):
        return forward(*inputs)

    @mappable.def_vmap
    def _(size, is_mapped, *inputs):
        return jax.vmap(plain, [0 if mapped else None for mapped in is_mapped])(*inputs), True

    @jax.custom_jvp
    def function(*inputs):
        return mappable(*inputs)

    def derivative(inputs, tangents):
        wanted = tuple(i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero))
        push = Push(backward, plain, wanted)
        (tangent,) = derivative_p.bind(*(tangents[i] for i in wanted), *inputs, map=push)
        return function(*inputs), tangent

    function.defjvp(derivative, symbolic_zeros=True)
    return function


@dataclasses.dataclass(frozen=True)
class Push:
    """Maps the tangents of the `wanted` inputs to the tangent of the output."""

    backward: Any
    plain: Any
    wanted: tuple  # positions among the inputs

    @property
    def num_linear(self):
        return len(self.wanted)

    @property
    def transposed(self):
        return Pull(self.backward, self.plain, self.wanted)

    def __call__(self, *arguments):
        tangents, inputs = arguments[: self.num_linear], arguments[self.num_linear :]
        return [_derivative(self.plain, inputs, dict(zip(self.wanted, tangents, strict=True)))]

    by_plain = __call__


@dataclasses.dataclass(frozen=True)
class Pull:
    """Maps the gradient of the output to the gradients of the `wanted` inputs."""

    backward: Any
    plain: Any
    wanted: tuple

    num_linear = 1

    @property
    def transposed(self):
        return Push(self.backward, self.plain, self.wanted)

    def __call__(self, upstream, *inputs):
        gradients = self.backward(upstream, *inputs)
        return [gradients[i]() for i in self.wanted]

    def by_plain(self, upstream, *inputs):
        def of_wanted(*values):
            return self.plain(*_replaced(inputs, dict(zip(self.wanted, values, strict=True))))

        return jax.vjp(of_wanted, *(inputs[i] for i in self.wanted))[1](upstream)


@dataclasses.dataclass(frozen=True)
class Mapped:
    """One of the two above, for every entry of the first axis of its linear arguments."""

    map: Any
    axes: tuple  # of the other arguments; `None`: the same for every entry

    @property
    def num_linear(self):
        return self.map.num_linear

    @property
    def transposed(self):
        return Mapped(self.map.transposed, self.axes)

    def __call__(self, *arguments):
        axes = (*[0] * self.num_linear, *self.axes)
        return jax.vmap(lambda *one: list(self.map.by_plain(*one)), axes)(*arguments)

    by_plain = __call__


def _derivative(function, inputs, tangents):
    """The derivative of `function` in the direction of the tangents, given by position."""

    def of_some(*values):
        return function(*_replaced(inputs, dict(zip(tangents, values, strict=True))))

    return jax.jvp(of_some, [inputs[i] for i in tangents], list(tangents.values()))[1]


def _replaced(inputs, values):
    return [values.get(i, x) for i, x in enumerate(inputs)]


derivative_p = Primitive("keras_moe_derivative")
derivative_p.multiple_results = True


@derivative_p.def_impl
def _compute(*arguments, map):
    return map(*jax.tree.map(jax.numpy.asarray, arguments))


@derivative_p.def_abstract_eval
def _shapes(*arguments, map):
    results = jax.eval_shape(map, *arguments)
    return [jax.core.ShapedArray(result.shape, result.dtype) for result in results]


def _jvp(arguments, tangents, *, map):
    n = map.num_linear
    results, totals = derivative_p.bind(*arguments, map=map), []
    if any(type(t) is not ad.Zero for t in tangents[:n]):
        linear = [ad.instantiate_zeros(t) for t in tangents[:n]]
        totals.append(derivative_p.bind(*linear, *arguments[n:], map=map))
    others = {i: t for i, t in enumerate(tangents) if i >= n and type(t) is not ad.Zero}
    if others:
        totals.append(_derivative(map.by_plain, arguments, others))
    return results, [sum(parts[1:], parts[0]) for parts in zip(*totals, strict=True)]


def _transpose(upstreams, *arguments, map):
    n = map.num_linear
    upstreams = [ad.instantiate_zeros(upstream) for upstream in upstreams]
    gradients = derivative_p.bind(*upstreams, *arguments[n:], map=map.transposed)
    return [*gradients, *[None] * (len(arguments) - n)]


def _batch(arguments, axes, *, map):
    n = map.num_linear
    size = next(x.shape[a] for x, a in zip(arguments, axes, strict=True) if a is not None)

    def first(x, axis):
        if axis is None:
            return jax.numpy.broadcast_to(x, (size, *x.shape))
        return jax.numpy.moveaxis(x, axis, 0)

    linear = [first(x, axis) for x, axis in zip(arguments[:n], axes[:n], strict=True)]
    mapped = Mapped(map, tuple(axes[n:]))
    results = derivative_p.bind(*linear, *arguments[n:], map=mapped)
    return results, [0] * len(results)


ad.primitive_jvps[derivative_p] = _jvp
ad.primitive_transposes[derivative_p] = _transpose
batching.primitive_batchers[derivative_p] = _batch
mlir.register_lowering(derivative_p, mlir.lower_fun(_compute, multiple_results=True))
