"""The output layer and its loss in one, some rows at a time: all logits never exist at once."""

from __future__ import annotations

import torch

from horovod_lm.activations import record
from torch_backend.precision import cast, full, multiply, operand
from torch_backend.profiler import scope

ROWS = 512  # measured best on CPUs: a chunk's logits stay in the cache


class _HeadLoss(torch.autograd.Function):
    """With z = h W + b, p = softmax(z), s = logsumexp(z), c the rows' coefficients, e the smoothing
    and f the factor of the z-loss: L = sum c (s - (1 - e) z_y - e mean(z) + f s^2),
    dz = c ((1 + 2 f s) p - (1 - e) onehot(y) - e / V), dh = dz W^T, dW = h^T dz, db = sum dz.
    Gradients are made in the forward, while the chunk's logits are at hand, and handed out in the
    backward."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        kernel,
        bias,
        targets,
        weights,
        coefficients,
        smoothing,
        z_loss,
        half,
        site,
        need,
    ):
        sums = torch.zeros(3, dtype=weights.dtype, device=hidden.device)
        hidden, kernel = operand(hidden, half), operand(kernel, half)
        d_hidden = torch.empty_like(hidden, dtype=weights.dtype) if need else None
        d_kernel = torch.zeros_like(kernel, dtype=weights.dtype) if need else None
        d_bias = torch.zeros_like(bias) if need and bias is not None else None
        # In the layout of the kernel's own memory, which is transposed where it is tied.
        tied = not kernel.is_contiguous()
        d_table = d_kernel.t() if need and tied else d_kernel
        for start in range(0, hidden.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            z = full(multiply(hidden[rows], kernel, half))
            if bias is not None:
                z += bias
            record(site, z)
            largest = z.amax(-1, keepdim=True)
            z -= largest
            picked = z.gather(-1, targets[rows, None])[:, 0]
            if not need:  # a pass over the logits that only evaluation asks for
                sums[2] += (weights[rows] * (picked == 0) / (z == 0).sum(-1)).sum()
            mean = z.mean(-1) if smoothing else None
            total = z.exp_().sum(-1)
            log = total.log()
            nll = log - picked
            sums[0] += (weights[rows] * nll).sum()
            c = factor = coefficients[rows]
            loss = nll
            if smoothing:
                loss = log - (1 - smoothing) * picked - smoothing * mean
            if z_loss:
                normaliser = log + largest[:, 0]
                loss = loss + z_loss * normaliser.square()
                factor = c * (1 + 2 * z_loss * normaliser)
            sums[1] += (c * loss).sum()
            if need:
                z *= (factor / total)[:, None]
                z.scatter_add_(-1, targets[rows, None], (c * (smoothing - 1))[:, None])
                if smoothing:
                    z -= (c * (smoothing / z.shape[1]))[:, None]
                if d_bias is not None:
                    d_bias += z.sum(0)
                z = operand(z, half)
                d_hidden[rows] = multiply(z, kernel.t(), half)
                left, right = (z.t(), hidden[rows]) if tied else (hidden[rows].t(), z)
                if half is None:
                    d_table.addmm_(left, right)
                else:
                    d_table.add_(cast(left @ right, half))
        ctx.gradients = d_hidden, d_kernel, d_bias
        ctx.mark_non_differentiable(nll_sum := sums[0].clone(), hits := sums[2].clone())
        return sums[1].clone(), nll_sum, hits

    @staticmethod
    def backward(ctx, gradient, *_):
        # In place: they are this function's own, and nobody asks for them twice.
        return *(x if x is None else x.mul_(gradient) for x in ctx.gradients), *[None] * 8


@scope("loss")
def head_loss(
    hidden_ND: torch.Tensor,
    kernel_DV: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    coefficients_N: torch.Tensor,
    smoothing: float,
    z_loss: float,
    half: torch.dtype | None,
    site: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three sums over the rows: of the loss of `horovod_lm.backend.Loss` times `coefficients` (the
    differentiable one), of the negative log-likelihood in nats times `weights`, and the hits of
    `horovod_lm.backend.Sums`, which stay 0 where gradients are wanted. `targets` are int64; `site`
    is the logits' name in records."""
    return _HeadLoss.apply(
        hidden_ND,
        kernel_DV,
        bias_V,
        targets_N,
        weights_N,
        coefficients_N,
        smoothing,
        z_loss,
        half,
        site,
        torch.is_grad_enabled(),
    )
