"""Readers of the files that people have: each gives records, or pieces of running text."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from horovod_lm.errors import UserError

LONGEST = 2**24  # characters of a line, a field or a document that has to be in memory whole
_SHOWN = 3  # broken places of a file that are shown
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
COMPRESSED = (".gz", ".zst")
NOT_TEXT = "convert the file to UTF-8, leave it out of data.text with a glob such as texts/**/*.txt"


class Record(NamedTuple):
    """Named texts that belong together, such as a question and its answer, and where they are."""

    place: str
    fields: dict[str, str]


@dataclass
class Found:
    """What was left out of a file: broken places (the first ones of them in words) and empty
    documents."""

    broken: int = 0
    empty: int = 0
    first: list[str] = field(default_factory=list)


class Faults:
    """Broken and empty places. With `skip`, broken ones are counted and left out; otherwise the
    first one ends the reading with a `UserError`. Empty ones are always left out."""

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.found: dict[Path, Found] = {}

    def broken(self, path: Path, place: str, reason: str, mend: str = "mend it") -> None:
        if not self.skip:
            raise UserError(
                f'{path}, {place}: {reason}; {mend}, or set data.on_error = "skip" to leave such '
                "places out"
            )
        self._note(path, f"{place}: {reason}").broken += 1

    def empty(self, path: Path, place: str) -> None:
        self._note(path, f"{place}: empty").empty += 1

    def _note(self, path: Path, text: str) -> Found:
        found = self.found.setdefault(path, Found())
        if len(found.first) < _SHOWN:
            found.first.append(text)
        return found


# Of a file: the records that have the named fields; none named: the usual ones of the format.
Reader = Callable[[Path, tuple[str, ...], Faults], Iterator[Record]]


def unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} can't be read: {error.strerror}; make it readable or leave it out of data.text"
    )


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if they begin as gzip or Zstandard do. Raises `UserError`
    where it can't be read or is damaged."""
    try:
        with path.open("rb") as raw:
            start = raw.read(4)
            raw.seek(0)
            if start.startswith(_GZIP):
                with gzip.GzipFile(fileobj=raw) as unzipped:
                    yield cast(BinaryIO, unzipped)
            elif start == _ZSTD:
                import pyarrow

                with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd") as stream:
                    yield cast(BinaryIO, stream)
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is None:  # Arrow's own, of what is in the file
            raise _damaged(path, error) from None
        raise unreadable(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged and can't be decompressed ({error}); bring a whole copy")


def lines(path: Path, most: int) -> Iterator[tuple[int, str, str | None]]:
    """The lines of a UTF-8 file, in pieces of `most` characters where they are longer: the line's
    number, its text with the line feed, and what is wrong with it (or None).

    A byte-order mark is dropped, and every line end is read as a line feed.
    """
    number, offset = 1, 0
    with (
        reading(path) as binary,
        io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape") as stream,
    ):
        while line := stream.readline(most):
            reason = None
            if "\0" in line or not line.isascii():
                reason = _wrong(line, offset)
            yield number, line, reason
            if line.endswith("\n"):
                number, offset = number + 1, 0
            else:
                offset += len(line.encode("utf-8", "surrogateescape"))


def _wrong(line: str, offset: int) -> str | None:
    bad, what = line.find("\0"), "a NUL byte"
    try:
        (line if bad < 0 else line[:bad]).encode()
    except UnicodeEncodeError as error:
        # Bytes that are not UTF-8 were decoded to the surrogates from U+DC80 on.
        bad = error.start
        what = f"byte 0x{ord(line[bad]) - 0xDC00:02x}, which is not UTF-8"
    if bad < 0:
        return None
    offset += len(line[:bad].encode("utf-8", "surrogateescape"))
    return f"at byte {offset} of the line it has {what}"


def whole_lines(path: Path, faults: Faults) -> Iterator[tuple[int, str | None]]:
    """The lines with their numbers, without line feeds; None for one that is broken or longer than
    `LONGEST`, which `faults` has been told of."""
    long = 0  # the number of a line whose rest is passed over
    for number, line, reason in lines(path, LONGEST):
        if number == long:
            continue
        mend = NOT_TEXT
        if not line.endswith("\n") and len(line) == LONGEST:
            long, mend = number, "break it up"
            reason = f"it is longer than {LONGEST:,} characters"
        if reason:
            faults.broken(path, f"line {number}", reason, mend)
        yield number, None if reason else line.removesuffix("\n")


def unfit(text: str) -> str | None:
    """Why a text that came out of quotes or escapes is none (or None)."""
    if len(text) > LONGEST:
        return f"a text longer than {LONGEST:,} characters"
    if "\0" in text:
        return "a text with a NUL character"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"a text with half a character, U+{ord(text[error.start]):04X}"
    return None


def pick(values: object, name: str) -> str:
    """The text of field `name` in nested mappings, where a dot leads inside. Raises `ValueError`
    with what is wrong."""
    value = values
    for part in [name] if isinstance(values, dict) and name in values else name.split("."):
        if not isinstance(value, dict) or part not in value:
            has = ", ".join(f'"{key}"' for key in value) if isinstance(value, dict) else "none"
            raise ValueError(f'it has no field "{name}"; its fields are {has[:200] or "none"}')
        value = value[part]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f'its field "{name}" is {_KINDS.get(type(value), "no text")}, not text')
    if reason := unfit(value):
        raise ValueError(f'its field "{name}" is {reason}')
    return value


_KINDS = {list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
