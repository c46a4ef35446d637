"""An end for waits that nothing else ends: ranks that are frozen, or that talk past each other."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from horovod_lm.topology import place


class Watchdog:
    """Ends this process if a collective takes longer than `seconds`.

    Horovod ends a stall itself where a rank doesn't call, but not where a rank's process is stopped
    or its machine can't be reached: its own threads wait too then. The wait is counted in ticks of
    a thread, so that time in which this process itself was stopped does not count.

    `leave(message, exit_code)` is called in that thread; the default prints and ends the process.
    """

    def __init__(
        self,
        seconds: float,
        leave: Callable[[str, int], None] | None = None,
        tick: float = 1.0,
    ) -> None:
        self._most = seconds
        self._limit = seconds, "a collective failed, since another rank does not answer", 1
        self._leave, self._tick = leave or _leave, tick
        self._calls = 0
        self._present = 0  # number of the call that is going on; 0: none
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def communicator(self, inner: Any) -> Any:
        """`inner` with this watchdog beside each of its calls."""
        return _Watched(inner, self)

    @contextmanager
    def limit(self, seconds: float, message: str, exit_code: int) -> Iterator[None]:
        """A shorter time for the collectives inside, and what their failure means."""
        before = self._limit
        self._limit = min(seconds, self._most), message, exit_code
        try:
            yield
        finally:
            self._limit = before

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A collective that must end in time."""
        self._calls += 1
        self._present = self._calls
        try:
            yield
        finally:
            self._present = 0

    def _watch(self) -> None:
        ticks, last = 0, 0
        while True:
            time.sleep(self._tick)
            present = self._present
            ticks = ticks + 1 if present and present == last else 0
            last = present
            seconds, message, exit_code = self._limit
            if ticks * self._tick >= seconds:
                self._leave(f"{message}; waited for {seconds:g} seconds", exit_code)
                return


class _Watched:
    """A communicator whose collectives are watched."""

    def __init__(self, inner: Any, watchdog: Watchdog) -> None:
        self._inner, self._watchdog = inner, watchdog

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*arguments: Any) -> Any:
            with self._watchdog.waiting():
                return value(*arguments)

        return call


def _leave(message: str, exit_code: int) -> None:
    """The main thread waits inside of a library and can't be interrupted: end without it. A lower
    rank speaks first, and its end ends the others."""
    if place().rank:
        time.sleep(2)
    print(f"horovod-lm: {message}", file=sys.stderr, flush=True)
    os._exit(exit_code)
