"""Where a conversion is written: a new folder, which is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from horovod_lm.errors import RunFailed, UserError

_PARTIAL = ".partial"


def claim_new(target: Path) -> None:
    """Raise `UserError` unless there is nothing at `target`, or an empty folder, and it can be
    written."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target} is there already; give another path")
    above = next(p for p in (target, *target.absolute().parents) if os.path.lexists(p))
    if not above.is_dir():
        raise UserError(f"{target} can't be made: {above} is not a folder; give another path")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{target} can't be made: {above} is not writable; give another path")
    if target.is_dir() and any(path.name != _PARTIAL for path in target.iterdir()):
        raise UserError(f"{target} is not empty; give another folder")


@contextmanager
def new_folder(target: Path, last: str) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the context ends well, and is removed
    otherwise. An empty `target` is filled itself: it may be the working directory, or where
    something is mounted; `last`, without which it is nothing, is put there last. Raises `UserError`
    if it can't be made and `RunFailed` if it can't be filled."""
    claim_new(target)
    place = target.resolve()  # . and .. have no name
    inside = place.is_dir()
    partial = place / _PARTIAL if inside else place.with_name(f".{place.name}{_PARTIAL}")
    new = [folder for folder in place.parents if not folder.exists()]
    moved: list[Path] = []
    done = False
    try:
        _make(partial, target)
        yield partial
        if inside:
            for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
                moved.append(path.rename(place / path.name))
            partial.rmdir()
        else:
            partial.rename(place)
        done = True
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RunFailed(f"{target} can't be written: {reason}; nothing is left there") from error
    finally:
        if not done:
            for path in moved:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                for folder in new:
                    folder.rmdir()


def _make(partial: Path, target: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{target} can't be made: {reason}; give another path") from None
