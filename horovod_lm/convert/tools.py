"""What conversion needs of a framework."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from horovod_lm.spec import ModelSpec


class ConvertTools(Protocol):
    """A backend's part in conversion."""

    def legacy_weights(self, source: Path, target: Path) -> None:
        """Write the tensors of a `pytorch_model.bin` as a safetensors file, without running code
        that it may hold. Raises `UserError` where that can't be, or the file is something else."""

    def saved_model(
        self, spec: ModelSpec, weights: dict[str, np.ndarray], target: Path, prefix: bool = False
    ) -> None:
        """Write the model with these canonical weights as a TensorFlow SavedModel in folder
        `target`, which runs without this package; with `prefix` it takes one, 1 for tokens that all
        see. Takes the tensors out of `weights`, to make room. Raises `UserError` where the
        framework can't."""
