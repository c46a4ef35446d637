"""Objectives: how windows of tokens become the arrays and losses of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from horovod_lm.backend import MicroBatch
from horovod_lm.data.shards import Tokens
from horovod_lm.errors import UserError
from horovod_lm.spec import Kind, ModelSpec

FILLER = -1  # the window number of a row without content, whose weights are 0


class Objective(Protocol):
    """What an objective offers to the batches; the loop knows none by name.

    `name` is for messages; `kinds` are the kinds of models that it can train. `loss_names` are the
    names of the losses in every micro-batch, in order. Windows are (B,) int64 numbers from 0 to
    `windows(...)` - 1.
    """

    name: str
    kinds: tuple[Kind, ...]
    loss_names: tuple[str, ...]

    def windows(self, tokens: Tokens, context: int) -> int:
        """How many windows the stream has."""

    def weight_sums(self, tokens: Tokens, context: int, windows: np.ndarray) -> Mapping[str, float]:
        """By loss name, the sum of the weights of all targets in `windows`, known without reading
        tokens, so that it can be fixed before the first backward."""

    def micro_batch(
        self,
        tokens: Tokens,
        context: int,
        windows: np.ndarray,
        rows: np.ndarray,
        normalisers: Mapping[str, float],
    ) -> MicroBatch:
        """The arrays of `windows`, where `FILLER` makes a row of weight 0; `rows` (B,) int64 are
        their indices in the global batch."""


def check_kind(objective: Objective, spec: ModelSpec) -> None:
    """Raise `UserError` unless `objective` can train models of this kind."""
    if spec.kind not in objective.kinds:
        raise UserError(
            f'model.kind = "{spec.kind}" can\'t be trained by {objective.name}; allowed: '
            f"{', '.join(objective.kinds)}"
        )
