"""TMX, translation memories (version 1.4), as WMT and others distribute parallel text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.parsers import expat

from horovod_lm.data.readers import LONGEST, Faults, Record, reading, unfit
from horovod_lm.errors import UserError

_BLOCK = 2**16  # bytes
_CODES = ("bpt", "ept", "it", "ph", "ut", "sub")  # what is in them is markup of another program


def read(path: Path, fields: tuple[str, ...], faults: Faults) -> Iterator[Record]:
    """A record for each unit, its fields being languages such as "en", which also stands for
    "en-GB"."""
    if not fields:
        raise UserError('data.fields must name the languages of a TMX file, as in ["en", "de"]')
    units = _Units()
    try:
        with reading(path) as stream:
            while block := stream.read(_BLOCK):
                _parse(path, units, block)
                yield from _records(path, fields, faults, units)
            units.parser.Parse(b"", True)
            yield from _records(path, fields, faults, units)
    except expat.ExpatError as error:
        raise UserError(
            f"{path}, line {error.lineno}: it is not XML ({expat.ErrorString(error.code)}); "
            "what follows can't be read"
        ) from None
    if not units.seen:
        raise UserError(f"{path} has no <tu> in it, so it is no TMX file")


def _parse(path: Path, units: _Units, block: bytes) -> None:
    try:
        units.parser.Parse(block, False)
    except (LookupError, ValueError) as error:  # of an encoding that has no table of 256 characters
        raise UserError(
            f"{path} is in an encoding that can't be read here ({error}); convert it to UTF-8"
        ) from None


def _records(
    path: Path, fields: tuple[str, ...], faults: Faults, units: _Units
) -> Iterator[Record]:
    for number, texts, reason in units.done:
        record = {}
        for name in fields:
            text = _of_language(texts, name.lower().replace("_", "-"))
            if text is None:
                reason = reason or f'its unit has no "{name}"; it has ' + (
                    ", ".join(f'"{language}"' for language in texts) or "no language"
                )
                break
            record[name] = text
            reason = reason or unfit(text)
        if reason:
            faults.broken(path, f"line {number}", reason)
        else:
            yield Record(f"line {number}", record)
    units.done.clear()


def _of_language(texts: dict[str, str], wanted: str) -> str | None:
    if wanted in texts:
        return texts[wanted]
    return next((text for name, text in texts.items() if name.split("-")[0] == wanted), None)


class _Units:
    """What the parser has found: `done` units, each its line's number, its texts by language, and
    what is wrong with it (or None)."""

    def __init__(self) -> None:
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text
        self.parser.SkippedEntityHandler = self._skipped
        self.done: list[tuple[int, dict[str, str], str | None]] = []
        self.seen = 0
        self._line, self._language = 0, ""
        self._texts: dict[str, str] = {}
        self._reason: str | None = None
        self._segment: list[str] | None = None
        self._size = self._codes = 0

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "tu":
            self._line, self._texts = self.parser.CurrentLineNumber, {}
            self._reason = None
            self.seen += 1
        elif name == "tuv":
            language = attributes.get("xml:lang") or attributes.get("lang", "")
            self._language = language.lower().replace("_", "-")
        elif name == "seg":
            self._segment, self._size = [], 0
        elif name in _CODES:
            self._codes += 1

    def _skipped(self, name: str, parameter: bool) -> None:
        # Of the DTD that the file names and nobody reads: left out, it would join two words.
        if self._segment is not None and not self._codes:
            self._reason = f"its text has &{name};, which the file does not define"

    def _text(self, text: str) -> None:
        # A segment beyond all measure is cut just behind the limit, so that `unfit` refuses it.
        if self._segment is not None and not self._codes and self._size <= LONGEST:
            self._segment.append(text)
            self._size += len(text)

    def _end(self, name: str) -> None:
        if name == "seg" and self._segment is not None:
            self._texts[self._language] = " ".join("".join(self._segment).split())
            self._segment = None
        elif name in _CODES:
            self._codes -= 1
        elif name == "tu":
            self.done.append((self._line, self._texts, self._reason))
