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
  horovod-lm inspect configs/small.toml --set model.layers=12 --json
  horovod-lm inspect --preset bert-base"""


def _complete_preset(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    from horovod_lm.presets import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


@click.command(epilog=EPILOG)
@click.argument("config", type=click.Path(path_type=Path), metavar="CONFIG|RUN", required=False)
@click.option(
    "--preset",
    metavar="NAME",
    shell_complete=_complete_preset,
    help="A well-known model (model.preset), with its published number of parameters.",
)
@set_option
@json_option
def command(
    config: Path | None, preset: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Show parameters, FLOPs and memory of a model.

    Of a config, of the config in a run's folder, or of a preset.
    """
    from horovod_lm.inspection import describe, published

    settings = _load(config, preset, overrides)
    figures = describe(settings)
    if preset is not None:
        figures = {**published(preset, settings.model), **figures}
    if as_json:
        import json

        click.echo(json.dumps(figures, indent=2))
    else:
        _print(settings, figures)


def _load(config: Path | None, preset: str | None, overrides: tuple[str, ...]) -> Config:
    from horovod_lm.config import preset_config
    from horovod_lm.errors import UserError

    if (config is None) == (preset is None):
        raise UserError("give a config, the folder of a run, or --preset NAME: one of them")
    if preset is not None:
        return preset_config(preset, overrides)
    assert config is not None
    path = config
    if config.is_dir():
        path = config / "config.toml"
        if not path.exists():
            raise UserError(f"{config} has no config.toml; give a config or the folder of a run")
    return load(path, overrides)


def _print(config: Config, figures: dict[str, Any]) -> None:
    from horovod_lm.cli.table import scaled, show, size
    from horovod_lm.inspection import rows

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
    if "preset" in figures:
        _print_published(figures)
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


def _print_published(figures: dict[str, Any]) -> None:
    from horovod_lm.cli.table import show

    count, apart = figures["published"], figures["difference"]
    show(
        f"{figures['preset']}: as published, and here",
        ("", "parameters"),
        [
            ("published", f"{count:,}"),
            ("here", f"{figures['total']:,}"),
            ("difference", f"{apart:+,} ({apart / count:+.1%})" if apart else "0"),
        ],
        "lr",
    )
    click.echo(f"Published: {figures['source']}.\n")


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
