"""`horovod-lm compare`."""

from pathlib import Path

import click

from horovod_lm.cli.common import (
    config_argument,
    folder_of,
    launch_options,
    load,
    output_option,
    set_option,
)

EPILOG = """\b
Examples:
  horovod-lm compare configs/quickstart.toml -np 2
  horovod-lm compare configs/quickstart.toml -np 2 --launcher horovodrun
  horovod-lm compare my.toml -np 4 --set model.dropout=0 --output runs/compared"""


@click.command(epilog=EPILOG)
@config_argument
@launch_options
@output_option
@set_option
def command(
    config: Path,
    ranks: int | None,
    launcher: str | None,
    output: Path | None,
    overrides: tuple[str, ...],
) -> int:
    """Train in both frameworks and report how they differ.

    The same run twice, on as many ranks as -np says, with its speed taken in alternating rounds.
    Ends in a table and a report.html in the run's folder. Exit code 3 if the loss curves differ.
    """
    import time

    settings = load(config, overrides, ranks=ranks, launcher=launcher, output=output)
    from horovod_lm.compare import compare

    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = folder_of(settings) or Path("runs") / f"{settings.name}-{stamp}"
    return compare(settings, folder)
