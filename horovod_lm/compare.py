"""The same run in several variants, in alternation, and a report of how they differ."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.console import Console

from horovod_lm.backend import require_backend
from horovod_lm.config import Config, to_toml, with_keys
from horovod_lm.data.prepare import prepare
from horovod_lm.environment import rank_environment
from horovod_lm.errors import HorovodLmError, RunFailed, Stopped, UserError
from horovod_lm.launch import (
    MARKER,
    Guard,
    Job,
    cores_warning,
    find_launcher,
    launch_command,
    launch_environment,
    members,
    new_marker,
)
from horovod_lm.profiles import TRACE, merge_traces
from horovod_lm.report.results import Comparison
from horovod_lm.report.runs import (
    REPORT,
    WARM_UP,
    Follower,
    Run,
    Slice,
    read_run,
    seed_folder,
)
from horovod_lm.report.schema import Unfinished
from horovod_lm.report.terminal import Display, make_console, print_results
from horovod_lm.run_folder import STATE
from horovod_lm.statistics import LEAST_ROUNDS
from horovod_lm.variants import Variant, display_names

BACKENDS = ("torch", "tensorflow")  # our own
# A sleeping job must not sleep so long that anything in it takes the others for dead.
SLICE_SECONDS = 12.0
MOST_ROUNDS, STEPS_OF_A_ROUND, LEAST_STEPS_OF_A_ROUND = 20, 20, 8
PROFILED_STEPS = 3
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Options:
    """How a comparison is made: `rounds` (None: by the length of the run) for each of `seeds`
    seeds, whose final losses may lie `margin` nats apart; `profile`: of the last few steps;
    `as_json`: the figures go to stdout, and all else to stderr; `began`: when the command did, as
    `time.time()` tells it."""

    rounds: int | None
    seeds: int
    margin: float
    profile: bool
    as_json: bool
    began: float


def compare(variants: Sequence[Variant], output: Path, options: Options) -> int:
    """Train every variant, with every seed, and write the report to `output`.

    Returns 0, or 3 if curves of what is meant to be the same differ by more than the margin, or
    final losses are not equivalent. Raises `UserError` before anything has started, `RunFailed`
    (with the failed run's exit code) or `Stopped`.
    """
    output = output.absolute()
    configs = [variant.config for variant in variants]
    check_installed(configs)
    check_unused(output, variants, options.seeds)
    check_rounds(configs, options)
    console = make_console(options.as_json)

    def log(text: str) -> None:
        console.print(text, markup=False)

    for config in _of_other_data(configs):
        prepare(config, log)
    found = (cores_warning(config) for config in configs)
    warnings = list(dict.fromkeys(text for text in found if text))
    for text in warnings:
        log(f"warning: {text}")
    claim(output, variants, options.seeds)
    try:
        comparison = _run(variants, output, options, console, warnings)
        page = _write_report(comparison, output)
        trace = _merge_traces(comparison, output)
    except BaseException as error:
        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        _mark(output, "stopped" if stopped else "failed", str(error) or type(error).__name__)
        raise
    print_results(comparison, console)
    if trace:
        log(f"trace, for a viewer such as ui.perfetto.dev: {trace}")
    log(f"report: {page}")
    if options.as_json:
        sys.stdout.write((output / REPORT).read_text(encoding="utf-8"))
    return 3 if comparison.same is False else 0


def _run(
    variants: Sequence[Variant],
    output: Path,
    options: Options,
    console: Console,
    warnings: Sequence[str],
) -> Comparison:
    """One seed after the other; within each, all variants in alternation."""
    seeds: list[list[Run]] = []
    slices: list[Slice] = []
    starts: list[float] = []
    before = time.time() - options.began
    for number in range(options.seeds):
        folder = seed_folder(output, number)
        jobs = [_seeded(variant, number) for variant in variants]
        if number == 0 and options.profile:
            jobs = [_profiled(variant) for variant in jobs]
        if options.seeds > 1:
            console.print(f"seed {number + 1} of {options.seeds}", markup=False)
        driver = _Driver(jobs, folder, console, options.rounds)
        earlier = 1 + max((s.round for s in slices), default=-1)
        slices += [replace(s, round=s.round + earlier, seed=number) for s in driver.run()]
        starts = starts or driver.starts
        seeds.append([read_run(folder / variant.label) for variant in variants])
    return Comparison(
        variants[0].config,
        seeds[0],
        slices,
        warnings,
        [variant.label for variant in variants],
        seeds=seeds[1:],
        margin=options.margin,
        starts=starts,
        before=before,
    )


def _seeded(variant: Variant, number: int) -> Variant:
    """The variant with the config's seed + `number`."""
    seed = variant.config.train.seed + number
    return replace(variant, config=with_keys(variant.config, train={"seed": seed}))


def _profiled(variant: Variant) -> Variant:
    """The variant with a profile of its last steps, if it has enough of them and the config names
    no others. A backend that is not ours may have no profiler."""
    config, steps = variant.config, variant.config.train.steps
    if config.output.profile or config.launch.backend not in BACKENDS or not _left(steps, True):
        return variant
    span = f"{steps - PROFILED_STEPS + 1}:{steps}"
    return replace(variant, config=with_keys(config, output={"profile": span}))


def _of_other_data(configs: Sequence[Config]) -> list[Config]:
    """Those configs whose data has not been prepared, or checked, for one before them."""
    found = {(c.data, c.model.context, c.batching, c.objective): c for c in reversed(configs)}
    return list(found.values())[::-1]


def check_installed(configs: Sequence[Config]) -> None:
    """Raise `UserError` unless every launcher, framework and a Horovod for it are here. No
    framework is imported."""
    for launcher in dict.fromkeys(config.launch.launcher for config in configs):
        find_launcher(launcher)
    for backend in dict.fromkeys(config.launch.backend for config in configs):
        require_backend(backend)


def check_rounds(configs: Sequence[Config], options: Options) -> None:
    """Raise `UserError` if the runs are too short for so many rounds."""
    steps = min(config.train.steps for config in configs)
    most = _left(steps, options.profile) // LEAST_STEPS_OF_A_ROUND
    if options.rounds is not None and options.rounds > most:
        raise UserError(
            f"--rounds {options.rounds}: of train.steps = {steps}, {WARM_UP} are warm-up, and a "
            f"round takes {LEAST_STEPS_OF_A_ROUND}; give at most {most}, or more steps"
        )


def _left(steps: int, profile: bool) -> int:
    """Steps whose speed may count."""
    return max(0, steps - WARM_UP - (PROFILED_STEPS if profile else 0))


def check_unused(output: Path, variants: Sequence[Variant], seeds: int) -> None:
    """Raise `UserError` if a run or a comparison is in the folder. One that failed before any run
    began is none."""
    folders = [output, *_run_folders(output, variants, seeds)]
    used = any(os.path.exists(folder / STATE) for folder in folders)
    if used or _is_kept(output / REPORT):
        raise UserError(
            f"output.folder = {output} is in use: there is a run or a report in it; give another "
            "--output"
        )


def _is_kept(report: Path) -> bool:
    """Whether a `report.json` may not be written over: one that can't be read may be anybody's."""
    try:
        state = json.loads(report.read_text(encoding="utf-8"))["state"]
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True
    return state not in ("failed", "stopped")


def _run_folders(output: Path, variants: Sequence[Variant], seeds: int) -> list[Path]:
    return [seed_folder(output, n) / variant.label for n in range(seeds) for variant in variants]


def claim(output: Path, variants: Sequence[Variant], seeds: int) -> None:
    """Make the folder of a comparison, which no other may then use. Raises `UserError`."""
    check_unused(output, variants, seeds)
    try:
        for folder in _run_folders(output, variants, seeds):
            folder.mkdir(parents=True, exist_ok=True)
        (output / "config.toml").write_text(to_toml(variants[0].config), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"output.folder = {output} can't be written: {error.strerror}; give another --output"
        ) from None
    _mark(output, "running", "")


def _mark(output: Path, state: Literal["running", "failed", "stopped"], message: str) -> None:
    """Say in `report.json` that what lies in the folder is not whole."""
    text = Unfinished(state=state, message=message).model_dump_json(indent=1, by_alias=True)
    with suppress(OSError):  # a full disk is what may have brought us here
        (output / REPORT).write_text(text + "\n", encoding="utf-8")


def _write_report(comparison: Comparison, output: Path) -> Path:
    from horovod_lm.report.page import write_page

    page = output / "report.html"
    text = json.dumps(comparison.as_json(), indent=1, ensure_ascii=False)
    try:
        write_page(comparison, page)
        (output / REPORT).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunFailed(
            f"all runs are finished, but the report can't be written to {output}: {error.strerror}"
        ) from None
    return page


def _merge_traces(comparison: Comparison, output: Path) -> Path | None:
    """One trace of all variants that were profiled, side by side."""
    named = zip(comparison.runs, comparison.names, strict=True)
    found = {run.folder / TRACE: name for run, name in named if (run.folder / TRACE).exists()}
    if len(found) < 2:
        return None
    merge_traces(list(found), list(found.values()), output / TRACE)
    return output / TRACE


class _Driver:
    """The jobs of all variants with one seed, of which one at a time is awake.

    A stopped process (SIGSTOP) costs nothing and does not poll, so each has the machine for itself
    in its slices, and all pass through the same minutes of a machine whose speed drifts.
    """

    def __init__(
        self, variants: Sequence[Variant], folder: Path, console: Console, rounds: int | None
    ) -> None:
        self._variants, self._folder, self._rounds = variants, folder, rounds
        self._configs = [variant.config for variant in variants]
        self._names = display_names(self._configs)
        self._marker = new_marker()
        self._jobs = [
            Job(name, f"{self._marker}/{variant.label}", elsewhere=config.launch.hosts is not None)
            for name, variant, config in zip(self._names, variants, self._configs, strict=True)
        ]
        self._followers = [Follower(folder / v.label / "metrics.jsonl") for v in variants]
        self._slices: list[Slice] = []
        self._display = Display(self._names, [c.train.steps for c in self._configs], console)
        self._signal: int | None = None
        self.starts: list[float] = []

    def run(self) -> list[Slice]:
        """All runs from start to end; returns the slices. Leaves no process behind."""
        guard = Guard(self._marker)
        try:
            with self._listening(), self._display:
                try:
                    for which in range(len(self._jobs)):
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
        config, folder = self._configs[which], self._folder / self._variants[which].label
        (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
        arguments = [sys.executable, "-m", "horovod_lm", "train", str(folder / "config.toml")]
        arguments += ["--output", str(folder)]
        settings = rank_environment(config, config.launch.threads)
        job, follower = self._jobs[which], self._followers[which]
        begin = time.time()
        job.start(
            launch_command(config, arguments, [*settings, MARKER]),
            launch_environment(settings, job.marker),
            self._log(which),
        )
        ranks = f"{config.launch.ranks} rank" + ("" if config.launch.ranks == 1 else "s")
        self._display.say(f"{self._names[which]}: starting {ranks} with {config.launch.launcher}")
        self._advance(which, min(WARM_UP, config.train.steps), "starting")
        self.starts.append(follower.steps[0]["time"] - begin)
        state = f"first step after {self.starts[-1]:.1f} s"
        self._display.turn(which, follower, state)
        self._check_memory()

    def _check_memory(self) -> None:
        """All jobs are alive at the same time: say so before the memory runs out."""
        here = [c.launch.ranks for c in self._configs if not c.launch.hosts]
        started, left = sum(here[: len(self.starts)]), sum(here[len(self.starts) :])
        if not started or not left:
            return
        used = sum(_own_memory(process) for process in members(self._marker))
        free = psutil.virtual_memory().available
        if used / started * left > free:
            raise RunFailed(
                f"the {left} ranks that are still to start need about "
                f"{used / started * left / 2**30:.1f} GiB of memory, and only "
                f"{free / 2**30:.1f} GiB are free; compare fewer variants or ranks at a time, or a "
                f"smaller model"
            )

    def _alternate(self) -> None:
        """Give the rest of the steps to all in turns, in the same number of slices. The last one
        goes on to the end of the run, so that no sleep lies in the steps that are profiled."""
        rounds, slices_of_a_round = self._plan()
        count = max(1, rounds * slices_of_a_round)
        order = range(len(self._jobs))
        for number in range(count):
            # They take turns at going first, so that a steady drift favours none.
            for which in order if number % 2 == 0 else reversed(order):
                last = number == count - 1
                round_, share = number // slices_of_a_round, (number + 1) / count
                if rounds:
                    self._slice(which, round_, share, f"round {round_ + 1} of {rounds}", last)
                if last:
                    self._finish(which)

    def _slice(self, which: int, round_: int, share: float, state: str, last: bool) -> None:
        """One slice of a run, up to a share of its steps that count; then it sleeps, but for the
        last one."""
        config, follower = self._configs[which], self._followers[which]
        target = WARM_UP + round(share * _left(config.train.steps, bool(config.output.profile)))
        begin = time.time()
        self._advance(which, target, state, sleep=not last)
        self._slices.append(Slice(round_, self._variants[which].label, begin, time.time()))
        if not last:
            self._display.turn(which, follower, f"asleep after {state}")

    def _finish(self, which: int) -> None:
        """Let a job go on to its end: the steps that are profiled, the evaluation."""
        self._advance(which, None, "finishing")
        self._display.turn(which, self._followers[which], "finished")

    def _plan(self) -> tuple[int, int]:
        """Rounds, and slices of each run in a round, from the speed of the first steps."""
        left = min(_left(c.train.steps, bool(c.output.profile)) for c in self._configs)
        if left == 0:
            return 0, 1
        short = min(LEAST_ROUNDS, left // LEAST_STEPS_OF_A_ROUND)
        rounds = self._rounds or max(1, short, min(MOST_ROUNDS, left // STEPS_OF_A_ROUND))
        slowest = max(
            statistics.median(row["seconds"] for row in follower.steps[-5:])
            for follower in self._followers
        )
        return rounds, max(1, round(left * slowest / rounds / SLICE_SECONDS))

    def _advance(self, which: int, target: int | None, state: str, sleep: bool = True) -> None:
        """Let one job run up to step `target`, or to its end, and `sleep` again."""
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
        if sleep and job.poll() is None:
            job.pause()

    def _ended(self, which: int) -> None:
        """A job has ended: raise unless its run is finished."""
        job, log = self._jobs[which], self._log(which)
        code = job.exit_code
        if code == 0 and self._followers[which].step == self._configs[which].train.steps:
            return
        shown = "\n".join(f"  {line}" for line in job.tail())
        error = RunFailed(f"{job.name}'s run failed: {job.why()}. The end of {log}:\n{shown}")
        error.exit_code = code or 1
        raise error

    def _log(self, which: int) -> Path:
        return self._folder / f"{self._variants[which].label}.log"

    def _stopped(self) -> HorovodLmError:
        code = 130 if self._signal == signal.SIGINT else 75
        return Stopped(f"stopped by a signal; what there is lies in {self._folder}", code)

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


def _own_memory(process: psutil.Process) -> int:
    """Bytes of a process that it shares with no other."""
    try:
        return int(process.memory_full_info().uss)
    except (psutil.Error, OSError):  # it has ended
        return 0
