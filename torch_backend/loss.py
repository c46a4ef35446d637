"""The output layer and its loss in one, some rows at a time: all logits never exist at once."""

from __future__ import annotations

import torch

from horovod_lm.activations import record
from torch_backend.precision import cast, full, multiply, operand
from torch_backend.profiler import scope

ROWS = 512  # measured best on CPUs: a chunk's logits stay in the cache


class _HeadLoss(torch.autograd.Function):
    """With z = h W, p = softmax(z) and c the rows' coefficients: L = sum c (logsumexp(z) - z_y),
    dz = c (p - onehot(y)), dh = dz W^T, dW = h^T dz. Gradients are made in the forward, while the
    chunk's logits are at hand, and handed out in the backward."""

    @staticmethod
    def forward(ctx, hidden, kernel, targets, weights, coefficients, half, need):
        sums = torch.zeros(2, dtype=weights.dtype, device=hidden.device)
        hidden, kernel = operand(hidden, half), operand(kernel, half)
        d_hidden = torch.empty_like(hidden, dtype=weights.dtype) if need else None
        d_kernel = torch.zeros_like(kernel, dtype=weights.dtype) if need else None
        # In the layout of the kernel's own memory, which is transposed where it is tied.
        tied = not kernel.is_contiguous()
        d_table = d_kernel.t() if need and tied else d_kernel
        for start in range(0, hidden.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            z = full(multiply(hidden[rows], kernel, half))
            record("logits", z)
            z -= z.amax(-1, keepdim=True)
            picked = z.gather(-1, targets[rows, None])[:, 0]
            total = z.exp_().sum(-1)
            nll = total.log() - picked
            c = coefficients[rows]
            sums[0] += (weights[rows] * nll).sum()
            sums[1] += (c * nll).sum()
            if need:
                z *= (c / total)[:, None]
                z.scatter_add_(-1, targets[rows, None], -c[:, None])
                z = operand(z, half)
                d_hidden[rows] = multiply(z, kernel.t(), half)
                left, right = (z.t(), hidden[rows]) if tied else (hidden[rows].t(), z)
                if half is None:
                    d_table.addmm_(left, right)
                else:
                    d_table.add_(cast(left @ right, half))
        ctx.gradients = d_hidden, d_kernel
        ctx.mark_non_differentiable(nll_sum := sums[0].clone())
        return sums[1].clone(), nll_sum

    @staticmethod
    def backward(ctx, gradient, _):
        # In place: they are this function's own, and nobody asks for them twice.
        d_hidden, d_kernel = (x.mul_(gradient) for x in ctx.gradients)
        return d_hidden, d_kernel, None, None, None, None, None


@scope("loss")
def head_loss(
    hidden_ND: torch.Tensor,
    kernel_DV: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    coefficients_N: torch.Tensor,
    half: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sums over the rows of their negative log-likelihood in nats: times `coefficients` (the
    differentiable one), and times `weights`. `targets` are int64."""
    need = torch.is_grad_enabled()
    return _HeadLoss.apply(hidden_ND, kernel_DV, targets_N, weights_N, coefficients_N, half, need)
