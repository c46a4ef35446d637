"""`horovod-lm bench NAME`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from horovod_lm.cli.common import json_option, load, set_option

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


def bench_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What every benchmark takes: a config, `--rounds`, `--seconds`, `--quick`, `--json`,
    `--output` and `--set`."""
    for option in (
        set_option,
        click.option(
            "--output",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Write the figures as JSON.",
        ),
        json_option,
        click.option("--quick", is_flag=True, help="Tiny sizes, to see that it runs."),
        click.option(
            "--seconds", type=click.FloatRange(0, min_open=True), help="Length of a turn."
        ),
        click.option("--rounds", type=click.IntRange(1), help="Turns of each contestant."),
        click.argument("config", type=click.Path(path_type=Path), required=False),
    ):
        function = option(function)
    return function


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


ranks_option = click.option(
    "-np", "--ranks", type=click.IntRange(1), metavar="N", help="Processes (launch.ranks)."
)
backends_option = click.option(
    "--backends", default="torch,tensorflow", metavar="NAMES", help="Which frameworks to measure."
)


@command.command("allreduce")
@bench_options
@ranks_option
@backends_option
@click.option("--over", default="mpi,gloo", help="Who reduces for Horovod: mpi, gloo or both.")
def allreduce(
    config: Path | None,
    rounds: int | None,
    seconds: float | None,
    quick: bool,
    as_json: bool,
    output: Path | None,
    overrides: tuple[str, ...],
    ranks: int | None,
    backends: str,
    over: str,
) -> None:
    """Horovod's allreduce by size, against raw MPI and against a copy in memory."""
    from horovod_lm.backend import backend_names
    from horovod_lm.bench.allreduce import QUICK_SIZES, SIZES, TRANSPORTS, measure

    flags = (f"launch.ranks={ranks or 2}",)
    result = measure(
        settings(config, (*overrides, *flags), quick),
        sizes=QUICK_SIZES if quick else SIZES,
        backends=choices(backends, tuple(backend_names()), "--backends"),
        transports=choices(over, TRANSPORTS, "--over"),
        rounds=rounds or (QUICK_ROUNDS if quick else 10),
        seconds=seconds or (QUICK_SECONDS if quick else 0.3),
    )
    finish(result, as_json, output)
