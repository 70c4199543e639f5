"""What some functions here are on PyTorch; imported where it is the backend.

Those that look at numbers to know what to do next are operators of their own, so that the layers
that call them can be recorded.
"""

from collections.abc import Sequence

import torch
from torch import library

NAMESPACE = "keras_moe"  # of the operators, torch.ops.keras_moe


def _operator(name):
    """A decorator: an operator of its own, which changes none of its arguments."""
    return library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())


class WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, *inputs):
        ctx.gradients = backward
        ctx.save_for_backward(*inputs)
        return forward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        gradients = ctx.gradients(upstream, *ctx.saved_tensors)
        wanted = ctx.needs_input_grad[2:]
        computed = (g() if w else None for g, w in zip(gradients, wanted, strict=True))
        return None, None, *computed


@torch.compiler.disable
def uniform(shape, minval, maxval, seed):
    """Float32 noise on the seed's device, which is "meta" where Keras asks for the shape alone."""
    noise = torch.empty(tuple(shape), device=seed.device)
    if noise.is_meta:
        return noise
    first, count = seed.tolist()
    mixed = (first * 0x9E3779B1 + count) & 0xFFFFFFFF  # seeds 1, 2, ... must not share numbers
    generator = torch.Generator(seed.device).manual_seed(mixed)
    return noise.uniform_(minval, maxval, generator=generator)


@_operator("times_kernel")
def times_kernel(
    x_RCD: torch.Tensor,
    kernel_EDF: torch.Tensor,
    spans: Sequence[torch.Tensor],
    transposed: bool = False,
) -> torch.Tensor:
    """Every row of slots times its expert's kernel."""
    rows, slots, dim = x_RCD.shape
    kernel_EDF = kernel_EDF.mT if transposed else kernel_EDF
    x_MD = x_RCD.reshape(-1, dim)
    end = int(spans[1][-1]) * slots
    if len(x_MD) >= len(kernel_EDF) and is_aligned(kernel_EDF):
        # On a CPU the same loop in C++, which stops at every expert, busy or not.
        y_MF = torch.nn.functional.grouped_mm(x_MD, kernel_EDF, offs=spans[1] * slots)
    else:
        y_MF = x_MD.new_empty((len(x_MD), kernel_EDF.shape[2]))
        for expert, first, last in _by_expert(spans, slots):
            if first < last:
                torch.mm(x_MD[first:last], kernel_EDF[expert], out=y_MF[first:last])
    y_MF[end:] = 0.0  # nobody's
    return y_MF.reshape(rows, slots, -1)


@times_kernel.register_fake
def _(x_RCD, kernel_EDF, spans, transposed=False):
    return x_RCD.new_empty((*x_RCD.shape[:2], kernel_EDF.shape[1 if transposed else 2]))


@_operator("times_rows")
def times_rows(
    x_RCD: torch.Tensor, y_RCF: torch.Tensor, spans: Sequence[torch.Tensor]
) -> torch.Tensor:
    """For every expert the sum over its slots of `x` times `y`, `[experts, in, out]`."""
    _, slots, dim = x_RCD.shape
    x_MD, y_MF = x_RCD.reshape(-1, dim), y_RCF.reshape(-1, y_RCF.shape[2])
    if is_aligned(x_MD, y_MF):
        return torch.nn.functional.grouped_mm(x_MD.T, y_MF, offs=spans[1] * slots)
    result_EDF = x_MD.new_empty((len(spans[0]), dim, y_MF.shape[1]))
    for expert, first, last in _by_expert(spans, slots):
        torch.mm(x_MD[first:last].T, y_MF[first:last], out=result_EDF[expert])
    return result_EDF


@times_rows.register_fake
def _(x_RCD, y_RCF, spans):
    return x_RCD.new_empty((len(spans[0]), x_RCD.shape[2], y_RCF.shape[2]))


def is_aligned(*tensors):
    """Whether PyTorch's grouped product takes them: their rows are multiples of 16 bytes."""
    return all(dim * t.element_size() % 16 == 0 for t in tensors for dim in t.shape[1:])


def _by_expert(spans, slots):
    """Every expert and its span of slots."""
    pairs = enumerate(torch.stack(tuple(spans), dim=1).tolist())
    return [(expert, first * slots, last * slots) for expert, (first, last) in pairs]
