"""Text files as streams of documents, and the checks that they are text."""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from horovod_lm.errors import UserError

PIECE = 2**20  # characters of a document that are in memory at once
_BLOCK = 2**22  # bytes


@dataclass(frozen=True)
class Corpus:
    """Text files in their order, and what one document is in them: "paragraph" (ends at an empty
    line), "line" or "file".

    Files are UTF-8; a byte-order mark is dropped, and every line end is read as a line feed.
    Documents without anything but blanks are left out, and so are line feeds at their ends.
    """

    files: tuple[Path, ...]
    kind: str

    def stamps(self) -> list[list[str | int]]:
        """Of each file: path, size, and the times of its last changes in ns; these tell, without
        reading, that a file is as it was. Raises `UserError` for what is not a readable file."""
        return [_stamp(path) for path in self.files]

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """Pieces of documents, of about `PIECE` characters at most, each with whether it ends its
        document. So a document may be larger than memory."""
        return chain.from_iterable(_pieces(path, self.kind) for path in self.files)


def find_files(patterns: Sequence[str]) -> tuple[Path, ...]:
    """The files of `patterns`, each a file, a folder (all files in it and below, but for hidden
    ones) or a glob, in the order of patterns and sorted within one; a file counts once.

    Raises `UserError` where a pattern has no file.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        found = sorted(_matches(pattern))
        if not found:
            raise UserError(
                f'data.text: no file matches "{pattern}"; give text files, folders, globs such as '
                "texts/**/*.txt, or corpus:NAME"
            )
        files.update(dict.fromkeys(found))
    return tuple(files)


def _matches(pattern: str) -> list[Path]:
    if os.path.isdir(pattern):
        return list(_walk(pattern))
    if os.path.lexists(pattern):
        return [Path(pattern).absolute()]
    found = glob.glob(pattern, recursive=True)
    return [Path(name).absolute() for name in found if not os.path.isdir(name)]


def _walk(folder: str) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename or folder), error)

    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield Path(where, name).absolute()


def _stamp(path: Path) -> list[str | int]:
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    # A pipe or a device might never end.
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file; data.text takes text files")
    return [str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} can't be read: {error.strerror}; make it readable or leave it out of data.text"
    )


def text_digest(path: Path) -> str:
    """SHA-256 of a file. Raises `UserError` if it can't be read, or isn't UTF-8 text without NUL
    bytes, with the offset of the first byte at fault."""
    digest, decoder, position = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                _check_block(path, block, decoder, position)
                position += len(block)
    except OSError as error:
        raise _unreadable(path, error) from None
    cut = len(decoder.getstate()[0])
    if cut:
        raise _not_text(path, position - cut, "an incomplete UTF-8 character at its end")
    return digest.hexdigest()


def _check_block(
    path: Path, block: bytes, decoder: codecs.IncrementalDecoder, position: int
) -> None:
    held = len(decoder.getstate()[0])  # bytes of a character that began in the block before
    nul = block.find(b"\0")
    try:
        decoder.decode(block if nul < 0 else block[:nul])
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        offset = position - held + error.start
        raise _not_text(path, offset, f"byte 0x{bad:02x}, which is not UTF-8") from None
    if nul >= 0:
        raise _not_text(path, position + nul, "a NUL byte")


def _not_text(path: Path, offset: int, what: str) -> UserError:
    return UserError(
        f"{path} is not UTF-8 text: at byte {offset} it has {what}; convert it to UTF-8, or leave "
        "it out of data.text with a glob such as texts/**/*.txt"
    )


def _pieces(path: Path, kind: str) -> Iterator[tuple[str, bool]]:
    waiting: list[str] = []  # of the current document
    size, begun, fresh = 0, False, True
    for line in _lines(path):
        blank = fresh and not line.strip()
        fresh = line.endswith("\n")  # else the next piece goes on with the same line
        if kind == "file" or not blank:
            waiting.append(line)
            size += len(line)
        ends = blank if kind == "paragraph" else kind == "line" and fresh
        if ends and (waiting or begun):
            yield "".join(waiting).rstrip("\n"), True
            waiting, size, begun = [], 0, False
        elif size >= PIECE:
            yield "".join(waiting), False
            waiting, size, begun = [], 0, True
    rest = "".join(waiting).rstrip("\n")
    if begun or rest.strip():
        yield rest, True


def _lines(path: Path) -> Iterator[str]:
    try:
        # Checked before; if it changed since, `prepare` finds that by its stamp.
        with path.open(encoding="utf-8-sig", errors="replace") as stream:
            while line := stream.readline(PIECE):
                yield line
    except OSError as error:
        raise _unreadable(path, error) from None
