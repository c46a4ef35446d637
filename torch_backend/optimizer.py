"""The optimizer on flat buffers, and the global norm."""

from __future__ import annotations

import math

import torch

from horovod_lm.backend import EngineSettings
from torch_backend.weights import Weights


def global_norm(weights: Weights) -> float:
    """L2 norm of the whole gradient: the square root of fp64-added sums of squares of each
    tensor. (One fp32 norm over a flat buffer is off by 1e-3 at 20 million elements.) inf or nan
    exactly where an element of the gradient is."""
    gradients = weights.gradients[: weights.size]
    squares = torch.stack([torch.dot(g, g) for g in weights.views(gradients)])
    total = squares.double().sum().item()
    if not math.isfinite(total):  # the elements may be finite and only their squares too large
        total = gradients.double().square().sum().item()
    return math.sqrt(total) if total >= 0 else math.nan


class AdamW:
    """AdamW (Loshchilov and Hutter, 2019): with g the gradient and t the update's number from 1,
    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
    w = w - lr decay w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon).

    torch's own AdamW equals this formula, so it does the work, on two flat parameters: with and
    without weight decay.
    """

    def __init__(self, weights: Weights, settings: EngineSettings) -> None:
        self.moments = {
            "first": torch.zeros_like(weights.values),
            "second": torch.zeros_like(weights.values),
        }
        parts = [slice(0, weights.decayed), slice(weights.decayed, weights.size)]
        decays = [settings.weight_decay, 0.0]
        groups, self._steps = [], []
        for part, decay in zip(parts, decays, strict=True):
            flat = torch.nn.Parameter(weights.values[part])
            flat.grad = weights.gradients[part]
            groups.append({"params": [flat], "weight_decay": decay})
        self._torch = torch.optim.AdamW(
            groups,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=True,
        )
        for part, group in zip(parts, self._torch.param_groups, strict=True):
            step = torch.zeros((), dtype=torch.float32, device=weights.values.device)
            self._steps.append(step)
            self._torch.state[group["params"][0]] = {
                "step": step,
                "exp_avg": self.moments["first"][part],
                "exp_avg_sq": self.moments["second"][part],
            }

    def step(self, learning_rate: float, update: int) -> None:
        """Apply update number `update` (from 1) to the flat weights, in place."""
        for group, step in zip(self._torch.param_groups, self._steps, strict=True):
            group["lr"] = learning_rate
            step.fill_(update - 1)
        self._torch.step()
