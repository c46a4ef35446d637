"""Mends: small edits of Horovod's released source, each in a file of its own.

A mend is a module with a docstring, which says what it mends and why, and a function
`mend(source)`. It edits by short anchors; an anchor that is not found exactly as often as the mend
expects ends the build, since the source is then not the one that the mend was written for.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MENDS = Path(__file__).parent / "mends"
ADDED = MENDS / "added"
KINDS = ("build", "python")


class MendError(Exception):
    """The source is not what a mend expects."""


class Source:
    """The unpacked source at `root`, as mends see it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def edit(self, path: str, anchor: str, replacement: str, times: int = 1) -> None:
        """Replaces `anchor`, which must occur exactly `times` times in the file at `path`.

        Raises MendError if the file is missing or the anchor occurs more or less often.
        """
        file = self.root / path
        if not file.is_file():
            raise MendError(f"{path} is not in this source")
        text = file.read_text(encoding="utf-8")
        found = text.count(anchor)
        if found != times:
            raise MendError(f"{path}: expected {times} times, found {found} times: {anchor!r}")
        file.write_text(text.replace(anchor, replacement), encoding="utf-8")

    def add(self, path: str, text: str) -> None:
        """Writes a file of ours at `path`. Raises MendError if the source has one there already, or
        lacks the folder."""
        file = self.root / path
        if not file.parent.is_dir():
            raise MendError(f"{Path(path).parent} is not in this source")
        if file.exists():
            raise MendError(f"{path} is in this source already")
        file.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Mend:
    """One mend: its name ("build/cpp17"), the first line of its docstring, its digest and its
    function.
    """

    name: str
    summary: str
    digest: str
    apply: Callable[[Source], None]


def digest_of(file: Path) -> str:
    """The SHA-256 of a file, in hex."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def load_mends(folder: Path = MENDS) -> list[Mend]:
    """Every mend under `folder`/build and `folder`/python, in the order of their application."""
    mends = []
    for kind in KINDS:
        for file in sorted((folder / kind).glob("*.py")):
            spec = importlib.util.spec_from_file_location(f"horovod_mend_{kind}_{file.stem}", file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            summary = (module.__doc__ or "").strip().splitlines()[0]
            mends.append(Mend(f"{kind}/{file.stem}", summary, digest_of(file), module.mend))
    return mends


def apply_mends(root: Path, mends: list[Mend]) -> None:
    """Applies `mends` to the source at `root`. Raises MendError that names the mend that did not
    fit.
    """
    source = Source(root)
    for mend in mends:
        try:
            mend.apply(source)
        except MendError as error:
            raise MendError(f"the mend {mend.name} does not fit: {error}") from error


def mend_digests(folder: Path = MENDS) -> dict[str, str]:
    """The digest of every file that decides what the mended source looks like, by its path under
    `folder`.
    """
    files = sorted(folder.rglob("*.py"))
    return {str(file.relative_to(folder)): digest_of(file) for file in files}
