"""`horovod-lm inspect`, and the plan that `train --dry-run` prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from horovod_lm.cli.common import json_option, load, set_option

if TYPE_CHECKING:
    from horovod_lm.config import Config

EPILOG = """\b
Examples:
  horovod-lm inspect configs/quickstart.toml
  horovod-lm inspect runs/mine
  horovod-lm inspect configs/small.toml --set model.layers=12 --json"""


@click.command(epilog=EPILOG)
@click.argument("config", type=click.Path(path_type=Path), metavar="CONFIG|RUN")
@set_option
@json_option
def command(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show parameters, FLOPs and memory of a model.

    Of a config, or of the config in a run's folder.
    """
    from horovod_lm.errors import UserError
    from horovod_lm.inspection import describe

    path = config
    if config.is_dir():
        path = config / "config.toml"
        if not path.exists():
            raise UserError(f"{config} has no config.toml; give a config or the folder of a run")
    settings = load(path, overrides)
    if as_json:
        import json

        click.echo(json.dumps(describe(settings), indent=2))
    else:
        _print(settings)


def _print(config: Config) -> None:
    from horovod_lm.cli.table import scaled, show, size
    from horovod_lm.inspection import describe, rows

    figures = describe(config)
    show(
        f"Parameters of {config.name}",
        ("name", "shape", "layers", "count", "starts as", "decay"),
        [
            (
                row.name,
                " x ".join(map(str, row.shape)),
                str(row.layers),
                f"{row.count:,}",
                row.initialiser,
                "yes" if row.decay else "no",
            )
            for row in rows(config.model.parameters)
        ],
        "lrrrll",
    )
    total = figures["total"]
    show(
        "Parameters by part",
        ("part", "count", "share"),
        [(part, f"{n:,}", f"{n / total:.1%}") for part, n in figures["parts"].items()]
        + [("all", f"{total:,}", "100.0%"), ("  with decay", f"{figures['decayed']:,}", "")],
        "lrr",
    )
    memory = figures["memory"]
    show(
        f"Memory of one rank, {figures['micro_batch_rows']} sequences at a time (estimate)",
        ("part", "size"),
        [(part, size(n)) for part, n in memory.items()] + [("all", size(sum(memory.values())))],
        "lr",
    )
    click.echo(f"Training one token takes {scaled(figures['flops_per_token'], 'FLOP')}.")


def print_plan(name: str, figures: dict[str, Any]) -> None:
    """What `train --dry-run` says when all checks have passed; `figures` are of
    `horovod_lm.inspection.plan`."""
    from horovod_lm.cli.table import scaled, show, size

    lines = [
        ("parameters", f"{figures['parameters']:,}"),
        ("backend, precision", f"{figures['backend']}, {figures['precision']}"),
        ("ranks", str(figures["ranks"])),
        ("sequences in a global batch", f"{figures['global_batch_size']:,}"),
        ("micro-batches of a rank", f"{figures['micro_batches']:,}"),
        ("sequences in each", f"{figures['micro_batch_rows']:,}"),
        ("tokens per step", f"{figures['tokens_per_step']:,}"),
        ("work per step, all ranks", scaled(figures["flops_per_step"], "FLOP")),
        ("memory of a rank (estimate)", size(sum(figures["memory"].values()))),
        ("steps", f"{figures['steps']:,}"),
        ("tokens in all", f"{figures['tokens']:,}"),
        ("epochs", f"{figures['epochs']:.2f}"),
        ("checkpoints on disk", size(figures["checkpoint_bytes"])),
    ]
    show(f"Plan of {name}: every check passed, nothing was trained", ("", ""), lines, "lr")
