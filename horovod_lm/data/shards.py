"""Streams of token ids on disk: memory-mapped shards and an index of documents."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SHARD_TOKENS = 2**26  # of a full shard: 128 MiB of uint16
_INDEX_TYPE = np.dtype("<i8")
_BLOCK = 2**22  # bytes, or ids, that are in memory at once


def token_type(vocabulary: int) -> np.dtype:
    """The smallest type that holds every id, little-endian on every machine."""
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


class Tokens:
    """A stream of token ids in a row of memory-mapped shards, made by `TokenWriter`.

    `documents` (documents,) int64, memory-mapped: where in the stream each document starts. Each
    document ends with the end-of-text token. Safe to read from several threads.
    """

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        """Open the stream that `entry`, its part of the manifest, describes. Raises `ValueError`
        if a file is missing or has another size."""
        kind = np.dtype(entry["dtype"])
        self._shards: list[np.ndarray] = []
        starts = [0]
        for shard in entry["shards"]:
            self._shards.append(_map(folder / shard["file"], kind, shard["count"]))
            starts.append(starts[-1] + shard["count"])
        self._starts = np.array(starts, dtype=np.int64)
        index = entry["index"]
        self.documents = _map(folder / index["file"], _INDEX_TYPE, index["count"])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def counts(self, vocabulary: int) -> np.ndarray:
        """How often each id occurs, (vocabulary,) int64."""
        result = np.zeros(vocabulary, dtype=np.int64)
        for shard in self._shards:
            for start in range(0, len(shard), _BLOCK):
                result += np.bincount(shard[start : start + _BLOCK], minlength=vocabulary)
        return result

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from position `start`, int32. Raises `IndexError` outside the stream."""
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of a stream of {len(self)}")
        result = np.empty(count, dtype=np.int32)
        filled = 0
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < count:
            begin = start + filled - int(self._starts[number])
            part = self._shards[number][begin : begin + count - filled]
            result[filled : filled + len(part)] = part
            filled += len(part)
            number += 1
        return result


def _map(path: Path, kind: np.dtype, count: int) -> np.ndarray:
    size = path.stat().st_size if path.exists() else -1
    if size != count * kind.itemsize:
        raise ValueError(f"{path} should have {count * kind.itemsize} bytes, and has {size}")
    # As a plain array: slices of a memmap object cost ten times as much.
    return np.memmap(path, dtype=kind, mode="r").view(np.ndarray)


class _File:
    """A file that is written from front to back, and its digest."""

    def __init__(self, path: Path, kind: np.dtype) -> None:
        self.path, self.count, self._kind = path, 0, kind
        self._stream: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()

    @classmethod
    def resume(cls, path: Path, kind: np.dtype, entry: dict[str, Any]) -> _File:
        """Go on behind what `entry` describes; what was written later is cut off. Raises
        `ValueError` if the file is shorter or holds something else."""
        file = cls.__new__(cls)
        file.path, file.count, file._kind = path, entry["count"], kind
        file._digest = hashlib.sha256()
        left = file.count * kind.itemsize
        file._stream = path.open("r+b")
        while left and (block := file._stream.read(min(left, _BLOCK))):
            file._digest.update(block)
            left -= len(block)
        if left or file._digest.hexdigest() != entry["sha256"]:
            file._stream.close()
            raise ValueError(f"{path} is not as it was left")
        # A file that is read must be told where to write, even where it stands already.
        file._stream.seek(file.count * kind.itemsize)
        file._stream.truncate()
        return file

    def write(self, values: np.ndarray) -> None:
        data = values.astype(self._kind, copy=False).tobytes()
        self._digest.update(data)
        self._stream.write(data)
        self.count += len(values)

    def entry(self) -> dict[str, Any]:
        return {
            "file": self.path.name,
            "count": self.count,
            "sha256": self._digest.hexdigest(),
        }

    def sync(self) -> dict[str, Any]:
        """What is written so far, once it is on the disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return self.entry()

    def close(self) -> dict[str, Any]:
        if not self._stream.closed:
            self.sync()
            self._stream.close()
        return self.entry()


class TokenWriter:
    """Writes one stream, piece by piece, in constant memory. A context manager: on leaving, its
    files are closed. With `state`, from `save`, it goes on where another writer was then."""

    def __init__(
        self,
        folder: Path,
        name: str,
        vocabulary: int,
        shard_tokens: int = SHARD_TOKENS,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Raises `ValueError` if the files are not as `state` has them."""
        self._folder, self._name, self._shard_tokens = folder, name, shard_tokens
        self._kind = token_type(vocabulary)
        self._index_path = folder / f"{name}.documents"
        self._shards: list[dict[str, Any]] = []
        self._length = 0
        self._at_start = True
        if state is None:
            self._shard = self._open_shard()
            self._index = _File(self._index_path, _INDEX_TYPE)
        else:
            self._shards, self._length = list(state["shards"]), state["length"]
            self._at_start = state["at_start"]
            for shard in self._shards:
                _File.resume(folder / shard["file"], self._kind, shard).close()
            last = state["last"]
            self._shard = _File.resume(folder / last["file"], self._kind, last)
            self._index = _File.resume(self._index_path, _INDEX_TYPE, state["index"])

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files as they are."""
        self._shard.close()
        self._index.close()

    def _open_shard(self) -> _File:
        return _File(self._folder / f"{self._name}-{len(self._shards):05}.tokens", self._kind)

    def write(self, pieces: list[tuple[np.ndarray, bool]]) -> None:
        """Append pieces of documents: the ids of each, and whether it ends its document (which
        the end-of-text id must then close)."""
        if not pieces:
            return
        starts = []
        for ids, last in pieces:
            if self._at_start:
                starts.append(self._length)
            self._length += len(ids)
            self._at_start = last
        self._index.write(np.array(starts, dtype=_INDEX_TYPE))
        ids = np.concatenate([ids for ids, _ in pieces])
        while len(ids):
            room = self._shard_tokens - self._shard.count
            self._shard.write(ids[:room])
            ids = ids[room:]
            if self._shard.count == self._shard_tokens:
                self._shards.append(self._shard.close())
                self._shard = self._open_shard()

    def save(self) -> dict[str, Any]:
        """What another writer needs in order to go on from here, once that is on the disk."""
        return {
            "shards": list(self._shards),
            "last": self._shard.sync(),
            "index": self._index.sync(),
            "length": self._length,
            "at_start": self._at_start,
        }

    def finish(self) -> dict[str, Any]:
        """Close the files; the stream's part of the manifest, with digests."""
        last = self._shard.close()
        if last["count"]:
            self._shards.append(last)
        else:
            self._shard.path.unlink()
        return {
            "dtype": self._kind.str,
            "tokens": self._length,
            "shards": self._shards,
            "index": self._index.close(),
        }
