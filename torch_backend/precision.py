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
_ONEDNN_TYPES = (torch.float32, torch.bfloat16)


def cast(x: torch.Tensor, half: torch.dtype | None) -> torch.Tensor:
    """`x` in the type of products."""
    return x if half is None else x.to(half)


def full(x: torch.Tensor) -> torch.Tensor:
    """A half as fp32; anything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def operand(x: torch.Tensor, half: torch.dtype | None) -> torch.Tensor:
    """`x` as products take it: rounded to the type of products.

    CPUs without fp16 instructions are a hundred times slower in it, so there it is an fp32 copy of
    the rounded numbers: the products are the same, and so are their overflows, once rounded.
    """
    x = cast(x, half)
    return x.float() if half is torch.float16 and not x.is_cuda else x


def _affine(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`a @ b + bias` of operands that are matrices, without a gradient: by oneDNN where that can be
    had, which is 8 to 12% faster in fp32 than torch's own choice on CPUs, MKL."""
    if a.dtype in _ONEDNN_TYPES and not a.is_cuda and torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise
        return onednn(a.contiguous(), b.t(), bias, "none", [], "")
    return a @ b if bias is None else torch.addmm(bias, a, b)


def multiply(a: torch.Tensor, b: torch.Tensor, half: torch.dtype | None) -> torch.Tensor:
    """`a @ b` of operands, summed in fp32, the result in the type of products."""
    plain = a.dim() != 2 or torch.is_grad_enabled()
    return cast(a @ b if plain else _affine(a, b, None), half)


def product(a: torch.Tensor, b: torch.Tensor, half: torch.dtype | None) -> torch.Tensor:
    """`a @ b` with inputs and result in the type of products."""
    return multiply(operand(a, half), operand(b, half), half)


class _Linear(torch.autograd.Function):
    """With y = x W + b: dx = dy W^T, dW = x^T dy (by MKL, which is faster there), db = the sum of
    dy over the rows."""

    @staticmethod
    def forward(ctx, x, kernel, bias, half):
        ctx.types, ctx.half, ctx.biased = (x.dtype, kernel.dtype), half, bias is not None
        x, kernel = operand(x, half), operand(kernel, half)
        ctx.save_for_backward(x, kernel)
        if half is None or bias is None:
            return cast(_affine(x, kernel, bias), half)
        return multiply(x, kernel, half).add_(cast(bias, half))  # halves are added, as in its twin

    @staticmethod
    def backward(ctx, gradient):
        x, kernel = ctx.saved_tensors
        inputs, weights = ctx.types
        d_bias = gradient.sum(0, dtype=weights) if ctx.biased else None
        gradient = operand(gradient, ctx.half)
        d_x = multiply(gradient, kernel.t(), ctx.half).to(inputs)
        d_kernel = cast(x.t() @ gradient, ctx.half).to(weights)
        return d_x, d_kernel, d_bias, None


@scope("linear")
def linear(
    x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None, half: torch.dtype | None
) -> torch.Tensor:
    """`x @ kernel + bias` over the last axis: (…, in) and (in, out) give (…, out), in the type of
    products."""
    flat = _Linear.apply(x.reshape(-1, x.shape[-1]), kernel, bias, half)
    return flat.view(*x.shape[:-1], kernel.shape[1])
