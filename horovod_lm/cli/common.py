"""What several commands share: their options, and how flags become keys of the config."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from horovod_lm.config import Config

config_argument = click.argument("config", type=click.Path(path_type=Path))


def complete_key(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """Keys of a config, each with the sign that a value follows."""
    from horovod_lm.config import known_keys

    return [f"{key}=" for key in known_keys() if key.startswith(incomplete)]


def _complete_backend(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    from horovod_lm.backend import backend_names

    return [name for name in backend_names() if name.startswith(incomplete)]


def complete_backends(
    context: click.Context, option: click.Parameter, incomplete: str
) -> list[str]:
    """Backends after the last comma of a list."""
    given, comma, last = incomplete.rpartition(",")
    return [f"{given}{comma}{name}" for name in _complete_backend(context, option, last)]


set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=complete_key,
    help="Set a key of the config, as in --set train.steps=50. Repeatable.",
)

backend_option = click.option(
    "--backend",
    metavar="NAME",
    shell_complete=_complete_backend,
    help="torch or tensorflow (launch.backend).",
)

output_option = click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The run's folder (output.folder); default: runs/NAME-TIME.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def launch_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`-np` and `--launcher`, of a command that starts ranks itself."""
    function = click.option(
        "--launcher",
        type=click.Choice(["mpirun", "horovodrun", "srun"]),
        help="What starts the ranks (launch.launcher).",
    )(function)
    return click.option(
        "-np", "--ranks", type=click.IntRange(1), metavar="N", help="Processes (launch.ranks)."
    )(function)


def load(
    path: Path,
    overrides: tuple[str, ...],
    *,
    backend: str | None = None,
    ranks: int | None = None,
    launcher: str | None = None,
    output: Path | None = None,
    last: Sequence[str] = (),
) -> Config:
    """The config at `path` with `--set`, the flags and then `last`, more `key=value`, applied.
    Raises `UserError`."""
    from horovod_lm.config import load_config

    flags = {
        "launch.backend": backend,
        "launch.ranks": ranks,
        "launch.launcher": launcher,
        "output.folder": None if output is None else str(output),
    }
    # JSON writes strings and numbers as TOML reads them.
    named = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    return load_config(path, [*overrides, *named, *last])


def folder_of(config: Config) -> Path | None:
    """`output.folder`, if it is set."""
    return None if config.output.folder is None else Path(config.output.folder)
