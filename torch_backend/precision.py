"""Which numbers a model runs in: fp32, fp64 for tests and parity, or products in bf16, or in fp16
that rounds and overflows like fp16.

In the half precisions weights, residual stream, norms, softmax and loss stay in fp32; only the
inputs and results of matrix products are halves.
"""

from __future__ import annotations

import torch

from torch_backend.profiler import scope

# The type of products where it is not the full one, and the full one: weights, stream, sums.
HALF_TYPES = {"fp64": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FULL_TYPES = dict.fromkeys(HALF_TYPES, torch.float32) | {"fp64": torch.float64}


def cast(x: torch.Tensor, half: torch.dtype | None) -> torch.Tensor:
    """`x` in the type of products."""
    return x if half is None else x.to(half)


def full(x: torch.Tensor) -> torch.Tensor:
    """A half as fp32; anything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _affine(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ kernel + bias` of matrices in a full type, without a gradient: by oneDNN where that can
    be had, which is 8 to 12% faster than torch's own choice on CPUs, MKL."""
    if x.dtype is torch.float32 and not x.is_cuda and torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise
        return onednn(x.contiguous(), kernel.t(), bias, "none", [], "")
    return x @ kernel if bias is None else torch.addmm(bias, x, kernel)


class _Linear(torch.autograd.Function):
    """With y = x W + b: dx = dy W^T, dW = x^T dy (which MKL does faster), db = the sum of dy."""

    @staticmethod
    def forward(ctx, x, kernel, bias):
        ctx.save_for_backward(x, kernel)
        ctx.biased = bias is not None
        return _affine(x, kernel, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, kernel = ctx.saved_tensors
        d_bias = gradient.sum(0) if ctx.biased else None
        return _affine(gradient, kernel.t(), None), x.t() @ gradient, d_bias


def product(a: torch.Tensor, b: torch.Tensor, half: torch.dtype | None) -> torch.Tensor:
    """`a @ b` with inputs and result in the type of products, summed in fp32.

    CPUs without fp16 instructions are a hundred times slower in it, so there the product runs on
    fp32 copies of the halves and its result is rounded: the same numbers, and the same overflows,
    also in the backward, whose casts round the gradients.
    """
    if half is None and a.dim() == 2 and not torch.is_grad_enabled():
        return _affine(a, b, None)
    a, b = cast(a, half), cast(b, half)
    if half is torch.float16 and not a.is_cuda:
        return (a.float() @ b.float()).half()
    return a @ b


@scope("linear")
def linear(
    x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None, half: torch.dtype | None
) -> torch.Tensor:
    """`x @ kernel + bias` over the last axis: (…, in) and (in, out) give (…, out), in the type of
    products."""
    if half is None:
        flat = _Linear.apply(x.reshape(-1, x.shape[-1]), kernel, bias)
        return flat.view(*x.shape[:-1], kernel.shape[1])
    y = product(x, kernel, half)
    return y if bias is None else y + cast(bias, half)
