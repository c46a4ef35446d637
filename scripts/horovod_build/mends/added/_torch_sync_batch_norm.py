"""Batch normalization over the batches of all ranks, on any device."""

from __future__ import annotations

import torch
from horovod.torch.mpi_ops import Sum, allgather_async, allreduce_async, synchronize
from torch.autograd.function import once_differentiable


class SyncBatchNormFunction(torch.autograd.Function):
    """Normalizes dimension 1 by the mean and variance over all elements of all ranks.

    Each rank's count, mean and sum of squared deviations are gathered and put together in float64,
    in the same order on every rank. Statistics are taken in float32 (float64 for an input of that),
    the output has the input's type. The gradients of weight and bias are those of this rank's part,
    as everywhere in distributed training.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, running_mean, running_var, eps, momentum):
        kind = torch.promote_types(input.dtype, torch.float32)
        x, axes = input.to(kind), [i for i in range(input.dim()) if i != 1]
        count = input.numel() // input.size(1)
        mean = x.sum(axes) / max(count, 1)
        squares = (x - _along(mean, x)).square().sum(axes)
        mine = torch.cat([mean.new_full((1,), count, dtype=torch.float64), mean, squares])
        # (rank, count and means and squares)
        handle = allgather_async(mine.double().unsqueeze(0), name="sync_batch_norm.moments")
        counts, means, squares = synchronize(handle).split([1, input.size(1), input.size(1)], dim=1)
        total = int(counts.sum())
        if total < 2:
            raise ValueError(
                "Expected more than 1 value per channel over all ranks when training, got "
                f"{total} in all; this rank's input has the size {tuple(input.size())}"
            )
        mean = (counts * means).sum(0) / total
        squares = (squares + counts * (means - mean).square()).sum(0)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            running_var.lerp_((squares / (total - 1)).to(running_var.dtype), momentum)
        invstd = (squares / total + eps).rsqrt().to(kind)
        mean = mean.to(kind)
        ctx.save_for_backward(input, weight, mean, invstd)
        ctx.total = total
        normal = (x - _along(mean, x)) * _along(invstd, x)
        if weight is not None:
            normal = normal * _along(weight.to(kind), x)
        if bias is not None:
            normal = normal + _along(bias.to(kind), x)
        return normal.to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        input, weight, mean, invstd = ctx.saved_tensors
        x, grad = input.to(mean.dtype), grad_output.to(mean.dtype)
        axes = [i for i in range(x.dim()) if i != 1]
        normal = (x - _along(mean, x)) * _along(invstd, x)
        of_bias, of_weight = grad.sum(axes), (grad * normal).sum(axes)
        grad_input = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([of_bias, of_weight]).double()
            handle = allreduce_async(sums, op=Sum, name="sync_batch_norm.gradients")
            means = (synchronize(handle) / ctx.total).to(mean.dtype)
            grad_input = grad - _along(means[0], x) - normal * _along(means[1], x)
            factor = invstd if weight is None else invstd * weight.to(mean.dtype)
            grad_input = (grad_input * _along(factor, x)).to(input.dtype)
        if weight is None or not ctx.needs_input_grad[1]:
            of_weight = None
        if weight is None or not ctx.needs_input_grad[2]:
            of_bias = None
        return (
            grad_input,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(weight.dtype),
            *[None] * 4,
        )


def _along(of_channels, x):
    """A vector over the channels, shaped to be broadcast along dimension 1 of `x`."""
    return of_channels.reshape([1, -1, *[1] * (x.dim() - 2)])
