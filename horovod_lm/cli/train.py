"""`horovod-lm train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from horovod_lm.cli.common import (
    backend_option,
    config_argument,
    folder_of,
    load,
    output_option,
    set_option,
)

if TYPE_CHECKING:
    from horovod_lm.config import Config

EPILOG = """\b
Examples:
  horovod-lm train configs/quickstart.toml --backend tensorflow
  mpirun -np 2 horovod-lm train configs/quickstart.toml --output runs/mine
  horovod-lm train configs/quickstart.toml --output runs/mine --resume
  horovod-lm train configs/small.toml --set train.steps=50 --dry-run
  horovod-lm train configs/quickstart.toml --output runs/mine --profile 20:22

\b
Export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before the launcher: glibc reads it when a rank
starts, and huge pages make ranks of one machine reduce faster. All else a rank sets itself.

\b
SIGTERM or SIGUSR1 to a rank stops all ranks after their step, with a checkpoint. mpirun hands
SIGUSR1 on and waits; on SIGTERM or Ctrl-C it kills its ranks after about a second."""


def _refuse_ranks(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise click.UsageError(
            f"train is one rank of a job; for {value} ranks start it with a launcher: "
            f"mpirun -np {value} horovod-lm train …",
            context,
        )


@click.command(epilog=EPILOG)
@config_argument
@backend_option
@output_option
@set_option
@click.option("--resume", is_flag=True, help="Go on from the newest valid checkpoint.")
@click.option(
    "--profile",
    metavar="FIRST:LAST",
    help="Profile these steps: trace.json.gz and profile.json (output.profile).",
)
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, train nothing.")
@click.option("-np", "--ranks", hidden=True, expose_value=False, callback=_refuse_ranks)
def command(
    config: Path,
    backend: str | None,
    output: Path | None,
    overrides: tuple[str, ...],
    resume: bool,
    profile: str | None,
    dry_run: bool,
) -> None:
    """Train the model of CONFIG in one framework.

    Alone this is one rank; under mpirun, srun or horovodrun it is one of as many as were started.
    """
    if profile is not None:
        overrides = (*overrides, f"output.profile={json.dumps(profile)}")
    settings = load(config, overrides, backend=backend, output=output)
    from horovod_lm.train import train

    train(settings, output=folder_of(settings), resume=resume, dry_run=dry_run)
    if dry_run:
        _plan(settings)


def _plan(settings: Config) -> None:
    """The checks and figures that need nothing of a framework."""
    from horovod_lm.cli.inspect import print_plan
    from horovod_lm.data.prepare import prepare
    from horovod_lm.inspection import check_disk, plan
    from horovod_lm.topology import place

    where = place()
    figures = plan(settings, where.size, len(prepare(settings).train))
    check_disk(folder_of(settings) or Path("runs"), figures["checkpoint_bytes"])
    if where.rank == 0:
        print_plan(settings.name, figures)
