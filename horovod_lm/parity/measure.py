"""How far two engines are apart, and how far they may be.

What is allowed follows from the unit roundoff u of a precision, the largest relative error of one
rounding. In fp32 the project promises 1e-5 for activations and 1e-4 for gradients, which is 168 u
and 1,678 u: the sums of a product have hundreds of terms, and two frameworks add them in different
orders. fp64 has the same orders of sums, so the same multiples of its own u. In the half
precisions sums are fp32 and only operands and results of products are rounded, so the length of
the sums plays no part; but results beside a boundary of rounding fall to either side, and later
layers see it: a few u; 3.7 u and 7.0 u were the most in models of 2 to 16 layers. The optimizer
works in fp32 in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from horovod_lm.backend import Precision

UNIT_ROUNDOFF: Mapping[Precision, float] = {
    "fp64": 2.0**-53,
    "fp32": 2.0**-24,
    "bf16": 2.0**-8,
    "fp16": 2.0**-11,
}


@dataclass(frozen=True)
class Tolerances:
    """The largest relative differences that are allowed in a precision. Logits and loss count as
    activations, the global norm as a gradient."""

    activation: float
    gradient: float
    update: float


_FP64 = UNIT_ROUNDOFF["fp64"] / UNIT_ROUNDOFF["fp32"]
TOLERANCES: Mapping[Precision, Tolerances] = {
    "fp64": Tolerances(1e-5 * _FP64, 1e-4 * _FP64, 1e-5 * _FP64),
    "fp32": Tolerances(1e-5, 1e-4, 1e-5),
    "bf16": Tolerances(4 * UNIT_ROUNDOFF["bf16"], 10 * UNIT_ROUNDOFF["bf16"], 1e-5),
    "fp16": Tolerances(4 * UNIT_ROUNDOFF["fp16"], 10 * UNIT_ROUNDOFF["fp16"], 1e-5),
}
# A tensor with less than this share of the whole's norm is judged against the whole: the gradient
# of a key's bias, for one, is nothing but rounding.
SMALL = 1e-6


@dataclass
class Squares:
    """Sums of squares of one place, over any number of arrays: of the reference (the fp64 result
    where there is one, else the first backend's), and of what two sides differ by."""

    reference: float = 0.0
    apart: float = 0.0
    first: float | None = None
    second: float | None = None
    fp64: float | None = None

    def add(self, arrays: Sequence[np.ndarray | None]) -> None:
        """Add one array of each side: first, second and, where they are, the first's and the
        second's in fp64 (the first that is there is the referee)."""
        first, second, *exact = arrays
        assert first is not None and second is not None
        referees = [array for array in exact if array is not None]
        reference = referees[0] if referees else first
        self.reference += _squares(reference)
        self.apart += _between(first, second)
        if referees:
            self.first = (self.first or 0.0) + _between(first, referees[0])
            self.second = (self.second or 0.0) + _between(second, referees[0])
        if len(referees) == 2:
            self.fp64 = (self.fp64 or 0.0) + _between(referees[0], referees[1])

    def relative(self, squares: float | None, whole: float | None = None) -> float | None:
        """The norm of a difference over that of the reference, or over `whole`, the norm of all
        places together, where the reference is under 1e-6 of it."""
        if squares is None:
            return None
        norm = math.sqrt(self.reference)
        if whole is not None and norm < SMALL * whole:
            norm = whole
        if squares == 0:
            return 0.0
        return math.sqrt(squares) / norm if norm else math.inf


def _squares(array: np.ndarray) -> float:
    flat = np.asarray(array, dtype=np.float64).ravel()
    return float(np.dot(flat, flat))


def _between(a: np.ndarray, b: np.ndarray) -> float:
    """inf where the shapes differ."""
    if np.shape(a) != np.shape(b):
        return math.inf
    return _squares(np.asarray(a, np.float64) - np.asarray(b, np.float64))
