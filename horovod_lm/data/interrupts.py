"""Long work inside a library, which Ctrl-C would not reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

Result = TypeVar("Result")

_PATIENCE = 2.0  # seconds for the work to end by itself after an interrupt


class _Ended(Exception):
    """Nobody wants the result any more."""


class _Texts:
    """Texts that end with an exception once `wanted` is False."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self.wanted = texts, True

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if not self.wanted:
                raise _Ended
            yield text


def interruptible(work: Callable[[Iterable[str]], Result], texts: Iterable[str]) -> Result:
    """`work(texts)`, in a thread of its own while this one waits.

    Python handles signals in the main thread alone, between two of its own instructions; a library
    that works there, or asks for `texts` from threads of its own, keeps Ctrl-C waiting to its end.
    After one, the texts stop; work that goes on all the same is left behind and ends with the
    process.
    """
    wanted, result = _Texts(texts), Future[Result]()

    def run() -> None:
        try:
            result.set_result(work(wanted))
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, name="interruptible", daemon=True).start()
    try:
        return result.result()
    except KeyboardInterrupt:
        wanted.wanted = False
        wait([result], _PATIENCE)  # a bar is taken from the terminal meanwhile
        raise
