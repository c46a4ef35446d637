"""Processes that tokenise: each reads texts from its standard input and writes their ids to its
standard output. So nothing is unpickled, and they end with the process that started them, even
where that is killed.

A message is its length in bytes (8 bytes), then numbers of 4 bytes: how many parts there are, and
the length of each; then the parts themselves. All numbers are little-endian. The first part of an
answer says what is wrong with the texts; if it has no characters, their ids follow.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Protocol

import numpy as np

from horovod_lm.errors import RunFailed, UserError

Batch = list[str]


class Encoder(Protocol):
    """Tokenises batches of texts, in their order."""

    def encode(self, batches: Iterable[Batch]) -> Iterator[list[np.ndarray]]:
        """The ids of each text of each batch, int32."""


class Workers:
    """A context manager: `count` processes with the tokenizer in the file `tokenizer`. What comes
    out, and in which order, does not depend on `count`."""

    def __init__(self, count: int, tokenizer: Path) -> None:
        self._count, self._tokenizer = count, tokenizer
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._all: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Workers:
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        # One thread each, since there are as many processes as are wanted.
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = "1"
        command = [sys.executable, "-m", "horovod_lm.data.workers", str(self._tokenizer)]
        # Ctrl-C goes to the whole group, and what is still starting would answer with a traceback:
        # so they are born with it blocked, and the process that starts them decides what it means.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(self._count):
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
                )
                self._all.append(process)
                self._idle.put(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # A thread for each process, which waits for it.
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="tokenise")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._all:
            if value is not None:
                process.kill()
            elif process.stdin:
                process.stdin.close()
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    with suppress(OSError):  # what it still held for a process that is gone
                        stream.close()

    def encode(self, batches: Iterable[Batch]) -> Iterator[list[np.ndarray]]:
        """The ids of each text of each batch. Raises `RunFailed` if a process ended, `UserError` as
        the tokenizer does."""
        waiting: deque[Future[list[np.ndarray]]] = deque()
        for batch in batches:
            waiting.append(self._threads.submit(self._one, batch))
            if len(waiting) > 2 * self._count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _one(self, batch: Batch) -> list[np.ndarray]:
        process = self._idle.get()
        assert process.stdin and process.stdout
        try:
            _send(process.stdin, [text.encode() for text in batch])
            parts = _receive(process.stdout)
        except OSError:
            parts = None
        finally:
            # One that has gone too: who waits for it learns that in the same way.
            self._idle.put(process)
        if parts is None:
            code = process.wait()
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            raise RunFailed(
                f"a process that tokenises {how}; what is done is kept, so start it again, where "
                "memory was short with a smaller data.workers"
            )
        if parts[0]:
            raise UserError(parts[0].decode())
        return [np.frombuffer(part, dtype="<i4") for part in parts[1:]]


def _send(stream: IO[bytes], parts: list[bytes]) -> None:
    head = np.array([len(parts), *map(len, parts)], dtype="<u4").tobytes()
    total = len(head) + sum(map(len, parts))
    stream.write(b"".join([total.to_bytes(8, "little"), head, *parts]))
    stream.flush()


def _receive(stream: IO[bytes]) -> list[bytes] | None:
    """The parts of the next message; None if the other side has gone."""
    size = int.from_bytes(stream.read(8), "little")
    data = stream.read(size)
    if not size or len(data) < size:
        return None
    count = int.from_bytes(data[:4], "little")
    ends = np.frombuffer(data, dtype="<u4", count=count, offset=4).cumsum(dtype=np.int64)
    ends += 4 + 4 * count
    starts = [4 + 4 * count, *ends[:-1].tolist()]
    return [data[a:b] for a, b in zip(starts, ends.tolist(), strict=True)]


def main() -> None:
    """Tokenise until the input ends."""
    from horovod_lm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(Path(sys.argv[1]))
    try:
        while (parts := _receive(sys.stdin.buffer)) is not None:
            texts = [part.decode() for part in parts]
            try:
                answer = [b"", *(ids.tobytes() for ids in tokenizer.encode_batch(texts))]
            except UserError as error:
                answer = [str(error).encode()]
            _send(sys.stdout.buffer, answer)
    except BrokenPipeError:
        os._exit(0)  # nobody is left who would read it


if __name__ == "__main__":
    main()
