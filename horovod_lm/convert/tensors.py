"""safetensors files as they are: every byte of a header and of each tensor, bf16 too.

The library gives NumPy arrays, which have no bf16, and orders tensors anew. A round trip that gives
back the same file needs the header itself.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from horovod_lm.errors import UserError

_LONGEST_HEADER = 100_000_000  # bytes, the library's own limit
_LONGEST_NAME = 1000
_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8,
    "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
READ = ("F32", "BF16", "F16")  # what becomes fp32 and back without loss


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: safetensors' word for its type, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    def fp32(self) -> np.ndarray:
        """Its values, exactly; the type is one of `READ`."""
        raw = np.array(self.data)
        self.forget()
        if self.dtype == "BF16":
            wide = raw.view("<u2").astype("<u4") << 16
            return wide.view("<f4").reshape(self.shape)
        kind = "<f4" if self.dtype == "F32" else "<f2"
        return raw.view(kind).astype(np.float32, copy=False).reshape(self.shape)

    def forget(self) -> None:
        """Give back the memory in which the file's pages stand, until they are read again."""
        base: Any = self.data
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap):
            base.madvise(mmap.MADV_DONTNEED)


def encode(array: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of an fp32 array in type `dtype`, one of `READ`, rounded to the nearest."""
    array = np.ascontiguousarray(array, dtype="<f4")
    if dtype == "BF16":
        bits = array.view("<u4").reshape(-1).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        # A sum would carry a not-a-number over into infinity or beyond.
        rounded = np.where(np.isnan(array.reshape(-1)), (bits >> 16).astype("<u2"), rounded)
        return rounded.astype("<u2").view(np.uint8)
    if dtype == "F16":
        array = array.astype("<f2")
    return array.reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class File:
    """An opened safetensors file: its header's text as it stands, and its tensors by name, whose
    bytes are mapped, not read."""

    header: str
    tensors: dict[str, Tensor]


def read(path: Path) -> File:
    """Open a file. Raises `UserError` unless it is whole and every tensor lies where the header
    says, one after the other."""
    try:
        return _read(path)
    except OSError as error:
        raise UserError(f"{path} can't be read: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a valid safetensors file: {error}") from None


def _read(path: Path) -> File:
    size = os.stat(path).st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise ValueError(f"it is cut off: it has {size} bytes")
        if length > _LONGEST_HEADER:
            raise ValueError(f"its header would have {length:,} bytes")
        if 8 + length > size:
            raise ValueError(
                f"it is cut off: {size:,} bytes, and its header alone takes {length:,}"
            )
        text = file.read(length).decode("utf-8")
    spans = places(text)
    end = max((stop for *_, stop in spans.values()), default=0)
    if 8 + length + end != size:
        fault = "it is cut off" if 8 + length + end > size else "it has bytes after the last tensor"
        raise ValueError(f"{fault}: {size:,} bytes instead of {8 + length + end:,}")
    whole = np.memmap(path, np.uint8, "r") if end else np.empty(8 + length, np.uint8)
    tensors = {
        name: Tensor(dtype, shape, whole[8 + length + start : 8 + length + stop])
        for name, (dtype, shape, start, stop) in spans.items()
    }
    return File(text, tensors)


def places(header: str) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """What a header says: type, shape, first byte and the one after the last, by name. Raises
    `ValueError` where tensors overlap, leave holes or don't have the size of their shape."""
    entries = json.loads(header, object_pairs_hook=_once)
    if not isinstance(entries, dict):
        raise ValueError("its header is no table")
    spans = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        if not name.isprintable() or len(name) > _LONGEST_NAME:  # it would spoil every message
            raise ValueError(f"its header has the name {name[:80]!a}, which no tensor has")
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape, place = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in _SIZES:
            raise ValueError(f"{name} has the unknown type {json.dumps(dtype)[:80]}")
        if not (_numbers(shape) and _numbers(place) and len(place) == 2):
            raise ValueError(f"{name} has no plain shape and place")
        start, stop = place
        if stop - start != math.prod(shape) * _SIZES[dtype]:
            raise ValueError(f"{name} has {stop - start} bytes, which is not {shape} of {dtype}")
        spans[name] = (dtype, tuple(shape), start, stop)
    at = 0
    for name, (_, _, start, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if start != at:
            raise ValueError(f"{name} begins at byte {start} of the data instead of {at}")
        at = stop
    return spans


def _numbers(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("its header has a name twice")
    return table


def header_of(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """A header for tensors of these types and shapes, in their order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in shapes.items():
        stop = at + math.prod(shape) * _SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(entries, separators=(",", ":"))
    return text + " " * (-len(text.encode()) % 8)


def write(
    path: Path,
    header: str,
    data: Callable[[str, str], np.ndarray],
    count: Callable[[int], None] | None = None,
) -> None:
    """Write a file with this header; `data(name, dtype)` gives a tensor's bytes. `count` is told
    of each one's number of bytes when they are written."""
    spans = places(header)
    text = header.encode("utf-8")
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, _, start, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
            raw = data(name, dtype)
            assert raw.nbytes == stop - start, name
            file.write(raw.data)
            if count is not None:
                count(raw.nbytes)
