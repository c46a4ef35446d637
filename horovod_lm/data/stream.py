"""What objectives and batches ask of a stream of token ids."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class TokenStream(Protocol):
    """See `horovod_lm.data.shards.Tokens`: `documents` are the places where documents start."""

    documents: np.ndarray

    def __len__(self) -> int: ...

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from position `start`, int32, in an array of their own."""
