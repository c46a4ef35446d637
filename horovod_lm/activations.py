"""Activations by name, recorded on their way through one forward. Without `tracing` around it
`record` does nothing. What is traced must run eagerly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_as_array: Callable[[Any], np.ndarray] | None = None  # while a forward is traced
_parts: dict[str, list[np.ndarray]] = {}


@contextmanager
def tracing(as_array: Callable[[Any], np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Gives a dictionary that holds, when the block is left, everything recorded inside, in order.
    Parts of one name follow each other in it along the first axis; rows of attention have been put
    together. `as_array` makes fp32 or fp64 of a framework's tensor."""
    global _as_array
    sites: dict[str, np.ndarray] = {}
    _as_array = as_array
    try:
        yield sites
        sites.update({name: np.concatenate(parts) for name, parts in _parts.items()})
    finally:
        _as_array = None
        _parts.clear()


def traced() -> bool:
    """Whether a forward is traced now."""
    return _as_array is not None


def record(name: str, tensor: Any, block: str | None = None) -> None:
    """Note a copy of `tensor` (or of the next part of it) as `name`, or as `BLOCK.name`, where the
    block is `decoder.0`, say."""
    if _as_array is not None:
        name = name if block is None else f"{block}.{name}"
        _parts.setdefault(name, []).append(_as_array(tensor).copy())


def record_rows(
    name: str,
    rows: Any,
    start: int,
    heads: int,
    block: str,
    factor: float = 1.0,
    seen: np.ndarray | None = None,
) -> None:
    """Note query rows from `start` of attention, (…, rows, keys) for all `heads` of a batch, times
    `factor`, as part of (B, H, L, M), which has 0 where a query may not look: at a later key, or
    where `seen` is false, which broadcasts to (…, rows, keys)."""
    if _as_array is None:
        return
    name = f"{block}.{name}"
    part = _as_array(rows) * factor
    part = np.tril(part, start) if seen is None else np.where(seen, part, 0)
    part = part.reshape(-1, heads, *part.shape[-2:])
    if start:
        (above,) = _parts[name]
        above = np.pad(above, [(0, 0)] * 3 + [(0, part.shape[3] - above.shape[3])])
        part = np.concatenate([above, part], axis=2)
    _parts[name] = [part]
