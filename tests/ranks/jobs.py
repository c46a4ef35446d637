"""Real jobs of several ranks, each with a time limit and nothing left behind."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from horovod_lm.config import make_config
from horovod_lm.environment import rank_environment
from horovod_lm.installed import Horovod
from horovod_lm.launch import (
    Job,
    kill_all,
    launch_command,
    launch_environment,
    members,
    new_marker,
)

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("torch", "tensorflow")
TRAIN = [sys.executable, "-m", "horovod_lm", "train"]
WORKER = [sys.executable, "-m", "tests.ranks.worker"]

_TAG = re.compile(r"^\[(?:\d+,)?\d+\]<std(?:out|err)>: ?")

needs_horovod = pytest.mark.skipif(
    not (find_spec("torch") and find_spec("tensorflow") and Horovod.find().is_ours),
    reason="needs torch, tensorflow and our Horovod",
)

TINY = """
[model]
width = 16
layers = 1
heads = 2
feed_forward = 32
context = 16
dropout = 0.1
attention_dropout = 0.1
[data]
text = ["text.txt"]
vocabulary = 300
[train]
steps = 25
global_batch_size = 6
[schedule]
warmup = 5
[evaluation]
every = 0
windows = 8
[checkpoint]
every = 10
keep = 3
[output]
tensorboard = false
[launch]
threads = 1
"""


def write_tiny(folder: Path) -> Path:
    """A config of a very small run, and its text; returns the config's path."""
    source = random.Random(1)
    words = ["a", "rank", "waits", "for", "the", "other", "one", "and", "then", "they", "add"]
    text = "\n\n".join(" ".join(source.choices(words, k=30)) + "." for _ in range(400))
    (folder / "text.txt").write_text(text)
    (folder / "tiny.toml").write_text(TINY)
    return folder / "tiny.toml"


@dataclass(frozen=True)
class Ended:
    """How a job ended: the launcher's exit status and its output. Launchers tag the lines of ranks;
    what has no tag is their own."""

    code: int
    text: str

    @property
    def lines(self) -> list[str]:
        """What the ranks said."""
        tags = [_TAG.match(line) for line in self.text.splitlines()]
        if not any(tags):
            return self.text.splitlines()
        return [tag.string[tag.end() :] for tag in tags if tag]

    @property
    def messages(self) -> list[str]:
        """The messages to the user, which begin with the program's name."""
        return [line for line in self.lines if "horovod-lm: " in line]

    def only_message(self, code: int) -> str:
        """The one message of a job whose launcher ended with `code`."""
        assert self.code == code, self.text
        assert len(self.messages) == 1, self.text
        return self.messages[0].removeprefix("horovod-lm: ")


@contextmanager
def started(
    log: Path,
    arguments: Sequence[str],
    ranks: int,
    launcher: str = "mpirun",
    controller: str = "mpi",
    stall_seconds: int = 60,
    others: Sequence[Sequence[str]] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[Job]:
    """`arguments` on `ranks` ranks (0: without a launcher), and one more rank for each of `others`;
    ended by force on leaving. Prepared data is cached beside the log."""
    launch = {
        "ranks": max(ranks, 1),
        "launcher": launcher,
        "controller": controller,
        "stall_seconds": stall_seconds,
    }
    config = make_config({"launch": launch}, "the job")  # of the launcher alone
    job = Job("the job", new_marker())
    environment = launch_environment(rank_environment(config, 1), job.marker)
    environment |= {"XDG_CACHE_HOME": str(log.parent / "cache"), "PYTHONPATH": str(ROOT)}
    environment |= env or {}
    command = launch_command(config, arguments) if ranks else list(arguments)
    for other in others:  # mpirun's way to start each rank with arguments of its own
        command += [":", "-np", "1", *other]
    job.start(command, environment, log)
    try:
        yield job
    finally:
        kill_all(job.marker)
        job.wait(5)


def ended(job: Job, limit: float = 90.0) -> Ended:
    """Wait for the job's end, and see that none of its processes is left."""
    assert job.log_file is not None
    in_time = job.wait(limit)
    text = job.log_file.read_text(errors="replace")
    assert in_time, f"it still runs after {limit} s:\n{text}"
    end = time.monotonic() + 5  # a launcher's helpers may need a moment
    while (left := members(job.marker)) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == [], text
    result = Ended(job.poll() or 0, text)
    assert "Traceback (most recent call last):" not in result.lines, text
    return result


def run_job(
    log: Path, arguments: Sequence[str], ranks: int, limit: float = 90.0, **options: Any
) -> Ended:
    """`started`, then `ended`."""
    with started(log, arguments, ranks, **options) as job:
        return ended(job, limit)


def run_plan(
    folder: Path, config: Path, plan: list[dict[str, Any]], backend: str, ranks: int, **options: Any
) -> list[list[dict[str, Any]]]:
    """Several trainings in one job of `tests.ranks.worker`: for each, what every rank says."""
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    arguments = [*WORKER, str(config), str(folder), backend]
    cache = {"XDG_CACHE_HOME": str(config.parent / "cache")}
    result = run_job(folder / "job.log", arguments, ranks, env=cache, **options)
    assert result.code == 0, result.text
    by_rank = [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(max(ranks, 1))]
    return [list(results) for results in zip(*by_rank, strict=True)]


def rows(run: Path, kind: str = "step") -> list[dict[str, Any]]:
    """Lines of a run's metrics."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(run: Path) -> list[float]:
    """The loss of each step."""
    return [row["loss"] for row in rows(run)]


def rank_process(job: Job, rank: int) -> psutil.Process:
    """The process of one rank."""
    names = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK")
    for process in members(job.marker):
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        if "python" in process.name() and str(rank) in (environment.get(n) for n in names):
            return process
    raise AssertionError(f"there is no rank {rank}")


def wait_for_step(run: Path, step: int, job: Job, limit: float = 60.0) -> None:
    """Until the run's metrics have that step."""
    end = time.monotonic() + limit
    while time.monotonic() < end and job.poll() is None:
        if (run / "metrics.jsonl").exists() and len(rows(run)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(job.log_file and job.log_file.read_text(errors="replace"))
