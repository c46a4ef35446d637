"""Readers of the files that people have: each gives records, or pieces of running text."""

from __future__ import annotations

import gzip
import io
import math
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
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # behind a byte from 0x50 to 0x5f; pzstd begins with such a frame
_OTHERS = {
    b"\xfd7zXZ\0": "xz",
    b"\x04\x22\x4d\x18": "LZ4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
_BZIP2 = b"1AY&SY"  # behind BZh and a digit
COMPRESSED = (".gz", ".gzip", ".zst", ".zstd")
NOT_TEXT = "convert the file to UTF-8, leave it out of data.text with a glob such as texts/**/*.txt"


class Record(NamedTuple):
    """Named texts that belong together, such as a question and its answer, and where they are."""

    place: str
    fields: dict[str, str]


@dataclass
class Found:
    """What was left out of a file: broken places and empty documents, and the first ones of them in
    words, broken ones first."""

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
        found = self.found.setdefault(path, Found())
        found.first.insert(found.broken, f"{place}: {reason}")  # before the empty ones
        del found.first[_SHOWN:]
        found.broken += 1

    def empty(self, path: Path, place: str) -> None:
        found = self.found.setdefault(path, Found())
        if len(found.first) < _SHOWN:
            found.first.append(f"{place}: empty")
        found.empty += 1


# Of a file: the records that have the named fields; none named: the usual ones of the format.
Reader = Callable[[Path, tuple[str, ...], Faults], Iterator[Record]]


def suffix(path: Path) -> str:
    """What a file's name ends with, in small letters, without that of its compression."""
    name = path.name.lower()
    inner = next((end for end in COMPRESSED if name.endswith(end)), "")
    return Path(name.removesuffix(inner)).suffix


def unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} can't be read: {error.strerror}; make it readable or leave it out of data.text"
    )


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if they begin as gzip or Zstandard do. Raises `UserError`
    where it can't be read, is damaged, or is packed in another way."""
    try:
        with path.open("rb") as raw:
            start = raw.read(10)
            raw.seek(0)
            _refuse_others(path, start)
            if start.startswith(_GZIP):
                with gzip.GzipFile(fileobj=raw) as unzipped:
                    yield cast(BinaryIO, unzipped)
            elif start.startswith(_ZSTD) or start[1:4] == _ZSTD_SKIPPABLE:
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


def _refuse_others(path: Path, start: bytes) -> None:
    how = next((name for magic, name in _OTHERS.items() if start.startswith(magic)), None)
    if start.startswith(b"BZh") and start[4:] == _BZIP2:
        how = "bzip2"
    if suffix(path) in (".tar", ".tgz"):
        how = "tar"
    if how is not None:
        raise UserError(
            f"{path} is packed by {how}, which is not read here; unpack it (and if you like, "
            "compress what is in it by gzip or Zstandard)"
        )


def _damaged(path: Path, error: Exception) -> UserError:
    if "too much memory" in str(error):
        return UserError(
            f"{path} is compressed with a window that takes too much memory (zstd --long or "
            "--ultra); compress it anew without it"
        )
    return UserError(f"{path} is damaged and can't be decompressed ({error}); bring a whole copy")


def lines(
    path: Path, most: int, newline: str | None = None
) -> Iterator[tuple[int, str, str | None]]:
    """The lines of a UTF-8 file, in pieces of `most` characters where they are longer: the line's
    number, its text with the line feed, and what is wrong with it (or None).

    A byte-order mark is dropped. Every line end is read as a line feed; with `newline` "\\n", lines
    end at line feeds alone, and carriage returns stay where they are.
    """
    number, offset = 1, 0
    with (
        reading(path) as binary,
        io.TextIOWrapper(
            binary, encoding="utf-8-sig", errors="surrogateescape", newline=newline
        ) as stream,
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


class Line(NamedTuple):
    """A line with its line feed, None if it is longer than `LONGEST`; what is wrong with it (or
    None), and what may be done about that."""

    number: int
    text: str | None
    reason: str | None
    mend: str


def limited_lines(path: Path, newline: str | None = None) -> Iterator[Line]:
    """As `lines`, but whole ones; one that is too long comes without its text."""
    long = 0  # the number of a line whose rest is passed over
    for number, line, reason in lines(path, LONGEST, newline):
        if number == long:
            continue
        if line.endswith("\n") or len(line) < LONGEST:
            yield Line(number, line, reason, NOT_TEXT)
        else:
            long = number
            reason = f"it is longer than {LONGEST:,} characters"
            yield Line(number, None, reason, "break it up")


def whole_lines(path: Path, faults: Faults) -> Iterator[tuple[int, str | None]]:
    """The lines with their numbers, without line ends; None for one that is broken or longer than
    `LONGEST`, which `faults` has been told of.

    Here a carriage return ends no line by itself: parallel text goes by line feeds, and so do
    JSON Lines and values between tabs, which may have one inside.
    """
    for number, text, reason, mend in limited_lines(path, "\n"):
        if reason:
            faults.broken(path, f"line {number}", reason, mend)
        good = None if reason or text is None else text
        yield number, good and good.removesuffix("\n").removesuffix("\r")


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
        if value is None:
            break
        if not isinstance(value, dict) or part not in value:
            has = ", ".join(f'"{key}"' for key in value) if isinstance(value, dict) else "none"
            raise ValueError(f'it has no field "{name}"; its fields are {has[:200] or "none"}')
        value = value[part]
    if isinstance(value, bytes):
        value = _decoded(value, name)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'its field "{name}" is {value}, not text')
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        kind = _KINDS.get(type(value), f"of another kind ({type(value).__name__})")
        raise ValueError(f'its field "{name}" is {kind}, not text')
    if reason := unfit(value):
        raise ValueError(f'its field "{name}" is {reason}')
    return value


def _decoded(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f'its field "{name}" has at byte {error.start} byte 0x{value[error.start]:02x}, which '
            "is not UTF-8"
        ) from None


_KINDS = {list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
