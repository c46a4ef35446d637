"""`horovod-lm compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from horovod_lm.cli import BEGAN
from horovod_lm.cli.common import (
    complete_key,
    config_argument,
    folder_of,
    json_option,
    launch_options,
    load,
    output_option,
    set_option,
)
from horovod_lm.report.curves import SEED_MARGIN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from horovod_lm.config import Config

EPILOG = """\b
Examples:
  horovod-lm compare configs/quickstart.toml -np 2
  horovod-lm compare configs/quickstart.toml -np 2 --seeds 5 --margin 0.005
  horovod-lm compare my.toml -np 2 --vary precision=fp32,bf16 --seeds 3
  horovod-lm compare my.toml --vary ranks=1,2 --set launch.backend=tensorflow
  horovod-lm compare my.toml -np 2 --launcher horovodrun --vary controller=mpi,gloo
  horovod-lm compare my.toml --vary backend=torch,tensorflow --vary norm_placement=pre,post
  horovod-lm compare my.toml -np 4 --rounds 12 --output runs/compared --json"""


@click.command(epilog=EPILOG)
@config_argument
@launch_options
@click.option(
    "--vary",
    multiple=True,
    metavar="KEY=A,B",
    shell_complete=complete_key,
    help="Compare values of a key; the part behind its last dot will do. Repeatable: all "
    "combinations are compared, with the first. Default: backend=torch,tensorflow.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    metavar="R",
    help="Rounds in which speed is taken; 6 or more can show a difference. Default: by the "
    "number of steps.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1, 100),
    default=1,
    metavar="K",
    help="Train with K seeds and test whether the final losses are the same.",
)
@click.option(
    "--margin",
    type=click.FloatRange(0, min_open=True),
    default=SEED_MARGIN,
    show_default=True,
    metavar="NATS",
    help="How far apart final losses may be and still be the same, with --seeds.",
)
@click.option(
    "--profile/--no-profile",
    default=True,
    help="Profile the last 3 steps of each run, which then enter no speed. On by default.",
)
@json_option
@output_option
@set_option
def command(
    config: Path,
    ranks: int | None,
    launcher: str | None,
    vary: tuple[str, ...],
    rounds: int | None,
    seeds: int,
    margin: float,
    profile: bool,
    as_json: bool,
    output: Path | None,
    overrides: tuple[str, ...],
) -> int:
    """Train several variants of a run and report how they differ.

    By default the two frameworks; by --vary any values of any keys. They train on as many ranks
    as -np says and take turns, so that speed is taken in alternating rounds. Ends in a table, a
    verdict and a report.html in the run's folder. Exit code 3 if loss curves that are meant to be
    the same differ, or final losses over several seeds are not equivalent.
    """
    from horovod_lm.variants import make_variants

    def cell(values: Sequence[str]) -> Config:
        return load(config, overrides, ranks=ranks, launcher=launcher, output=output, last=values)

    variants = make_variants(vary, cell, several_seeds=seeds > 1)
    from horovod_lm.compare import Options, compare
    from horovod_lm.run_folder import default_folder

    settings = variants[0].config
    folder = folder_of(settings) or default_folder(settings)
    return compare(variants, folder, Options(rounds, seeds, margin, profile, as_json, BEGAN))
