"""Reverse-mode automatic differentiation over NumPy in fp64, as plain as can be: for the reference
alone, which must not stand on a framework that it judges. tests/unit/test_autograd.py holds every
operation against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Slope = Callable[[np.ndarray], np.ndarray]  # from dL/d(result) to dL/d(operand)
_erf = np.vectorize(math.erf, otypes=[np.float64])


class Tensor:
    """An fp64 array, the tensors that it was made of, and for each its slope."""

    __array_ufunc__ = None  # so that `array * tensor` comes here, too

    def __init__(self, value: Any, parents: Sequence[tuple[Tensor, Slope]] = ()) -> None:
        self.value = np.asarray(value, dtype=np.float64)
        self.parents = parents
        self.gradient: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def backward(self) -> None:
        """Add d(self)/d(tensor) to the gradient of every tensor that this number was made of."""
        assert self.shape == ()
        order: list[Tensor] = []
        seen: set[int] = set()
        waiting = [(self, False)]
        while waiting:  # parents stand before children in `order`
            tensor, done = waiting.pop()
            if done:
                order.append(tensor)
            elif id(tensor) not in seen:
                seen.add(id(tensor))
                waiting.append((tensor, True))
                waiting += [(parent, False) for parent, _ in tensor.parents]
        self.gradient = np.ones(())
        for tensor in reversed(order):
            for parent, slope in tensor.parents:
                part = slope(tensor.gradient)
                assert part.shape == parent.shape
                parent.gradient = part if parent.gradient is None else parent.gradient + part

    # Arithmetic

    def __add__(self, other: Any) -> Tensor:
        other = as_tensor(other)
        return _binary(self.value + other.value, self, lambda g: g, other, lambda g: g)

    def __mul__(self, other: Any) -> Tensor:
        other = as_tensor(other)
        a, b = self.value, other.value
        return _binary(a * b, self, lambda g: g * b, other, lambda g: g * a)

    def __truediv__(self, other: Any) -> Tensor:
        return self * as_tensor(other) ** -1.0

    def __pow__(self, exponent: float) -> Tensor:
        x = self.value
        return Tensor(x**exponent, [(self, lambda g: g * exponent * x ** (exponent - 1))])

    def __neg__(self) -> Tensor:
        return self * -1.0

    def __sub__(self, other: Any) -> Tensor:
        return self + -as_tensor(other)

    def __rsub__(self, other: Any) -> Tensor:
        return -self + other

    __radd__, __rmul__ = __add__, __mul__

    def __matmul__(self, other: Tensor) -> Tensor:
        a, b = self.value, other.value
        return _binary(
            a @ b, self, lambda g: g @ b.swapaxes(-1, -2), other, lambda g: a.swapaxes(-1, -2) @ g
        )

    # Shapes

    def __getitem__(self, index: Any) -> Tensor:
        """Any index of NumPy's; what is taken twice gets the sum of both gradients."""

        def slope(gradient: np.ndarray) -> np.ndarray:
            whole = np.zeros(self.shape)
            np.add.at(whole, index, gradient)
            return whole

        return Tensor(self.value[index], [(self, slope)])

    def reshape(self, *shape: int) -> Tensor:
        return Tensor(self.value.reshape(*shape), [(self, lambda g: g.reshape(self.shape))])

    def swapaxes(self, one: int, two: int) -> Tensor:
        return Tensor(self.value.swapaxes(one, two), [(self, lambda g: g.swapaxes(one, two))])

    def sum(self, axis: int | None = None) -> Tensor:
        """Over all axes, or over one, which stays with length 1."""
        value = self.value.sum(axis, keepdims=axis is not None)
        return Tensor(value, [(self, lambda g: np.broadcast_to(g, self.shape))])

    def mean(self, axis: int) -> Tensor:
        return self.sum(axis) / self.shape[axis]


def as_tensor(x: Any) -> Tensor:
    """`x`, as a constant if it isn't a tensor yet."""
    return x if isinstance(x, Tensor) else Tensor(x)


def _binary(value: np.ndarray, a: Tensor, slope_a: Slope, b: Tensor, slope_b: Slope) -> Tensor:
    return Tensor(
        value,
        [
            (a, lambda g: _unbroadcast(slope_a(g), a.shape)),
            (b, lambda g: _unbroadcast(slope_b(g), b.shape)),
        ],
    )


def _unbroadcast(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The sum over the axes along which an operand of `shape` was repeated."""
    gradient = gradient.sum(tuple(range(gradient.ndim - len(shape))))
    repeated = tuple(axis for axis, n in enumerate(shape) if n == 1 and gradient.shape[axis] != 1)
    return gradient.sum(repeated, keepdims=True)


def exp(x: Tensor) -> Tensor:
    value = np.exp(x.value)
    return Tensor(value, [(x, lambda g: g * value)])


def log(x: Tensor) -> Tensor:
    return Tensor(np.log(x.value), [(x, lambda g: g / x.value)])


def tanh(x: Tensor) -> Tensor:
    value = np.tanh(x.value)
    return Tensor(value, [(x, lambda g: g * (1 - value**2))])


def erf(x: Tensor) -> Tensor:
    slope = 2 / math.sqrt(math.pi) * np.exp(-(x.value**2))
    return Tensor(_erf(x.value), [(x, lambda g: g * slope)])


def relu(x: Tensor) -> Tensor:
    return where(x.value > 0, x, 0.0)


def where(keep: np.ndarray, x: Tensor, other: float) -> Tensor:
    """`x` where `keep` (which broadcasts to its shape) is true, and `other` elsewhere."""
    value = np.where(keep, x.value, other)
    return Tensor(value, [(x, lambda g: np.where(keep, g, 0.0))])


def concatenate(parts: Sequence[Tensor], axis: int) -> Tensor:
    """`axis` is negative."""
    ends = np.cumsum([part.shape[axis] for part in parts])

    def slope(end: int, length: int) -> Slope:
        index = (..., slice(end - length, end), *[slice(None)] * (-axis - 1))
        return lambda g: g[index]

    slopes = [slope(end, part.shape[axis]) for part, end in zip(parts, ends, strict=True)]
    value = np.concatenate([part.value for part in parts], axis)
    return Tensor(value, list(zip(parts, slopes, strict=True)))


def softmax(x: Tensor) -> Tensor:
    """Over the last axis."""
    weights = exp(x - x.value.max(-1, keepdims=True))
    return weights / weights.sum(-1)


def logsumexp(x: Tensor) -> Tensor:
    """Over the last axis, which goes."""
    largest = x.value.max(-1, keepdims=True)
    return (log(exp(x - largest).sum(-1)) + largest)[..., 0]
