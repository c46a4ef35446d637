"""Contestants in processes, or jobs of ranks, of their own, of which one at a time is awake."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from horovod_lm.bench.rounds import Sample
from horovod_lm.config import Config, with_keys
from horovod_lm.environment import rank_environment
from horovod_lm.errors import RunFailed, UserError
from horovod_lm.launch import (
    MARKER,
    Guard,
    Job,
    kill_all,
    launch_command,
    launch_environment,
    new_marker,
    send_all,
)

START_SECONDS = 600  # a compilation on a busy machine takes its time


def threads_environment(threads: int) -> dict[str, str]:
    """What limits a process to so many threads, and nothing else."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


class Stage(AbstractContextManager["Stage"]):
    """The processes of one benchmark. When it is left, however that is, none stays behind."""

    def __init__(self) -> None:
        self._marker = new_marker()
        self._processes: list[Process] = []

    def __enter__(self) -> Stage:
        self._folder = Path(tempfile.mkdtemp(prefix="horovod-lm-bench-"))
        self._guard = Guard(self._marker)
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        self._guard.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def clear(self) -> None:
        """End all processes."""
        kill_all(self._marker)
        for process in self._processes:
            process.close()
        self._processes.clear()

    def start(
        self,
        name: str,
        work: str,
        arguments: Mapping[str, Any],
        *,
        config: Config | None = None,
        threads: int = 1,
        ranks: int | None = None,
        torchrun: bool = False,
    ) -> Process:
        """Start a process with the `horovod_lm.bench.worker.Work` that `work` (`module:name`)
        makes of `arguments`, wait until it is made, and put it to sleep.

        With `config` it gets the environment that our launcher gives a rank (threads, allocator,
        polling), without it the user's, with the same number of threads. `ranks`: as a job of the
        config's launcher, or of torchrun; None: a process without a launcher. Raises `UserError`
        for what the work says is the user's mistake, `RunFailed` if it can't be made.
        """
        ours = {} if config is None else rank_environment(config, threads)
        fixed = threads_environment(threads)
        number = len(self._processes)
        address = self._folder / f"{number}.socket"
        command = [sys.executable, "-m", "horovod_lm.bench.worker", str(address), work]
        command += [json.dumps(dict(arguments))]
        if torchrun:
            command[1:2] = ["-m", "torch.distributed.run", "--standalone"]
            command[4:4] = [f"--nproc-per-node={ranks}", "--module"]
        elif ranks is not None:
            assert config is not None
            config = with_keys(config, launch={"ranks": ranks})
            command = launch_command(config, command, [*ours, *fixed, MARKER])
        marker = f"{self._marker}/{number}"
        environment = {**launch_environment(ours, marker), **fixed}
        process = Process(name, marker, address, self._folder / f"{number}.log")
        self._processes.append(process)
        process.start(command, environment)
        return process


class Process:
    """A process or job that serves turns, asleep while it has none; `parts` are the things that
    its work can do."""

    def __init__(self, name: str, marker: str, address: Path, log_file: Path) -> None:
        self.name, self._address, self._log_file = name, address, log_file
        self._job = Job(name, marker)
        self._answers: Any = None
        self._listener: socket.socket | None = None

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """See `Stage.start`."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._address))
        self._listener.listen(1)
        self._job.start(command, environment, self._log_file)
        self._listener.settimeout(0.2)
        end = time.monotonic() + START_SECONDS
        while self._answers is None:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                if self._job.poll() is not None or time.monotonic() > end:
                    raise self._failed() from None
                continue
            connection.settimeout(START_SECONDS)
            self._answers = connection.makefile("rw", encoding="utf-8")
        self.parts: list[str] = self._receive()["parts"]
        self._sleep()

    def contestant(self, label: str, part: str = "", factor: float = 1.0) -> Turns:
        """One of the things that this process can do, warmed up; `factor` turns the units of its
        steps into those of its samples."""
        turns = Turns(label, self, part, factor)
        answer = self.ask({"part": part})
        turns.first_seconds, turns.step_seconds = answer["first_seconds"], answer["step_seconds"]
        turns.memory_mib = answer["memory_mib"]
        return turns

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Wake it, let it do what is asked, put it to sleep; its answer."""
        send_all(self._job.marker, signal.SIGCONT)
        try:
            self._answers.write(json.dumps(question) + "\n")
            self._answers.flush()
            return self._receive()
        except OSError as error:  # it has ended
            raise self._failed() from error
        finally:
            self._sleep()

    def close(self) -> None:
        """Wait for its end, after it was killed."""
        if self._answers is not None:
            with suppress(OSError):
                self._answers.close()
        if self._listener is not None:
            self._listener.close()
            self._address.unlink(missing_ok=True)  # the next process takes its name
        if self._job.process is not None:
            self._job.wait(5.0)

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._answers.readline()
        except OSError as error:  # it takes for ever
            raise self._failed() from error
        if not line:
            raise self._failed()
        answer: dict[str, Any] = json.loads(line)
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        if "failure" in answer:
            raise RunFailed(f"{self.name} failed: {answer['failure']}")
        return answer

    def _sleep(self) -> None:
        send_all(self._job.marker, signal.SIGSTOP)

    def _failed(self) -> RunFailed:
        self._job.wait(10.0)  # the connection closes before the process has ended
        shown = "\n".join(f"  {line}" for line in self._job.tail())
        why = self._job.why() if self._job.poll() is not None else "it does not answer"
        return RunFailed(f"{self.name} failed: {why}. The end of its log:\n{shown}")


class Turns:
    """A contestant whose turns a process takes; see `Process.contestant`.

    `first_seconds`: of the first step, tracing and compilation included; `step_seconds`: of a warm
    one; `memory_mib`: peak resident memory of its (first) rank after the warm-up.
    """

    first_seconds: float
    step_seconds: float
    memory_mib: float

    def __init__(self, label: str, process: Process, part: str, factor: float) -> None:
        self.label, self._process, self._part, self._factor = label, process, part, factor

    def run(self, seconds: float) -> Sample:
        """See `horovod_lm.bench.rounds.Contestant`."""
        answer = self._process.ask({"part": self._part, "seconds": seconds})
        return Sample(answer["seconds"], answer["units"] * self._factor)


class Together:
    """Contestants of several processes at the same time, as one whose rate is the sum of theirs."""

    def __init__(self, label: str, turns: Sequence[Turns]) -> None:
        self.label, self._turns = label, turns
        self.first_seconds = max(one.first_seconds for one in turns)
        self.memory_mib = max(one.memory_mib for one in turns)

    def run(self, seconds: float) -> Sample:
        """See `horovod_lm.bench.rounds.Contestant`."""
        with ThreadPoolExecutor(len(self._turns)) as pool:
            samples = list(pool.map(lambda one: one.run(seconds), self._turns))
        return Sample(1.0, sum(sample.rate for sample in samples))
