"""The cache on disk: locks, so that two processes wait for each other, and folders that are there
whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from horovod_lm.errors import RunFailed, UserError
from horovod_lm.topology import place

# No space, no quota left, a file too large for the file system or the process's limit.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/horovod_lm/data`, or under `~/.cache`. Raises `UserError` for a user without
    a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    if os.path.isabs(base):
        return Path(base) / "horovod_lm" / "data"
    try:
        return Path.home() / ".cache" / "horovod_lm" / "data"
    except RuntimeError:  # as in a container that runs as a number nobody knows
        raise UserError(
            "there is no place for prepared data: this user has no home directory; set "
            "XDG_CACHE_HOME to a folder that can be written"
        ) from None


def sha256(data: bytes) -> str:
    """The digest by which things are told apart here, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def locked(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `folder`; says so if another process has it, and waits. Of the ranks of a
    job, which all come here, the first one alone says it."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.with_name(folder.name + ".lock"))
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            if place().rank == 0:
                log(f"another process is preparing {folder.name}; waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def building(folder: Path, keep: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when the context ends well. Hold the lock of
    `folder`. Raises `RunFailed` where the disk is full.

    What was filled in is removed where the context ends otherwise; with `keep` it is found again
    the next time if the process was killed or interrupted, nobody reads its log any more, or the
    run failed.
    """
    partial = folder.with_name(folder.name + ".partial")
    with writing(folder):
        if not keep:
            # What a killed process left.
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        try:
            yield partial
        except BaseException as error:
            goes_on = (RunFailed, BrokenPipeError)
            if not keep or (isinstance(error, Exception) and not isinstance(error, goes_on)):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def replace(path: Path, text: str) -> None:
    """Write a file so that after a crash at any moment it is there with the old or the new text."""
    partial = path.with_name(f"{path.name}.{time.time_ns()}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the system says about writing under `folder` into a message."""
    try:
        yield
    except BrokenPipeError:
        raise  # who reads the log has gone, as in `prepare … | head`
    except OSError as error:
        mend = "set XDG_CACHE_HOME to another place"
        if error.errno in _FULL:
            raise RunFailed(
                f"no space left for prepared data in {folder.parent} ({error.strerror}); nothing "
                f"half is left there: free some space, or {mend}"
            ) from error
        raise UserError(
            f"the cache in {folder.parent} can't be written: {error.strerror or error}; make it "
            f"writable, or {mend}"
        ) from error
