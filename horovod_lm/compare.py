"""The same run in two frameworks, in alternation, and a report of how they differ."""

from __future__ import annotations

import json
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from horovod_lm.backend import backend_names
from horovod_lm.config import Config, to_toml
from horovod_lm.data.prepare import prepare
from horovod_lm.environment import rank_environment
from horovod_lm.errors import HorovodLmError, RunFailed, Stopped, UserError
from horovod_lm.installed import require_horovod
from horovod_lm.launch import (
    MARKER,
    Guard,
    Job,
    cores_warning,
    find_launcher,
    launch_command,
    launch_environment,
    new_marker,
)
from horovod_lm.report.results import Comparison
from horovod_lm.report.runs import WARM_UP, Follower, Slice, read_run
from horovod_lm.report.terminal import Display, make_console, print_results
from horovod_lm.run_folder import STATE
from horovod_lm.variants import display_name

BACKENDS = ("torch", "tensorflow")
REPORT = "report.json"
# A sleeping job must not sleep so long that anything in it takes the others for dead.
SLICE_SECONDS = 12.0
MOST_ROUNDS, LEAST_ROUNDS, STEPS_OF_A_ROUND = 7, 3, 20
_POLL_SECONDS = 0.02


def compare(config: Config, output: Path) -> int:
    """Train `config` in both frameworks on `launch.ranks` ranks and write the report to `output`.

    Returns 0, or 3 if fp32 loss curves differ by more than the margin. Raises `UserError` before
    anything has started, `RunFailed` (with the failed run's exit code) or `Stopped`.
    """
    output = output.absolute()
    check_installed(config)
    check_unused(output)
    console = make_console()
    prepare(config)
    warnings = [text for text in [cores_warning(config)] if text]
    for text in warnings:
        console.print(f"warning: {text}", markup=False)
    claim(output, config)
    try:
        slices = _Driver(config, output, console).run()
        runs = read_run(output / BACKENDS[0]), read_run(output / BACKENDS[1])
        comparison = Comparison(config, runs, slices, warnings, BACKENDS)
        page = _write_report(comparison, output)
    except BaseException as error:
        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        _mark(output, "stopped" if stopped else "failed", str(error) or type(error).__name__)
        raise
    print_results(comparison, console)
    console.print(f"report: {page}", markup=False)
    return 3 if comparison.same is False else 0


def check_installed(config: Config) -> None:
    """Raise `UserError` unless the launcher, both frameworks and a Horovod for them are here. No
    framework is imported."""
    find_launcher(config.launch.launcher)
    for backend in BACKENDS:
        if backend not in backend_names():
            raise UserError(f"backend {backend} is not installed; pip install horovod_lm")
        if find_spec(backend) is None:
            raise UserError(
                f"compare needs both frameworks, and {backend} is missing; "
                f"pip install 'horovod_lm[{backend}]'"
            )
        require_horovod(backend)


def check_unused(output: Path) -> None:
    """Raise `UserError` if a run or a comparison is in the folder. One that failed before either
    run began is none."""
    used = any((output / name / STATE).exists() for name in (*BACKENDS, "."))
    if (output / REPORT).exists():
        report = json.loads((output / REPORT).read_text(encoding="utf-8"))
        used = used or report["state"] in ("running", "finished")
    if used:
        raise UserError(
            f"output.folder = {output} is in use: there is a run in it; give another --output"
        )


def claim(output: Path, config: Config) -> None:
    """Make the folder of a comparison, which no other may then use. Raises `UserError`."""
    check_unused(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.toml").write_text(to_toml(config), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"output.folder = {output} can't be written: {error.strerror}; give another --output"
        ) from None
    _mark(output, "running", "")


def _mark(output: Path, state: str, message: str) -> None:
    """Say in `report.json` that what lies in the folder is not whole."""
    values = {"schema": 1, "state": state, "message": message}
    with suppress(OSError):  # a full disk is what may have brought us here
        (output / REPORT).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _write_report(comparison: Comparison, output: Path) -> Path:
    from horovod_lm.report.page import write_page

    page = output / "report.html"
    text = json.dumps(comparison.as_json(), indent=1, ensure_ascii=False)
    try:
        write_page(comparison, page)
        (output / REPORT).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunFailed(
            f"both runs are finished, but the report can't be written to {output}: {error.strerror}"
        ) from None
    return page


class _Driver:
    """Both jobs, of which one at a time is awake.

    A stopped process (SIGSTOP) costs nothing and does not poll, so each has the machine for itself
    in its slices, and both pass through the same minutes of a machine whose speed drifts.
    """

    def __init__(self, config: Config, output: Path, console: Console) -> None:
        self._config, self._output = config, output
        self._names = [display_name(backend) for backend in BACKENDS]
        self._marker = new_marker()
        self._jobs = [
            Job(name, f"{self._marker}/{backend}", elsewhere=config.launch.hosts is not None)
            for name, backend in zip(self._names, BACKENDS, strict=True)
        ]
        self._followers = [Follower(output / b / "metrics.jsonl") for b in BACKENDS]
        self._slices: list[Slice] = []
        self._display = Display(self._names, config.train.steps, console)
        self._signal: int | None = None

    def run(self) -> list[Slice]:
        """Both runs from start to end; returns the slices. Leaves no process behind."""
        guard = Guard(self._marker)
        try:
            with self._listening(), self._display:
                try:
                    for which in (0, 1):
                        self._start(which)
                    self._alternate()
                finally:
                    for job in self._jobs:
                        job.stop()
        finally:
            guard.close()
        return self._slices

    def _start(self, which: int) -> None:
        """Start a job and put it to sleep after its warm-up."""
        backend, launch = BACKENDS[which], self._config.launch
        arguments = [sys.executable, "-m", "horovod_lm", "train", str(self._output / "config.toml")]
        arguments += ["--backend", backend, "--output", str(self._output / backend)]
        settings = rank_environment(self._config, launch.threads)
        job = self._jobs[which]
        job.start(
            launch_command(self._config, arguments, [*settings, MARKER]),
            launch_environment(settings, job.marker),
            self._output / f"{backend}.log",
        )
        ranks = f"{launch.ranks} rank" + ("" if launch.ranks == 1 else "s")
        self._display.say(f"{self._names[which]}: starting {ranks} with {launch.launcher}")
        begin = time.monotonic()
        self._advance(which, min(WARM_UP, self._config.train.steps), "starting")
        seconds = time.monotonic() - begin
        self._display.turn(which, self._followers[which], f"started in {seconds:.1f} s")

    def _alternate(self) -> None:
        """Give the rest of the steps to both in turns, in the same number of slices."""
        steps = self._config.train.steps
        rounds, slices_of_a_round = self._plan()
        count = rounds * slices_of_a_round
        for number in range(count):
            target = WARM_UP + (steps - WARM_UP) * (number + 1) // count
            # First and second take turns at going first, so that a steady drift favours neither.
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                round_ = number // slices_of_a_round
                state = f"round {round_ + 1} of {rounds}"
                begin = time.time()
                last = number == count - 1
                self._advance(which, None if last else target, state)
                self._slices.append(Slice(round_, BACKENDS[which], begin, time.time()))
                state = "finished" if last else f"asleep after {state}"
                self._display.turn(which, self._followers[which], state)

    def _plan(self) -> tuple[int, int]:
        """Rounds, and slices of each backend in a round, from the speed of the first steps."""
        left = self._config.train.steps - WARM_UP
        if left < LEAST_ROUNDS:
            return 1, 1
        slowest = max(
            statistics.median(row["seconds"] for row in follower.steps[-5:])
            for follower in self._followers
        )
        rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, left // STEPS_OF_A_ROUND))
        return rounds, max(1, round(left * slowest / rounds / SLICE_SECONDS))

    def _advance(self, which: int, target: int | None, state: str) -> None:
        """Let one job run up to step `target`, or to its end, and sleep again."""
        job, follower = self._jobs[which], self._followers[which]
        if job.asleep:
            job.resume()
        while target is None or follower.step < target:
            time.sleep(_POLL_SECONDS)
            if self._signal is not None:
                raise self._stopped()
            ended = job.poll() is not None
            if follower.poll():
                self._display.progress(which, follower, state)
            if ended:
                self._ended(which)
                return
        if job.poll() is None:
            job.pause()

    def _ended(self, which: int) -> None:
        """A job has ended: raise unless its run is finished."""
        job, log = self._jobs[which], self._output / f"{BACKENDS[which]}.log"
        code = job.exit_code
        if code == 0 and self._followers[which].step == self._config.train.steps:
            return
        shown = "\n".join(f"  {line}" for line in job.tail())
        error = RunFailed(f"{job.name}'s run failed: {job.why()}. The end of {log}:\n{shown}")
        error.exit_code = code or 1
        raise error

    def _stopped(self) -> HorovodLmError:
        code = 130 if self._signal == signal.SIGINT else 75
        return Stopped(f"stopped by a signal; what there is lies in {self._output}", code)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Signals end the work in order; a second one ends it at once."""

        def note(number: int, frame: Any) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt
            self._signal = number

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
