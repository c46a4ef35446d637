"""Activations by name, recorded on their way through one forward. Without `tracing` around it
`record` does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from torch_backend.precision import full

_parts: dict[str, list[np.ndarray]] | None = None  # of the forward that is being traced


@contextmanager
def tracing() -> Iterator[dict[str, np.ndarray]]:
    """Gives a dictionary that holds, when the block is left, everything recorded inside, in order.
    Parts of one name follow each other in it along the first axis; rows of attention have been put
    together."""
    global _parts
    sites: dict[str, np.ndarray] = {}
    _parts = {}
    try:
        yield sites
        sites.update({name: np.concatenate(parts) for name, parts in _parts.items()})
    finally:
        _parts = None


def record(name: str, tensor: torch.Tensor, block: int | None = None) -> None:
    """Note a copy of `tensor` (or of the next part of it) as `name`, or as `decoder.BLOCK.name`."""
    if _parts is not None:
        name = name if block is None else f"decoder.{block}.{name}"
        _parts.setdefault(name, []).append(full(tensor).detach().cpu().numpy().copy())


def record_rows(
    name: str, rows: torch.Tensor, start: int, heads: int, block: int, factor: float = 1.0
) -> None:
    """Note query rows from `start` of causal attention, (…, rows, keys) for all `heads` of a batch,
    times `factor`, as part of (B, H, L, M), which has 0 where a query may not look."""
    if _parts is None:
        return
    name = f"decoder.{block}.{name}"
    part = np.tril((full(rows) * factor).detach().cpu().numpy(), start)
    part = part.reshape(-1, heads, *part.shape[-2:])
    if start:
        (above,) = _parts[name]
        above = np.pad(above, [(0, 0)] * 3 + [(0, part.shape[3] - above.shape[3])])
        part = np.concatenate([above, part], axis=2)
    _parts[name] = [part]
