"""The per-user cache of finished wheels, and the lock that makes two builds of one wheel wait for
each other.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_root() -> Path:
    """$XDG_CACHE_HOME/horovod_lm, or ~/.cache/horovod_lm."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "horovod_lm"


class WheelCache:
    """Finished wheels at root/wheels/KEY/NAME.whl, work in progress at root/building/KEY, logs at
    root/logs/KEY.log.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, key: str) -> Path | None:
        """The finished wheel of `key`, or None."""
        return next((self.root / "wheels" / key).glob("*.whl"), None)

    def log(self, key: str) -> Path:
        """Where the log of the build of `key` is written; it stays there."""
        path = self.root / "logs" / f"{key}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def get_or_build(
        self, key: str, build: Callable[[Path], Path], waiting: Callable[[], None]
    ) -> Path:
        """The wheel of `key`, built by `build(folder)` if it is not there.

        `build` works in an empty folder and returns the wheel in it. The wheel appears in the cache
        at once or not at all, and the folder is removed whatever happens; what a killed build left
        is removed by the next. `waiting` is called once if another process is building the same
        wheel.
        """
        found = self.find(key)
        if found:
            return found
        folder = self.root / "building" / key
        with self._lock(key, waiting):
            found = self.find(key)
            if found:
                return found
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                return self._keep(key, build(folder), folder / "finished")
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _keep(self, key: str, wheel: Path, finished: Path) -> Path:
        finished.mkdir()
        wheel.rename(finished / wheel.name)
        target = self.root / "wheels" / key
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        finished.rename(target)
        return target / wheel.name

    @contextmanager
    def _lock(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        path = self.root / "locks" / f"{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
