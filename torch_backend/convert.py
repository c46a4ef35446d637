"""What conversion needs of PyTorch."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from horovod_lm.errors import UserError
from horovod_lm.spec import ModelSpec


class ConvertTools:
    """See `horovod_lm.convert.tools.ConvertTools`."""

    def legacy_weights(self, source: Path, target: Path) -> None:
        """Write the tensors of a `pytorch_model.bin` as a safetensors file."""
        try:
            # Only tensors and containers are made; anything else in the pickle is an error.
            table = torch.load(source, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, zipfile.BadZipFile, EOFError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{source} is not a file of weights alone: {reason}") from None
        if not isinstance(table, Mapping):
            raise UserError(f"{source} holds a {type(table).__name__}, not a table of tensors")
        for name, tensor in table.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise UserError(f"{source}: {name!r} is a {type(tensor).__name__}, not a tensor")
            if tensor.is_sparse or tensor.is_quantized:
                raise UserError(f"{source}: {name} is not a plain tensor")
        # Tied tensors share their memory, which safetensors refuses.
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in table.items()}
        save_file(tensors, target, metadata={"format": "pt"})

    def saved_model(self, spec: ModelSpec, weights: Mapping[str, np.ndarray], target: Path) -> None:
        """Refuse: a SavedModel is TensorFlow's own."""
        raise UserError(
            "a SavedModel is a graph of TensorFlow, which PyTorch can't write; use --backend "
            "tensorflow (checkpoints of torch will do), or --to hf"
        )
