"""Files as streams of documents, in whatever format they are."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path

from horovod_lm.data.readers import (
    NOT_TEXT,
    Faults,
    Reader,
    Record,
    jsonl,
    lines,
    parquet,
    squad,
    story,
    suffix,
    tables,
    tmx,
    unreadable,
    whole_lines,
)
from horovod_lm.errors import UserError

PIECE = 2**20  # characters of a document that are in memory at once
_BLOCK = 2**22  # bytes

# A piece of a document, whether it ends the document, and the number of the stream it belongs to.
Piece = tuple[str, bool, int]

READERS: dict[str, Reader] = {
    "jsonl": jsonl.read,
    "csv": tables.read_csv,
    "tsv": tables.read_tsv,
    "parquet": parquet.read,
    "glue": tables.read_glue,
    "squad": squad.read,
    "tmx": tmx.read,
    "story": story.read,
}
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".tmx": "tmx",
    ".story": "story",
}
_PAIRS = {"story": ("article", "highlights")}  # the fields of parallel streams, if none are named


@dataclass(frozen=True)
class Corpus:
    """Files in their order, and what a document is in them.

    `kind` is for running text: a document is a "paragraph" (ends at an empty line), a "line" or a
    "file". In every other format it is a record: the `fields` of it, one below the other. Text is
    UTF-8; a byte-order mark is dropped, and every line end is read as a line feed (but see
    `whole_lines`). Documents without anything but blanks are left out, and so are line feeds at
    their ends.

    With `parallel`, or with `targets` (files whose lines are the translations of those of `files`),
    documents come in pairs, one in each of two streams; a pair half of which is blank is left out.
    """

    files: tuple[Path, ...]
    kind: str = "paragraph"
    format: str = "auto"
    fields: tuple[str, ...] = ()
    parallel: bool = False
    targets: tuple[Path, ...] = ()
    skip: bool = False

    @property
    def streams(self) -> tuple[str, ...]:
        """The names of the streams."""
        return ("source", "target") if self.parallel or self.targets else ("text",)

    @property
    def all_files(self) -> tuple[Path, ...]:
        return self.files + self.targets

    def stamps(self) -> list[list[str | int]]:
        """Of each file: path, size, and the times of its last changes in ns; these tell, without
        reading, that a file is as it was. Raises `UserError` for what is not a readable file."""
        return [_stamp(path) for path in self.all_files]

    def pieces(self, faults: Faults | None = None) -> Iterator[Piece]:
        """Pieces of documents, of about `PIECE` characters at most. So a document of running text
        may be larger than memory. `faults` learns what is left out; by default, as `skip` says."""
        faults = faults or Faults(self.skip)
        if self.targets:
            self._refuse_fields("data.target")
            for path in self.all_files:
                if (name := file_format(path, self.format)) != "text":
                    raise UserError(
                        f"{path} is {name} by its name, and data.target is for running text; name "
                        'its fields and set data.parallel = true, or set data.format = "text"'
                    )
            if len(self.files) != len(self.targets):
                raise UserError(
                    f"data.text has {len(self.files)} file(s) and data.target {len(self.targets)}; "
                    "each file needs its translation, in the same order"
                )
            pairs = zip(self.files, self.targets, strict=True)
            return chain.from_iterable(_line_pairs(*pair, faults) for pair in pairs)
        return chain.from_iterable(self._of_file(path, faults) for path in self.files)

    def _of_file(self, path: Path, faults: Faults) -> Iterator[Piece]:
        name = file_format(path, self.format)
        if name == "text":
            if self.parallel:
                raise UserError(
                    f"{path} is running text, which has no pairs; give the translations in "
                    "data.target, or another data.format"
                )
            self._refuse_fields(str(path))
            return _pieces(path, self.kind, faults)
        fields = self.fields
        if self.parallel and len(fields or _PAIRS.get(name, ())) != 2:
            raise UserError(
                f"data.parallel takes two fields, and data.fields has {len(fields)}; name the "
                f"source's and the target's field of {path}"
            )
        fields = fields or (_PAIRS.get(name, ()) if self.parallel else ())
        return self._documents(path, READERS[name](path, fields, faults), faults)

    def _refuse_fields(self, what: str) -> None:
        if self.fields:
            raise UserError(
                f"{what} is running text, which has no fields, and data.fields has "
                + ", ".join(f'"{name}"' for name in self.fields)
                + "; leave them out, set data.format, or leave such files out of data.text with a "
                "glob such as texts/**/*.jsonl"
            )

    def _documents(self, path: Path, records: Iterator[Record], faults: Faults) -> Iterator[Piece]:
        for record in records:
            texts = list(record.fields.values())
            if not self.parallel:
                texts = ["\n".join(text for text in texts if text.strip())]
            if all(text.strip() for text in texts):
                for stream, text in enumerate(texts):
                    yield from _cut(text, stream)
            else:
                faults.empty(path, record.place)


def file_format(path: Path, wanted: str) -> str:
    """The format of a file; "auto" goes by its name. Raises `UserError` for a name that might be of
    several formats."""
    if wanted != "auto":
        return wanted
    if suffix(path) == ".json":
        raise UserError(
            f'{path}: data.format = "auto" knows no .json files; set data.format to "jsonl" (an '
            'object on each line), "squad" or "text"'
        )
    return _SUFFIXES.get(suffix(path), "text")


def find_files(patterns: Sequence[str], key: str = "data.text") -> tuple[Path, ...]:
    """The files of `patterns`, each a file, a folder (all files in it and below, but for hidden
    ones) or a glob, in the order of patterns and sorted within one; a file counts once, also where
    links lead to it by several names.

    Raises `UserError` where a pattern has no file.
    """
    files: dict[str, Path] = {}
    real = cache(os.path.realpath)
    for pattern in patterns:
        found = sorted(_matches(pattern))
        if not found:
            raise UserError(
                f'{key}: no file matches "{pattern}"; give text files, folders, globs such as '
                "texts/**/*.txt, or corpus:NAME"
            )
        for path in found:
            whole = os.path.join(real(path.parent), path.name)
            files.setdefault(real(path) if path.is_symlink() else whole, path)
    return tuple(files.values())


def _matches(pattern: str) -> list[Path]:
    if os.path.isdir(pattern):
        return list(_walk(pattern))
    if os.path.lexists(pattern):
        return [Path(pattern).absolute()]
    # A folder that is there is meant, though its name may read as a pattern: "[old]/*.txt".
    parents = Path(pattern).parents
    folder = next((parent for parent in parents if os.path.isdir(parent)), Path())
    if not os.access(folder, os.R_OK | os.X_OK):  # what it holds can't be told
        raise unreadable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    rest = str(Path(pattern).relative_to(folder))
    found = (folder / name for name in glob.glob(rest, root_dir=folder, recursive=True))
    return [path.absolute() for path in found if not os.path.isdir(path)]


def _walk(folder: str) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename or folder), error)

    seen = {os.path.realpath(folder)}  # links may lead back
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        inner = sorted(name for name in folders if not name.startswith("."))
        whole = {name: os.path.realpath(os.path.join(where, name)) for name in inner}
        folders.clear()
        for name in inner:
            if whole[name] not in seen:
                seen.add(whole[name])
                folders.append(name)
        for name in names:
            if not name.startswith("."):
                yield Path(where, name).absolute()


def _stamp(path: Path) -> list[str | int]:
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    # A pipe or a device might never end.
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file; data.text takes text files")
    return [str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def file_digest(path: Path) -> str:
    """SHA-256 of a file. Raises `UserError` if it can't be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from None
    return digest.hexdigest()


def _cut(text: str, stream: int) -> Iterator[Piece]:
    text = text.rstrip("\n")
    for start in range(0, len(text), PIECE):
        yield text[start : start + PIECE], start + PIECE >= len(text), stream


def _pieces(path: Path, kind: str, faults: Faults) -> Iterator[Piece]:
    waiting: list[str] = []  # of the current document
    size, begun, fresh = 0, False, True
    for number, line, reason in lines(path, PIECE):
        if reason:
            faults.broken(path, f"line {number}", reason, NOT_TEXT)
            # Its end still counts, or two lines would become one.
            line = "\n" if line.endswith("\n") and not fresh else ""
        blank = fresh and not line.strip() and not reason
        fresh = line.endswith("\n") or (fresh and not line)  # else the next piece goes on
        if blank and kind == "line":
            faults.empty(path, f"line {number}")
        if kind == "file" or not blank:
            waiting.append(line)
            size += len(line)
        ends = blank if kind == "paragraph" else kind == "line" and fresh
        if ends and (waiting or begun):
            text = "".join(waiting).rstrip("\n")
            if begun or text.strip():
                yield text, True, 0
            waiting, size, begun = [], 0, False
        elif size >= PIECE:
            yield "".join(waiting), False, 0
            waiting, size, begun = [], 0, True
    rest = "".join(waiting).rstrip("\n")
    if begun or rest.strip():
        yield rest, True, 0
    elif kind == "file":
        faults.empty(path, "the file")


def _line_pairs(source: Path, target: Path, faults: Faults) -> Iterator[Piece]:
    count = 0
    pairs = zip_longest(whole_lines(source, faults), whole_lines(target, faults))
    for one, other in pairs:
        if one is None or other is None:
            longer, shorter = (source, target) if one else (target, source)
            raise UserError(
                f"{longer} has more lines than {shorter}, which has {count:,}; line by line, one "
                "must be the translation of the other"
            )
        count += 1
        if one[1] is None or other[1] is None:
            continue
        if one[1].strip() and other[1].strip():
            yield from _cut(one[1], 0)
            yield from _cut(other[1], 1)
        else:
            faults.empty(source if not one[1].strip() else target, f"line {count}")
