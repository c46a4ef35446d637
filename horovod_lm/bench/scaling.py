"""`horovod-lm bench scaling`: ranks against one rank, and against DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from horovod_lm.bench.display import Display
from horovod_lm.bench.processes import Process, Stage, Turns
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
class Lane:
    """A contestant on some ranks: the label of its turns, and what a row says of it."""

    name: str
    launcher: str
    ranks: int
    mode: str
    batch: int
    turns: Turns

    @property
    def label(self) -> str:
        """Of its turns."""
        return self.turns.label


def scaling(
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
    kinds = {kind.name: kind for kind in DISTRIBUTED if kind.name in peers}
    check_peers(config, list(kinds.values()))
    config = with_keys(config, train={"micro_batch_size": None})
    batch, threads = config.train.global_batch_size, config.launch.threads or 1
    if "strong" in modes and batch < max(ranks):
        raise UserError(
            f"train.global_batch_size = {batch} can't be shared by {max(ranks)} ranks; "
            f"raise it, or give --modes weak"
        )
    several = sorted(set(ranks) - {1})
    jobs = [(backend, "mpirun", 1) for backend in backends]
    jobs += [(backend, name, n) for n in several for name in launchers for backend in backends]
    jobs += [(name, "torchrun", n) for n in [1, *several] for name in kinds]
    names = BACKENDS | {name: kind.label for name, kind in kinds.items()}
    count = sum(1 if n == 1 else len(modes) for _, _, n in jobs)
    turns = rounds * count
    lanes: list[Lane] = []
    with Display(turns, "tokens") as display, Stage() as stage:
        display.say(
            f"{turns} turns of {seconds:g} s ({turns * seconds / 60:.1f} min), and the time in "
            f"which {len(jobs)} jobs start"
        )
        for kind, launcher, n in jobs:
            sizes = {mode: batch * n if mode == "weak" else batch for mode in modes}
            sizes = {"weak": batch} if n == 1 else sizes
            name = names[kind]
            process = _start(
                stage, f"{name} on {n}", config, kinds.get(kind, kind), launcher, n, threads, sizes
            )
            for mode, size in sizes.items():
                label = f"{name}, {launcher}, {n}, {mode}"
                lane = Lane(name, launcher, n, mode, size, process.contestant(label, mode))
                lanes.append(lane)
            display.say(f"{name}, {launcher}, {n}: first step {lane.turns.first_seconds:.1f} s")
        display.say(f"measuring {count} contestants")
        measured = interleave([lane.turns for lane in lanes], rounds, seconds, display.turn)
    result = BenchResult(
        "scaling",
        f"Training on ranks of {threads} thread{'' if threads == 1 else 's'}, "
        f"width {config.model.width}, {config.model.layers} layers, "
        f"context {config.model.context}",
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
    _report(result, lanes, measured, [kind.label for kind in kinds.values()])
    result.notes = [
        "Weak: every rank has the batch of one rank; strong: the ranks share it. "
        "Efficiency is the rate over ranks x the rate of one rank.",
        "DDP is torch's DistributedDataParallel over Gloo, started by torchrun.",
    ]
    if max(ranks) * threads > usable_cores():
        result.notes.append(
            f"{max(ranks)} ranks share {usable_cores()} cores here: they take turns, so their "
            "efficiency says little."
        )
    return result


def _start(
    stage: Stage,
    name: str,
    config: Config,
    kind: PeerKind | str,
    launcher: str,
    ranks: int,
    threads: int,
    sizes: dict[str, int],
) -> Process:
    """The job of a peer, or of the backend `kind`."""
    if isinstance(kind, PeerKind):
        config = with_keys(config, launch={"backend": kind.backend})
        given = arguments(config, threads, peer=kind.name, sizes=sizes)
        work = WORKS + "PeerTraining"
        return stage.start(name, work, given, threads=threads, ranks=ranks, torchrun=True)
    program, controller = LAUNCHERS[launcher]
    launch = {"backend": kind, "launcher": program, "controller": controller}
    config = with_keys(config, launch=launch)
    given = arguments(config, threads, sizes=sizes)
    work = WORKS + "OwnTraining"
    return stage.start(name, work, given, config=config, threads=threads, ranks=ranks)


def _report(
    result: BenchResult, lanes: Sequence[Lane], measured: Rounds, peers: Sequence[str]
) -> None:
    """Add rows and ratios."""
    single = {lane.name: lane.label for lane in lanes if lane.ranks == 1}
    for lane in lanes:
        value, interval = measured.ratio(lane.label, single[lane.name], 1 / lane.ranks)
        row: dict[str, Any] = {
            "contestant": lane.name,
            "launcher": lane.launcher,
            "ranks": lane.ranks,
            "mode": "one" if lane.ranks == 1 else lane.mode,
            "batch": f"{lane.batch} ({lane.mode})" if lane.ranks > 1 else f"{lane.batch}",
            "tokens_per_second": measured.rate(lane.label),
            "interval": measured.interval(lane.label),
            "efficiency": value,
            "first_seconds": lane.turns.first_seconds,
            "memory_mib": lane.turns.memory_mib,
            "rounds": measured.rates(lane.label),
        }
        result.rows.append(row)
        if lane.ranks == 1:
            continue
        where = {"launcher": lane.launcher, "ranks": lane.ranks, "scaling": lane.mode}
        judged = lane.launcher == "mpirun" and lane.mode == "weak" and lane.ranks == 2
        aim = EFFICIENCY_AIM if judged else None
        name = f"{lane.name} / {lane.ranks} x one rank"
        result.ratios.append(Ratio(name, value, interval, aim, where=where))
        for peer in peers:
            other = f"{peer}, torchrun, {lane.ranks}, {lane.mode}"
            if lane.name not in peers:
                value, interval = measured.ratio(lane.label, other)
                aim = PEER_AIM if judged else None
                result.ratios.append(
                    Ratio(f"{lane.name} / {peer}", value, interval, aim, where=where)
                )
