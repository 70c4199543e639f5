"""What some functions here are on PyTorch; imported where it is the backend.

Those that look at numbers to know what to do next are operators of their own, so that the layers
that call them can be recorded.
"""

from collections.abc import Sequence

import torch
from torch import library

NAMESPACE = "keras_moe"  # of the operators, torch.ops.keras_moe
GROUPED_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
ALIGNMENT = 16  # bytes


def _operator(name):
    """A decorator: an operator of its own, which changes none of its arguments."""
    return library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())


def is_exporting():
    """Whether this runs while a program is exported, as `.pt2` or ONNX."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def is_transforming():
    """Whether this runs in a transformation of `torch.func`, such as `grad` or `vmap`."""
    return torch._C._are_functorch_transforms_active()  # PyTorch 2.13 has no public name for it


def is_mapped(x):
    """Whether a tensor stands for many, in `torch.func.vmap`."""
    functorch = torch._C._functorch  # PyTorch 2.13 has no public names for these
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


class WithGradient(torch.autograd.Function):
    """Implements `keras_moe.ops.with_gradient` on PyTorch.

    It computes the gradients of those inputs only that need one, and frees the inputs when the
    gradient is computed; `keras.ops.custom_gradient` keeps them until the next step.
    """

    @staticmethod
    def forward(forward, backward, plain, *inputs):
        return forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.gradients, ctx.plain, *inputs = inputs
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to have a gradient
            of_wanted = _of_some(ctx.plain, inputs, wanted)
            gradients = torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))[1](upstream)
        else:
            computations = ctx.gradients(upstream, *inputs)
            gradients = [computations[i]() for i in wanted]
        found = dict(zip(wanted, gradients, strict=True))
        return None, None, None, *(found.get(i) for i in range(len(inputs)))

    @staticmethod
    def jvp(ctx, *tangents):
        inputs = ctx.saved_tensors
        wanted = [i for i, tangent in enumerate(tangents[3:]) if tangent is not None]
        of_wanted = _of_some(ctx.plain, inputs, wanted)
        values, directions = zip(*((inputs[i], tangents[3 + i]) for i in wanted), strict=True)
        return torch.func.jvp(of_wanted, values, directions)[1]

    @staticmethod
    def vmap(info, in_dims, forward, backward, plain, *inputs):
        return torch.func.vmap(plain, in_dims[3:])(*inputs), 0


def _of_some(function, inputs, positions):
    """`function` of the inputs at these positions only."""

    def of_some(*values):
        found = dict(zip(positions, values, strict=True))
        return function(*(found.get(i, x) for i, x in enumerate(inputs)))

    return of_some


def largest_places(x, k):
    """The places of the `k` largest entries of the last axis; equal entries in order."""
    if torch.onnx.is_in_onnx_export():  # where equal entries stay in order
        return torch.topk(x, k, dim=-1).indices
    # One integer for number and place: above, the number's bits, which order as it does once those
    # of negative ones are flipped; below, the place, the earlier the larger.
    bits = x.detach().float().view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (bits.long() << 32) - torch.arange(x.shape[-1], device=x.device)
    return torch.topk(key, k, dim=-1).indices


def argsort(x):
    """`keras_moe.ops.argsort`."""
    if torch.onnx.is_in_onnx_export():  # which has no sort, and where equal entries stay in order
        places = torch.topk(x, x.shape[-1], dim=-1, largest=False).indices
    else:
        places = torch.argsort(x, dim=-1, stable=True)
    return places.int()


def take_rows(x_MD, index):
    """`keras_moe.ops.take_rows`, with the zeros written in place: a second copy costs as much."""
    taken = torch.nn.functional.embedding(index.clamp(max=len(x_MD) - 1), x_MD)
    past = index >= len(x_MD)
    if taken.device.type != "cpu":  # where the number of rows past the last one is not at hand
        return taken.masked_fill_(past[..., None], 0.0)
    taken.view(-1, taken.shape[-1]).index_fill_(0, past.flatten().nonzero()[:, 0], 0.0)
    return taken


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


def grouped_kernels(x_MD, kernel_EDF, start_E, end_E):
    """Rows times the kernels of their experts, by PyTorch's grouped product, for any widths."""
    _check_dtype(x_MD)
    width = kernel_EDF.shape[2]
    x_MD, kernel_EDF = _padded(x_MD, 1), _padded(kernel_EDF, 2)
    return torch.nn.functional.grouped_mm(x_MD, kernel_EDF, offs=end_E)[:, :width]


def grouped_rows(x_MD, y_MF, start_E, end_E):
    """For every expert the sum over its rows of `x` times `y`, by PyTorch's grouped product."""
    _check_dtype(x_MD)
    dim, width = x_MD.shape[1], y_MF.shape[1]
    x_MD, y_MF = _padded(x_MD, 1), _padded(y_MF, 1)
    return torch.nn.functional.grouped_mm(x_MD.T, y_MF, offs=end_E)[:, :dim, :width]


def _padded(x, axes):
    """`x` with zeros up to widths whose rows PyTorch's grouped product takes, in the last axes."""
    multiple = ALIGNMENT // x.element_size()
    paddings = [-x.shape[-1 - axis] % multiple for axis in range(axes)]
    if not any(paddings):
        return x
    return torch.nn.functional.pad(x, [n for padding in paddings for n in (0, padding)])


def _check_dtype(x):
    if x.dtype not in GROUPED_DTYPES:
        raise ValueError(
            "`implementation='grouped'` must be used with float32, bfloat16 or float16 on PyTorch. "
            f"Received: {x.dtype}; use 'auto' or 'loop'"
        )


def exports_grouped_products(*tensors):
    """Whether a program is exported that can hold PyTorch's grouped product of these tensors."""
    return is_exporting() and not torch.onnx.is_in_onnx_export() and is_aligned(*tensors)


def is_aligned(*tensors):
    """Whether PyTorch's grouped product takes them: their rows are multiples of 16 bytes."""
    return all(
        t.dtype in GROUPED_DTYPES and dim * t.element_size() % ALIGNMENT == 0
        for t in tensors
        for dim in t.shape[1:]
    )


def _by_expert(spans, slots):
    """Every expert and its span of slots."""
    pairs = enumerate(torch.stack(tuple(spans), dim=1).tolist())
    return [(expert, first * slots, last * slots) for expert, (first, last) in pairs]
