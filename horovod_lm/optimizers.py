"""Which optimizers there are, what each reads of `[optimizer]`, and what it remembers. Their
formulas stand in the backends' `optimizer`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

Shape = tuple[int, ...]
OptimizerName = Literal["adamw", "adam", "sgd", "adafactor", "lamb"]

_ADAM = ("beta1", "beta2", "epsilon")

# The keys that each one reads, beside name and learning_rate.
KEYS: Mapping[str, tuple[str, ...]] = {
    "adamw": (*_ADAM, "weight_decay"),
    "adam": _ADAM,
    "sgd": ("momentum", "weight_decay"),
    "adafactor": ("weight_decay",),
    "lamb": (*_ADAM, "weight_decay"),
}


def _adam(shape: Shape) -> dict[str, Shape]:
    return {"first": shape, "second": shape}


def _sgd(shape: Shape) -> dict[str, Shape]:
    return {"first": shape}


def _adafactor(shape: Shape) -> dict[str, Shape]:
    return {"row": shape[:1], "column": shape[1:]} if len(shape) == 2 else {"second": shape}


_MOMENTS: Mapping[str, Callable[[Shape], dict[str, Shape]]] = {
    "adamw": _adam,
    "adam": _adam,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "lamb": _adam,
}


def moment_shapes(optimizer: str, shapes: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
    """What `optimizer` remembers of tensors with these `shapes` by canonical name: by moment and
    canonical name, the shape. Raises `KeyError` for an optimizer that there is not."""
    moments: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        for moment, kept in _MOMENTS[optimizer](shape).items():
            moments.setdefault(moment, {})[name] = kept
    return moments


def moment_size(optimizer: str, shapes: Mapping[str, Shape]) -> int:
    """The number of elements of all moments."""
    moments = moment_shapes(optimizer, shapes)
    return sum(math.prod(shape) for table in moments.values() for shape in table.values())
