"""A model's folder as transformers writes it: which files are read, and how far they are trusted.

Only plain files of fixed names, and shards that the index names, are opened: no archive, no pickle.
"""

from __future__ import annotations

import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horovod_lm.convert import tensors
from horovod_lm.convert.tensors import File, Tensor
from horovod_lm.errors import UserError

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LEGACY = "pytorch_model.bin"
# What is carried along beside weights and config, as it is.
OF_TEXT = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model",
    "tokenizer.model",
)  # fmt: skip
COMPANIONS = (*OF_TEXT, "sentence_bert_config.json", "modules.json", "README.md", "LICENSE")
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_LARGEST = {CONFIG: 2**20, INDEX: 2**27, TOKENIZER: 2**28}  # bytes
_COMPANION = 2**28


@dataclass(frozen=True)
class Weights:
    """The weight files of a folder, by name, in order."""

    files: dict[str, File]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: t for file in self.files.values() for name, t in file.tensors.items()}


def plain_file(folder: Path, name: str) -> Path | None:
    """The file `name` of `folder`, None if there is none. Raises `UserError` for anything but a
    plain file, or a link to one in the same folder or in the cache of hub downloads around it."""
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{path} is a link to nothing") from None
        return None
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    here = folder.resolve()
    # A hub cache has models--X/snapshots/REVISION/NAME -> ../../blobs/DIGEST.
    allowed = (here, here.parent.parent / "blobs")
    if path.is_symlink() and real.parent not in allowed:
        raise UserError(
            f"{path} is a link that leads out of its folder; copy the file itself there"
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise UserError(f"{path} is not a plain file")
    return real


def read_bytes(folder: Path, name: str) -> bytes | None:
    """The content of a small file, None if there is none."""
    path = plain_file(folder, name)
    if path is None:
        return None
    most, size = _LARGEST.get(name, _COMPANION), path.stat().st_size
    if size > most:
        raise UserError(f"{folder / name} has {size:,} bytes; at most {most:,} are read")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{folder / name} can't be read: {error.strerror}") from None


def parse_json(data: bytes, where: Path) -> dict[str, Any]:
    """A JSON table."""
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where} must hold a JSON object, not {type(values).__name__}")
    return values


def open_weights(folder: Path) -> Weights | None:
    """The safetensors file of a folder, or its shards; None if it has neither."""
    single = plain_file(folder, WEIGHTS)
    if single is not None:
        return Weights({WEIGHTS: tensors.read(single)})
    index = read_bytes(folder, INDEX)
    return None if index is None else _shards(folder, parse_json(index, folder / INDEX))


def _shards(folder: Path, index: dict[str, Any]) -> Weights:
    where = folder / INDEX
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{where} has no table weight_map")
    for name in table.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise UserError(
                f"{where} names the shard {ascii(name)[:80]}; allowed are names of .safetensors "
                "files in the same folder"
            )
    files = {}
    for name in sorted(set(table.values())):
        path = plain_file(folder, name)
        if path is None:
            raise UserError(f"{where} names the shard {name}, which is missing")
        files[name] = tensors.read(path)
    found = [(name, file) for file, opened in files.items() for name in opened.tensors]
    for name, file in found:
        if table.get(name) != file:
            place = f"in {table[name]}" if name in table else "nowhere"
            raise UserError(f"{folder / file} holds {name}, which {INDEX} has {place}")
    for name in sorted(table.keys() - dict(found).keys()):
        plain = name if name.isprintable() else ascii(name)
        raise UserError(f"{where} has {plain[:200]} in {table[name]}, which does not hold it")
    return Weights(files)
