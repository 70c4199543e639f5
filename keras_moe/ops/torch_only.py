"""What `with_gradient` and `uniform` are on PyTorch; imported where it is the backend."""

import torch


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
