"""Helpers that several tests share."""

from __future__ import annotations

import contextlib
import resource
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from horovod_lm.launch import MARKER


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process can become larger than `size` bytes, as where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def open_to_others(folder: Path) -> None:
    """Lets other users reach `folder`, a temporary one, to which pytest lets nobody else."""
    for path in (folder, *folder.parents[:3]):
        if path.stat().st_mode & 0o077 == 0:
            path.chmod(0o755)


@dataclass
class _Job:
    """What the ranks of one job share."""

    size: int
    slots: list[Any] = field(init=False)
    barrier: threading.Barrier = field(init=False)
    calls: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=60)


class ThreadCommunicator:
    """A `Communicator` whose ranks are threads of this process; `calls` are rank 0's collectives
    with the bytes that it gave."""

    def __init__(self, job: _Job, rank: int) -> None:
        self._job = job
        self.rank = self.local_rank = rank
        self.size = self.local_size = job.size

    @property
    def calls(self) -> list[tuple[str, int]]:
        return self._job.calls

    def _exchange(self, name: str, value: Any, size: int) -> list[Any]:
        if self.rank == 0:
            self._job.calls.append((name, size))
        self._job.slots[self.rank] = value
        self._job.barrier.wait()
        everyone = list(self._job.slots)
        self._job.barrier.wait()  # nobody writes the next value before all have read this one
        return everyone

    def broadcast(self, data: bytes, root: int = 0) -> bytes:
        return self._exchange("broadcast", data, len(data))[root]

    def allgather(self, data: bytes) -> list[bytes]:
        return self._exchange("allgather", data, len(data))

    def allreduce(self, array: np.ndarray) -> np.ndarray:
        return np.sum(self._exchange("allreduce", array, array.nbytes), axis=0, dtype=array.dtype)

    def barrier(self) -> None:
        self._exchange("barrier", None, 0)

    def shutdown(self) -> None:
        pass


def on_ranks(size: int, function: Callable[[ThreadCommunicator], Any]) -> list[Any]:
    """Run `function(communicator)` on `size` threads; the result of each rank, or the exception
    that it raised."""
    job = _Job(size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadCommunicator(job, rank))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def processes_of(pid: int) -> list[psutil.Process]:
    """Living processes of the jobs that the process `pid` started, however they are related to
    it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER, "").startswith(f"{pid}-"):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found
