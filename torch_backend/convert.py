"""What conversion needs of PyTorch."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from horovod_lm.convert import tensors
from horovod_lm.errors import RunFailed, UserError
from horovod_lm.spec import ModelSpec


class ConvertTools:
    """See `horovod_lm.convert.tools.ConvertTools`."""

    def legacy_weights(self, source: Path, target: Path) -> None:
        """Write the tensors of a `pytorch_model.bin` as a safetensors file."""
        try:
            # Only tensors and containers are made; anything else in the pickle is an error. A zip
            # archive is mapped, not read; the format before 2020 is none.
            mapped = zipfile.is_zipfile(source)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an old format's, about PyTorch's own future
                table = torch.load(str(source), map_location="cpu", weights_only=True, mmap=mapped)
        # A damaged pickle can raise whatever its reader stumbles over.
        except Exception as error:
            text = str(error).strip().partition("\n")[0] or type(error).__name__
            reason = text if text.isprintable() else ascii(text)
            raise UserError(f"{source} is not a file of weights alone: {reason[:300]}") from None
        if not isinstance(table, Mapping):
            raise UserError(f"{source} holds a {type(table).__name__}, not a table of tensors")
        for name, tensor in table.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                what = f"{ascii(name)[:80]} is a {type(tensor).__name__}, not a tensor"
                raise UserError(f"{source}: {what} with a name")
            if not _is_plain(tensor):
                raise UserError(f"{source}: {ascii(name)[:80]} is not a plain tensor")
        header = tensors.header_of(
            {name: (_TYPES[t.dtype], tuple(t.shape)) for name, t in table.items()}
        )

        def data(name: str, dtype: str) -> np.ndarray:
            return table[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()

        try:
            tensors.write(target, header, data)
        except ValueError as error:
            raise UserError(f"{source} has no plain names of tensors: {error}") from None
        except OSError as error:
            raise RunFailed(
                f"the weights of {source} can't be written to {target.parent} on their way: "
                f"{(error.strerror or str(error)).lower()}; set TMPDIR to a folder with room"
            ) from error

    def saved_model(
        self, spec: ModelSpec, weights: dict[str, np.ndarray], target: Path, prefix: bool = False
    ) -> None:
        """Refuse: a SavedModel is TensorFlow's own."""
        raise UserError(
            "a SavedModel is a graph of TensorFlow, which PyTorch can't write; use --backend "
            "tensorflow (checkpoints of torch will do), or --to hf"
        )


_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its elements stand in memory, each in its own place: a few bytes may pose as
    terabytes."""
    strided = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not strided or tensor.is_quantized or tensor.dtype not in _TYPES:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
