"""`horovod-lm bench scaling`: ranks against one rank, and against DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from horovod_lm.bench.display import Display
from horovod_lm.bench.processes import Process, Stage, Together, Turns
from horovod_lm.bench.result import BenchResult, Column, Ratio
from horovod_lm.bench.rounds import Rounds, interleave
from horovod_lm.bench.throughput import BACKENDS, WORKS, check_peers
from horovod_lm.bench.tools import DISTRIBUTED, PeerKind
from horovod_lm.bench.training import arguments
from horovod_lm.config import Config, with_keys
from horovod_lm.errors import UserError
from horovod_lm.topology import usable_cores

# What `--launcher` calls them: launch.launcher and launch.controller.
LAUNCHERS = {
    "mpirun": ("mpirun", "mpi"),
    "horovodrun": ("horovodrun", "mpi"),
    "gloo": ("horovodrun", "gloo"),
    "srun": ("srun", "mpi"),
}
# A launcher that starts none: runs of one rank each, at the same time, which do not communicate.
APART = "apart"
# Weak: every rank has the config's batch; strong: the ranks share it.
MODES = ("weak", "strong")
EFFICIENCY_AIM, PEER_AIM = 0.98, 1.05  # of two ranks, weak, under mpirun

COLUMNS = (
    Column("contestant", "contestant"),
    Column("launcher", "launcher"),
    Column("ranks", "ranks"),
    Column("batch", "batch"),
    Column("tokens_per_second", "tokens/s", digits=4),
    Column("interval", "95% interval", digits=4),
    Column("efficiency", "efficiency", share=True),
    Column("memory_mib", "MiB a rank"),
)


@dataclass(frozen=True)
class Job:
    """A backend or a peer (`kind`) on `ranks` ranks."""

    kind: str | PeerKind
    launcher: str
    ranks: int

    @property
    def name(self) -> str:
        """What tables call the backend or peer."""
        return self.kind.label if isinstance(self.kind, PeerKind) else BACKENDS[self.kind]

    def label(self, mode: str) -> str:
        """Of its turns in that mode of scaling."""
        return f"{self.name}, {self.launcher}, {self.ranks}, {mode}"

    def batches(self, batch: int, modes: Sequence[str]) -> dict[str, int]:
        """The global batch size in each mode, where `batch` is that of one rank."""
        if self.ranks == 1 or self.launcher == APART:
            return {"weak": batch * self.ranks}  # of one rank as strong
        return {mode: batch * self.ranks if mode == "weak" else batch for mode in modes}


@dataclass(frozen=True)
class Lane:
    """A contestant: a job in one mode of scaling, its global batch size, and its turns."""

    job: Job
    mode: str
    batch: int
    turns: Turns | Together


def measure(
    config: Config,
    *,
    ranks: Sequence[int],
    launchers: Sequence[str],
    modes: Sequence[str],
    backends: Sequence[str],
    peers: Sequence[str],
    rounds: int,
    seconds: float,
) -> BenchResult:
    """Measure the backends on each number of ranks (1 is always measured) under each launcher, with
    `launch.threads` (default 1) threads a rank, all interleaved. `peers` are names of
    `DISTRIBUTED`.

    Raises `UserError` for a batch that the ranks can't share.
    """
    kinds = [kind for kind in DISTRIBUTED if kind.name in peers]
    check_peers(config, kinds)
    config = with_keys(config, train={"micro_batch_size": None})
    batch, threads = config.train.global_batch_size, config.launch.threads or 1
    if "strong" in modes and batch < max(ranks):
        raise UserError(
            f"train.global_batch_size = {batch} can't be shared by {max(ranks)} ranks; "
            f"raise it, or give --modes weak"
        )
    jobs = _jobs(ranks, launchers, modes, backends, kinds)
    lanes, measured = _race(config, jobs, modes, rounds, seconds)
    result = BenchResult(
        "scaling",
        f"Training on ranks of {threads} thread{'' if threads == 1 else 's'}, "
        f"width {config.model.width}, {config.model.layers} layers, context {config.model.context}",
        COLUMNS,
        settings={
            "rounds": rounds,
            "seconds": seconds,
            "threads": threads,
            "precision": config.train.precision,
            "model": config.model.model_dump(mode="json"),
            "batch": batch,
        },
    )
    _report(result, lanes, measured, kinds)
    result.notes = _notes(max(ranks), threads)
    return result


def _jobs(
    ranks: Sequence[int],
    launchers: Sequence[str],
    modes: Sequence[str],
    backends: Sequence[str],
    peers: Sequence[PeerKind],
) -> list[Job]:
    """Every job that is measured, those of one rank among them."""
    several = sorted(set(ranks) - {1})
    ways = [*launchers, *([APART] if "weak" in modes else [])]
    jobs = [Job(backend, "mpirun", 1) for backend in backends]
    jobs += [Job(backend, way, n) for n in several for way in ways for backend in backends]
    jobs += [Job(peer, "torchrun", n) for n in [1, *several] for peer in peers]
    return jobs


def _notes(ranks: int, threads: int) -> list[str]:
    """What a reader must know; `ranks` are the most that were measured."""
    notes = [
        "Weak: every rank has the batch of one rank; strong: the ranks share it. "
        "Efficiency is the rate over ranks x the rate of one rank.",
        "Apart: runs of one rank each at the same time, which do not communicate; what they lose "
        "to one alone, they lose to shared caches, memory and clock rate.",
        "DDP is torch's DistributedDataParallel over Gloo, started by torchrun.",
    ]
    cores = usable_cores()
    if ranks * threads > cores:
        notes.append(
            f"{ranks} ranks share {cores} cores here: they take turns, so their efficiency says "
            "little."
        )
    return notes


def _race(
    config: Config, jobs: Sequence[Job], modes: Sequence[str], rounds: int, seconds: float
) -> tuple[list[Lane], Rounds]:
    """Start the jobs, and let them take their turns."""
    batches = [job.batches(config.train.global_batch_size, modes) for job in jobs]
    count = rounds * sum(map(len, batches))
    lanes: list[Lane] = []
    with Display(count, "tokens") as display, Stage() as stage:
        display.say(
            f"{count} turns of {seconds:g} s ({count * seconds / 60:.1f} min), and the time in "
            f"which {len(jobs)} jobs start"
        )
        for job, sizes in zip(jobs, batches, strict=True):
            for mode, turns in _contestants(stage, config, job, sizes).items():
                lanes.append(Lane(job, mode, sizes[mode], turns))
            first = lanes[-1].turns.first_seconds
            display.say(f"{job.name}, {job.launcher}, {job.ranks}: first step {first:.1f} s")
        display.say(f"measuring {len(lanes)} contestants")
        return lanes, interleave([lane.turns for lane in lanes], rounds, seconds, display.turn)


def _contestants(
    stage: Stage, config: Config, job: Job, sizes: Mapping[str, int]
) -> dict[str, Turns | Together]:
    """The started job in each mode."""
    if job.launcher != APART:
        process = _start(stage, config, job, sizes)
        return {mode: process.contestant(job.label(mode), mode) for mode in sizes}
    alone, (mode, size) = Job(job.kind, "mpirun", 1), *sizes.items()
    processes = [_start(stage, config, alone, {mode: size // job.ranks}) for _ in range(job.ranks)]
    turns = [process.contestant(job.label(mode), mode) for process in processes]
    return {mode: Together(job.label(mode), turns)}


def _start(stage: Stage, config: Config, job: Job, sizes: Mapping[str, int]) -> Process:
    """The job, whose parts are batches of these sizes."""
    name, ranks, threads = f"{job.name} on {job.ranks}", job.ranks, config.launch.threads or 1
    if isinstance(job.kind, PeerKind):
        config = with_keys(config, launch={"backend": job.kind.backend})
        given = arguments(config, threads, peer=job.kind.name, sizes=sizes)
        work = WORKS + "PeerTraining"
        return stage.start(name, work, given, threads=threads, ranks=ranks, torchrun=True)
    program, controller = LAUNCHERS[job.launcher]
    launch = {"backend": job.kind, "launcher": program, "controller": controller}
    config = with_keys(config, launch=launch)
    given = arguments(config, threads, sizes=sizes)
    work = WORKS + "OwnTraining"
    return stage.start(name, work, given, config=config, threads=threads, ranks=ranks)


def _words(job: Job) -> str:
    return f"{job.ranks} runs apart" if job.launcher == APART else job.name


def _report(
    result: BenchResult, lanes: Sequence[Lane], measured: Rounds, peers: Sequence[PeerKind]
) -> None:
    """Add rows and ratios."""
    single = {lane.job.name: lane.turns.label for lane in lanes if lane.job.ranks == 1}
    for lane in lanes:
        job, label = lane.job, lane.turns.label
        value, interval = measured.ratio(label, single[job.name], 1 / job.ranks)
        row: dict[str, Any] = {
            "contestant": job.name,
            "launcher": job.launcher,
            "ranks": job.ranks,
            "mode": "one" if job.ranks == 1 else lane.mode,
            "batch": f"{lane.batch} ({lane.mode})" if job.ranks > 1 else f"{lane.batch}",
            "tokens_per_second": measured.rate(label),
            "interval": measured.interval(label),
            "efficiency": value,
            "first_seconds": lane.turns.first_seconds,
            "memory_mib": lane.turns.memory_mib,
            "rounds": measured.rates(label),
        }
        result.rows.append(row)
        if job.ranks == 1:
            continue
        where = {"launcher": job.launcher, "ranks": job.ranks, "scaling": lane.mode}
        judged = job.launcher == "mpirun" and lane.mode == "weak" and job.ranks == 2
        aim = EFFICIENCY_AIM if judged else None
        name = f"{job.name} / {job.ranks} x one rank"
        result.ratios.append(Ratio(name, value, interval, aim, where=where))
        others = [Job(peer, "torchrun", job.ranks) for peer in peers]
        if lane.mode == "weak":
            others.append(Job(job.kind, APART, job.ranks))
        for other in [] if job.kind in peers or job.launcher == APART else others:
            value, interval = measured.ratio(label, other.label(lane.mode))
            aim = PEER_AIM if judged and other.launcher != APART else None
            name = f"{job.name} / {_words(other)}"
            result.ratios.append(Ratio(name, value, interval, aim, where=where))
