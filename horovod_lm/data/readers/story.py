"""CNN/DailyMail (Hermann et al., 2015; Nallapati et al., 2016): the .story files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from horovod_lm.data.readers import LONGEST, Faults, Record, whole_lines
from horovod_lm.errors import UserError

_MARK = "@highlight"


def read(path: Path, fields: tuple[str, ...], faults: Faults) -> Iterator[Record]:
    """One record: "article", and "highlights", a line each."""
    fields = fields or ("article",)
    wrong = [name for name in fields if name not in ("article", "highlights")]
    if wrong:
        raise UserError(f'data.fields: a story has no "{wrong[0]}"; "article" or "highlights"')
    article: list[str] = []
    highlights: list[str] = []
    current, size = article, 0
    for _, line in whole_lines(path, faults):
        text = (line or "").strip()
        size += len(text)
        if size > LONGEST:
            faults.broken(path, "line 1", f"the story is longer than {LONGEST:,} characters")
            return
        if text == _MARK:
            current = highlights
        elif text:
            current.append(text)
    if "highlights" in fields and article and not highlights:
        faults.broken(path, "its end", f"the story has no {_MARK}")
        return
    record = {"article": "\n".join(article), "highlights": "\n".join(highlights)}
    yield Record("line 1", {name: record[name] for name in fields})
