"""`horovod-lm bench NAME`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from horovod_lm.cli.common import backend_option, json_option, load, set_option

if TYPE_CHECKING:
    from horovod_lm.bench.result import BenchResult
    from horovod_lm.config import Config

EPILOG = """\b
Examples:
  horovod-lm bench throughput
  horovod-lm bench throughput my.toml --precision fp32,bf16 --threads 1,2
  horovod-lm bench scaling --ranks 1,2 --launcher mpirun,gloo --json --output scaling.json"""

# Sizes at which every benchmark runs in seconds and its figures mean nothing.
QUICK = (
    "model.width=32", "model.layers=1", "model.heads=2", "model.context=16",
    "data.vocabulary=300", "train.global_batch_size=4",
)  # fmt: skip
QUICK_ROUNDS, QUICK_SECONDS = 2, 0.05


@click.group(epilog=EPILOG)
def command() -> None:
    """Measure speed, each figure a ratio of interleaved runs.

    Contestants take short turns in rounds, so that a machine whose speed drifts favours none;
    figures are medians of the rounds with bootstrap intervals. Leave the machine alone meanwhile.
    """


def settings(config: Path | None, overrides: tuple[str, ...], quick: bool) -> Config:
    """The config of a benchmark: by default the one that comes with it."""
    path = config or Path(__file__).parent.parent / "bench" / "bench.toml"
    return load(path, (*(QUICK if quick else ()), *overrides))


def finish(result: BenchResult, as_json: bool, output: Path | None) -> None:
    """Print the tables and notes, or the JSON, and write the file."""
    from horovod_lm.cli.table import show

    if output is not None:
        result.write(output)
    if as_json:
        click.echo(result.text)
        return
    for table in result.tables:
        show(table.title, table.columns, table.rows, table.numbers)
    for note in result.notes:
        click.echo(note)


@dataclass(frozen=True)
class Given:
    """What every benchmark is given; `rounds` and `seconds` have their defaults already."""

    path: Path | None
    overrides: tuple[str, ...]
    quick: bool
    rounds: int
    seconds: float

    def config(self, *last: str) -> Config:
        """The config with `--set` and then `last`, more `key=value`, applied."""
        return settings(self.path, (*self.overrides, *last), self.quick)


# What every benchmark takes.
COMMON = (
    set_option,
    click.option(
        "--output",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Write the figures as JSON.",
    ),
    json_option,
    click.option("--quick", is_flag=True, help="Tiny sizes, to see that it runs."),
    click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Length of a turn."),
    click.option("--rounds", type=click.IntRange(1), help="Turns of each contestant."),
    click.argument("config", type=click.Path(path_type=Path), required=False),
)


def benchmark(rounds: int, seconds: float) -> Callable[[Callable[..., BenchResult]], click.Command]:
    """Make a command, with `COMMON` and these defaults of `--rounds` and `--seconds`, of a function
    that takes `Given` and the values of its own options; what it returns is shown."""
    default_rounds, default_seconds = rounds, seconds

    def add(function: Callable[..., BenchResult]) -> click.Command:
        @functools.wraps(function)
        def run(
            config: Path | None,
            rounds: int | None,
            seconds: float | None,
            quick: bool,
            as_json: bool,
            output: Path | None,
            overrides: tuple[str, ...],
            **own: Any,
        ) -> None:
            given = Given(
                config,
                overrides,
                quick,
                rounds or (QUICK_ROUNDS if quick else default_rounds),
                seconds or (QUICK_SECONDS if quick else default_seconds),
            )
            finish(function(given, **own), as_json, output)

        for option in COMMON:
            option(run)
        return command.command()(run)

    return add


def choices(text: str, allowed: tuple[str, ...], option: str) -> list[str]:
    """The parts of a comma-separated option. Raises `click.BadParameter` for one that is not
    allowed."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if part not in allowed:
            raise click.BadParameter(
                f"{part} is not one of {', '.join(allowed)}", param_hint=option
            )
    if not parts:
        raise click.BadParameter(f"give some of {', '.join(allowed)}", param_hint=option)
    return parts


def counts(text: str, option: str) -> list[int]:
    """The whole numbers above 0 of a comma-separated option. Raises `click.BadParameter`."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{text} is not a list like 1,2", param_hint=option)
    return numbers


def _known_backends(_: click.Context, __: click.Parameter, text: str) -> list[str]:
    from horovod_lm.backend import backend_names

    return choices(text, tuple(backend_names()), "--backends")


backends_option = click.option(
    "--backends",
    default="torch,tensorflow",
    metavar="NAMES",
    callback=_known_backends,
    help="Which frameworks to measure.",
)


@benchmark(rounds=10, seconds=0.3)
@click.option(
    "-np", "--ranks", type=click.IntRange(1), metavar="N", help="Processes (launch.ranks)."
)
@backends_option
@click.option("--over", default="mpi,gloo", help="Who reduces for Horovod: mpi, gloo or both.")
def allreduce(given: Given, ranks: int | None, backends: list[str], over: str) -> BenchResult:
    """Horovod's allreduce by size.

    Against raw MPI and against a copy in memory.
    """
    from horovod_lm.bench.allreduce import QUICK_SIZES, SIZES, TRANSPORTS, measure

    return measure(
        given.config(f"launch.ranks={ranks or 2}"),
        sizes=QUICK_SIZES if given.quick else SIZES,
        backends=backends,
        transports=choices(over, TRANSPORTS, "--over"),
        rounds=given.rounds,
        seconds=given.seconds,
    )


@benchmark(rounds=7, seconds=3.0)
@click.option("--precision", default="fp32", show_default=True, help="Of fp32,bf16,fp16.")
@click.option("--threads", help="As 1,2; default: 1 and all cores.")
@click.option("--peers", default="all", show_default=True, help="Names as above, all or none.")
def throughput(given: Given, precision: str, threads: str | None, peers: str) -> BenchResult:
    """Training speed against peers and bare products.

    Both backends against Hugging Face's and KerasHub's GPT-2 and a plain torch model of the same
    sizes, each in a process of its own, and as a share of the rate of the model's matrix products
    alone. Peers are huggingface, huggingface-compile, plain, plain-compile, kerashub and
    kerashub-xla.
    """
    from horovod_lm.bench.throughput import measure
    from horovod_lm.bench.tools import PEERS
    from horovod_lm.topology import usable_cores

    names = tuple(peer.name for peer in PEERS)
    chosen = {"all": list(names), "none": []}.get(peers)
    return measure(
        given.config(),
        precisions=choices(precision, ("fp32", "bf16", "fp16"), "--precision"),
        threads=counts(threads, "--threads") if threads else sorted({1, usable_cores()}),
        peers=choices(peers, names, "--peers") if chosen is None else chosen,
        rounds=given.rounds,
        seconds=given.seconds,
    )


@benchmark(rounds=11, seconds=3.0)
@backends_option
def loss_scaling(given: Given, backends: list[str]) -> BenchResult:
    """What the dynamic loss scaler costs in a step of fp16."""
    from horovod_lm.bench.loss_scaling import measure

    return measure(given.config(), backends=backends, rounds=given.rounds, seconds=given.seconds)


@benchmark(rounds=7, seconds=3.0)
@click.option("--ranks", default="1,2", show_default=True, help="Numbers of ranks.")
@click.option(
    "--launcher", default="mpirun,gloo", show_default=True, help="Of mpirun,horovodrun,gloo,srun."
)
@click.option("--modes", default="weak,strong", show_default=True, help="Of weak,strong.")
@click.option("--backends", default="torch,tensorflow", show_default=True, help="Of these two.")
@click.option("--peers", default="ddp,ddp-own", show_default=True, help="Of these two, or none.")
def scaling(
    given: Given, ranks: str, launcher: str, modes: str, backends: str, peers: str
) -> BenchResult:
    """Speed on several ranks against one.

    Weak and strong scaling under each launcher, gloo being horovodrun over Gloo, and against
    torch's DistributedDataParallel, with a plain torch model (ddp) and with our own (ddp-own).
    One thread a rank, or launch.threads.
    """
    from horovod_lm.bench.scaling import LAUNCHERS, MODES, measure

    return measure(
        given.config(),
        ranks=counts(ranks, "--ranks"),
        launchers=choices(launcher, tuple(LAUNCHERS), "--launcher"),
        modes=choices(modes, MODES, "--modes"),
        backends=choices(backends, ("torch", "tensorflow"), "--backends"),
        peers=[] if peers == "none" else choices(peers, ("ddp", "ddp-own"), "--peers"),
        rounds=given.rounds,
        seconds=given.seconds,
    )


@benchmark(rounds=11, seconds=3.0)
@backends_option
def dropout(given: Given, backends: list[str]) -> BenchResult:
    """What masks cost that are the same in both frameworks.

    Against the masks of a framework's own generator, and against no dropout.
    """
    from horovod_lm.bench.dropout import measure

    return measure(given.config(), backends=backends, rounds=given.rounds, seconds=given.seconds)


@benchmark(rounds=7, seconds=3.0)
@backends_option
def recompute(given: Given, backends: list[str]) -> BenchResult:
    """What activation checkpointing costs and saves.

    Steps that make each block's activations anew in the backward, against steps that keep them.
    """
    from horovod_lm.bench.recompute import measure

    return measure(given.config(), backends=backends, rounds=given.rounds, seconds=given.seconds)


@benchmark(rounds=7, seconds=2.0)
@backends_option
def data(given: Given, backends: list[str]) -> BenchResult:
    """How fast batches are read.

    Against a copy in memory, and against what training consumes.
    """
    from horovod_lm.bench.data import QUICK_TOKENS, TOKENS, measure

    return measure(
        given.config(),
        tokens=QUICK_TOKENS if given.quick else TOKENS,
        backends=backends,
        rounds=given.rounds,
        seconds=given.seconds,
    )


@benchmark(rounds=9, seconds=1.0)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("."),
    help="A folder on the disk to measure; default: this one.",
)
def checkpoint(given: Given, folder: Path) -> BenchResult:
    """How fast checkpoints are saved and loaded.

    Against plainly writing (and fsync) and reading as many bytes.
    """
    from horovod_lm.bench.checkpoint import measure

    return measure(given.config(), folder=folder, rounds=given.rounds, seconds=given.seconds)


@benchmark(rounds=7, seconds=0.3)
@backend_option
@click.option(
    "--allreduce",
    "allreduces",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="JSON of bench allreduce; default: measured here on 2 ranks. Repeatable.",
)
@click.option(
    "--throughput",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON of bench throughput; default: a step is measured here.",
)
@click.option(
    "--step-ms", type=click.FloatRange(0, min_open=True), help="A step's computation elsewhere."
)
@click.option("--link-gbit", default="10,25,100,200", show_default=True, help="Of each rank.")
@click.option("--latency-us", type=click.FloatRange(0), default=10, show_default=True)
@click.option("-np", "--ranks", default="8,16,32,64,128,256,512,1024", show_default=True)
@click.option(
    "--fusion-mb",
    type=click.FloatRange(0),
    default=0,
    show_default=True,
    help="Horovod's fusion buffer; 0: all gradients in one tensor, as here.",
)
@click.option(
    "--cycle-ms", type=click.FloatRange(0), default=1, show_default=True, help="Horovod's cycle."
)
def cost_model(
    given: Given,
    backend: str | None,
    allreduces: tuple[Path, ...],
    throughput: Path | None,
    step_ms: float | None,
    link_gbit: str,
    latency_us: float,
    ranks: str,
    fusion_mb: float,
    cycle_ms: float,
) -> BenchResult:
    """Foretell the efficiency of many ranks.

    A model of the ring allreduce, fitted to measured allreduces and to a measured step, for links
    of given speed.
    """
    from horovod_lm.bench.allreduce import QUICK_SIZES, SIZES
    from horovod_lm.bench.cost_model import measure

    last = ["launch.ranks=2", *([f"launch.backend={backend}"] if backend else [])]
    return measure(
        given.config(*last),
        allreduces=allreduces,
        throughput=throughput,
        step_seconds=None if step_ms is None else step_ms / 1e3,
        sizes=QUICK_SIZES if given.quick else SIZES,
        links=counts(link_gbit, "--link-gbit"),
        latency=latency_us / 1e6,
        ranks=counts(ranks, "--ranks"),
        fusion=round(fusion_mb * 1e6),
        cycle=cycle_ms / 1e3,
        rounds=given.rounds,
        seconds=given.seconds,
    )
