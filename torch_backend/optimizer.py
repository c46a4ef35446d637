"""The optimizers on flat buffers, and the global norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch.optim.adamw import adamw

from horovod_lm.backend import EngineSettings
from horovod_lm.optimizers import moment_shapes
from torch_backend.weights import Weights, own_name

_PART = 2**16  # elements of one dot product in fp32; the rounding of more would show


def global_norm(weights: Weights) -> float:
    """L2 norm of the whole gradient: the square root of fp64-added sums of squares of parts of
    each tensor. (Over 8 million elements at once a dot product in fp32 is off by 3e-5.) inf or nan
    exactly where an element of the gradient is."""
    gradients = weights.gradients[: weights.size]
    parts = [part for view in weights.views(gradients) for part in view.split(_PART)]
    squares = torch.stack([torch.dot(part, part) for part in parts])
    total = squares.double().sum().item()
    if not math.isfinite(total):  # the elements may be finite and only their squares too large
        total = gradients.double().square().sum().item()
    return math.sqrt(total) if total >= 0 else math.nan


def _root_mean_square(block: torch.Tensor) -> torch.Tensor:
    """Of each part of a block (rows, parts, columns), as (parts,) fp64."""
    squares = torch.linalg.vector_norm(block, dim=2).double().square()
    return (squares.mean(0) / block.shape[2]).sqrt()


class Optimizer:
    """What all optimizers share: by default each moment is a flat buffer like the weights.

    In the formulas g is the gradient, w the weights, lr the learning rate, t the update's number
    from 1; decay is 0 for parameters without weight decay. All decay is decoupled (Loshchilov and
    Hutter, 2019): it enters no moment. Corrections that depend on t come from the host in fp64.
    """

    moment_names: tuple[str, ...] = ("first", "second")

    def __init__(self, weights: Weights, settings: EngineSettings) -> None:
        self.weights, self.settings = weights, settings
        self.moments = {name: torch.zeros_like(weights.values) for name in self.moment_names}

    def step(self, learning_rate: float, update: int) -> None:
        """Apply update number `update` (from 1) to the weights, in place."""
        raise NotImplementedError

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Copies of the moments, by moment and canonical name."""
        return {name: self.weights.read(moment) for name, moment in self.moments.items()}

    def load_state(self, moments: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Take over moments; none at all: they are 0."""
        assert not moments or moments.keys() == self.moments.keys(), list(moments)
        for name, moment in self.moments.items():
            if moments:
                self.weights.write(moment, moments[name])
            else:
                moment.zero_()


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, 2019):
    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
    w = w - lr decay w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon).

    torch's own AdamW equals this formula, so it does the work, on two flat parameters: with and
    without weight decay.
    """

    def step(self, learning_rate: float, update: int) -> None:
        """Apply update number `update` (from 1) to the weights, in place."""
        self._adam.step(learning_rate, update)

    @cached_property
    def _adam(self) -> _TorchAdamW:
        weights = self.weights
        decays = [
            (slice(0, weights.decayed), self.settings.weight_decay),
            (slice(weights.decayed, weights.size), 0.0),
        ]
        return _TorchAdamW(weights.values, weights.gradients, self.moments, decays, self.settings)


class Adam(AdamW):
    """Adam (Kingma and Ba, 2015): AdamW without weight decay."""

    def __init__(self, weights: Weights, settings: EngineSettings) -> None:
        super().__init__(weights, replace(settings, weight_decay=0.0))


class SGD(Optimizer):
    """Stochastic gradient descent with momentum (Polyak, 1964; Sutskever et al., 2013):
    m = momentum m + g, w = w - lr decay w - lr m.

    The learning rate is not in m, so that a schedule acts at once. Not torch's SGD, which adds
    decay w to g.
    """

    moment_names = ("first",)

    def step(self, learning_rate: float, update: int) -> None:
        """Apply update number `update` (from 1) to the weights, in place."""
        weights, first = self.weights, self.moments["first"]
        gradients = weights.gradients[: weights.size]
        torch.add(gradients, first, alpha=self.settings.momentum, out=first)
        weights.values[: weights.decayed].mul_(1 - learning_rate * self.settings.weight_decay)
        weights.values.add_(first, alpha=-learning_rate)


class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern, 2018, algorithms 4 to 6) without a first moment, with the
    learning rate for their relative step size: for a matrix, with s = 1 - t^-0.8,
    R = s R + (1 - s) mean over columns of (g^2 + 1e-30),
    C = s C + (1 - s) mean over rows of (g^2 + 1e-30),
    u = g / sqrt(R C / mean(R)),
    w = w - lr decay w - lr max(1e-3, rms(w)) u / max(1, rms(u)),
    and for a vector V = s V + (1 - s) (g^2 + 1e-30) with u = g / sqrt(V).

    Each canonical parameter is factored by itself, so query, key and value are three matrices. As
    steps are relative to the weights' size, learning rates are about ten times AdamW's.
    """

    def __init__(self, weights: Weights, settings: EngineSettings) -> None:
        self.weights, self.settings = weights, settings
        shapes = {p.name: p.shape for p in weights.spec.parameters}
        # By own name, the moments of the canonical parameters in it as rows: (parts, elements).
        self.moments: dict[str, dict[str, torch.Tensor]] = {}
        for moment, table in moment_shapes("adafactor", shapes).items():
            own = {own_name(weights.spec, name)[0]: shape for name, shape in table.items()}
            self.moments[moment] = {
                name: weights.values.new_zeros(block[1], *own[name])
                for name, block in zip(weights.names, weights.blocks, strict=True)
                if name in own
            }
        largest = max(math.prod(block) for block in weights.blocks)
        self._scratch = weights.values.new_empty(largest)  # a fresh one each time costs more

    def step(self, learning_rate: float, update: int) -> None:
        """Apply update number `update` (from 1) to the weights, in place."""
        weights, newest = self.weights, update**-0.8
        own = zip(
            weights.names,
            weights.blocks,
            weights.decays,
            weights.views(weights.values),
            weights.views(weights.gradients),
            strict=True,
        )
        for name, block, decays, value, gradient in own:
            value, gradient = value.view(block), gradient.view(block)
            direction = self._direction(name, gradient, newest)
            rate = learning_rate * _root_mean_square(value).clamp(min=1e-3)
            rate /= _root_mean_square(direction).clamp(min=1)
            if decays:
                value.mul_(1 - learning_rate * self.settings.weight_decay)
            value.sub_(direction.mul_(rate.to(value.dtype)[:, None]))

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Copies of the moments, by moment and canonical name."""
        return {
            moment: {canonical: np.array(view.cpu().numpy()) for canonical, view in table.items()}
            for moment, table in self._views().items()
        }

    def load_state(self, moments: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Take over moments; none at all: they are 0."""
        assert not moments or moments.keys() == self.moments.keys(), list(moments)
        for moment, table in self._views().items():
            for canonical, view in table.items():
                if moments:
                    view.copy_(torch.from_numpy(np.ascontiguousarray(moments[moment][canonical])))
                else:
                    view.zero_()

    def _direction(self, name: str, gradient: torch.Tensor, newest: float) -> torch.Tensor:
        """u, as (rows, parts, columns), after the moments took in the gradient."""
        scratch = self._scratch[: gradient.numel()].view(gradient.shape)
        squares = torch.mul(gradient, gradient, out=scratch).add_(1e-30)
        if name in self.moments["second"]:
            second = self.moments["second"][name].lerp_(squares[0], newest)
            return torch.mul(gradient, second.rsqrt(), out=scratch)
        row = self.moments["row"][name].lerp_(squares.mean(2).T, newest)
        column = self.moments["column"][name].lerp_(squares.mean(0), newest)
        factor = (row / row.mean(1, keepdim=True)).rsqrt().T
        return torch.mul(gradient, factor[:, :, None], out=scratch).mul_(column.rsqrt())

    def _views(self) -> dict[str, dict[str, torch.Tensor]]:
        """The moments by moment and canonical name, as views."""
        views: dict[str, dict[str, torch.Tensor]] = {moment: {} for moment in self.moments}
        for parameter in self.weights.spec.parameters:
            name, part = own_name(self.weights.spec, parameter.name)
            for moment, table in self.moments.items():
                if name in table:
                    views[moment][parameter.name] = table[name][part or 0]
        return views


class Lamb(Optimizer):
    """LAMB (You et al., 2020, algorithm 2): with m and v as in AdamW,
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon) + decay w,
    w = w - lr u |w| / |u|, with norms of each canonical parameter (so of query, key and value
    apart).

    The ratio is 1 where |w| or |u| is 0, and, as in the authors' code, for parameters without
    weight decay. torch's AdamW makes the step of rate 1 from 0, which is u without its decay.
    """

    def step(self, learning_rate: float, update: int) -> None:
        """Apply update number `update` (from 1) to the weights, in place."""
        weights, step = self.weights, self._adam.values.zero_()
        self._adam.step(1.0, update)
        decayed = slice(0, weights.decayed)
        step[decayed].add_(weights.values[decayed], alpha=-self.settings.weight_decay)
        own = zip(
            weights.blocks, weights.decays, weights.views(weights.values), weights.views(step),
            strict=True,
        )  # fmt: skip
        for block, decays, value, part in own:
            if decays:
                value, part = value.view(block), part.view(block)
                norm, length = _root_mean_square(value), _root_mean_square(part)
                ratio = torch.where((norm > 0) & (length > 0), norm / length, 1.0)
                part.mul_(ratio.to(value.dtype)[:, None])
        weights.values.add_(step, alpha=learning_rate)

    @cached_property
    def _adam(self) -> _TorchAdamW:
        weights = self.weights
        step, decays = torch.zeros_like(weights.values), [(slice(0, weights.size), 0.0)]
        return _TorchAdamW(step, weights.gradients, self.moments, decays, self.settings)


class _TorchAdamW:
    """torch's own AdamW on slices of flat buffers, each with a weight decay.

    Its function, not its class, which imports torch's compiler: a second at every start.
    """

    def __init__(self, values, gradients, moments, decays, settings) -> None:
        self.values, self.settings = values, settings
        self._step = torch.zeros((), dtype=torch.float32, device=values.device)
        buffers = (values, gradients, moments["first"], moments["second"])
        self._groups = [([[b[part]] for b in buffers], decay) for part, decay in decays]

    def step(self, learning_rate: float, update: int) -> None:
        for buffers, decay in self._groups:
            self._step.fill_(update - 1)
            adamw(
                *buffers,
                [],
                [self._step],
                fused=True,
                amsgrad=False,
                beta1=self.settings.beta1,
                beta2=self.settings.beta2,
                lr=learning_rate,
                weight_decay=decay,
                eps=self.settings.epsilon,
                maximize=False,
            )


OPTIMIZERS: Mapping[str, type[Optimizer]] = {
    "adamw": AdamW,
    "adam": Adam,
    "sgd": SGD,
    "adafactor": Adafactor,
    "lamb": Lamb,
}
