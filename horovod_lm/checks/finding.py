"""What a check yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "error"]
BACKENDS = ("torch", "tensorflow")
SECONDS = 120  # for one program that a check runs; a two-rank step takes 5 to 15


@dataclass(frozen=True)
class Finding:
    """One thing that was found. An `error` keeps training from working. `mend` says what to do;
    `fix` is a command that does it safely, without root, or empty."""

    check: str
    level: Level
    text: str
    mend: str | None = None
    fix: tuple[str, ...] = ()


Check = Callable[[list[Finding]], Iterator[Finding]]
