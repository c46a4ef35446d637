"""`horovod-lm parity`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from horovod_lm.cli.common import complete_backends, config_argument, json_option, load, set_option

if TYPE_CHECKING:
    from horovod_lm.backend import Precision
    from horovod_lm.parity.result import Place, Result

EPILOG = """\b
Examples:
  horovod-lm parity configs/quickstart.toml
  horovod-lm parity my.toml --precision bf16 --rows 8
  horovod-lm parity my.toml --backends torch,mine --json > parity.json
  horovod-lm parity my.toml --set optimizer.name=lamb --set model.norm_placement=post"""


@click.command(epilog=EPILOG)
@config_argument
@click.option(
    "--backends",
    default="torch,tensorflow",
    show_default=True,
    metavar="A,B",
    shell_complete=complete_backends,
    help="The two to compare; B is judged against A.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp64", "fp32", "bf16", "fp16"]),
    help="Default: train.precision of the config.",
)
@click.option(
    "--rows", type=click.IntRange(2), default=4, show_default=True, help="Sequences in the batch."
)
@json_option
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the JSON there too."
)
@set_option
def command(
    config: Path,
    backends: str,
    precision: Precision | None,
    rows: int,
    as_json: bool,
    output: Path | None,
    overrides: tuple[str, ...],
) -> int:
    """Check that two backends compute the same, layer by layer.

    The same batch and weights go through both, and through both in fp64. Compared are activations,
    gradients and updates; the first place that differs is named. Exit code 3 if one does.
    """
    settings = load(config, overrides)
    from horovod_lm.parity.run import check, parity

    names = [name.strip() for name in backends.split(",")]
    check(names)
    if output is not None:
        _write(output, "", "a")  # what is there stays if this run fails
    result = parity(settings, names, precision, rows, log=lambda text: click.echo(text, err=True))
    text = json.dumps(result.as_json(), indent=1, allow_nan=False)
    if output is not None:
        _write(output, text + "\n")
    if as_json:
        click.echo(text)
    else:
        _print(result)
    return 0 if result.same else 3


def _write(path: Path, text: str, mode: str = "w") -> None:
    from horovod_lm.errors import UserError

    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"--output {path} can't be written: {error.strerror}") from None


def _print(result: Result) -> None:
    """A table for activations, gradients and updates each, with a line for each layer, and the
    verdict below them: the last thing that is read."""
    from textwrap import fill

    from horovod_lm.cli.table import WIDTH, show
    from horovod_lm.parity.result import KINDS

    one, other = result.backends
    columns = ["layer", "nearest its limit at", "apart"]
    if result.referee is not None:
        columns += [f"{one:.10}", f"{other:.10}", "in fp64"]
    for kind in KINDS:
        layers = result.layers(kind)
        if layers:
            rows = [_row(layer, found, result) for layer, found in layers]
            room = WIDTH - sum(
                2 + max(len(row[i]) for row in [columns, *rows])
                for i in range(len(columns))
                if i != 1
            )
            for row in rows:
                row[1] = row[1] if len(row[1]) <= room else row[1][: room - 1] + "…"
            allowed = f"{result.tolerance(kind):.2e}"
            show(
                f"{kind.capitalize()}s: {other} to {one} in {result.precision}, allowed {allowed}",
                columns,
                rows,
                "ll" + "r" * (len(columns) - 2),
            )
    legend = [
        f"Columns {one} and {other}: how far from the fp64 result of {result.referee}; in fp64: "
        "how far apart both are there."
    ]
    for sentence in legend * (result.referee is not None) + result.verdict:
        click.echo(fill(sentence, WIDTH, break_on_hyphens=False))


def _row(layer: str, found: list[Place], result: Result) -> list[str]:
    """The largest of each figure in a layer, and the place that uses most of its tolerance."""
    from horovod_lm.parity.places import within_layer

    worst = max(found, key=lambda place: place.share)
    where = within_layer(worst.name) + (f" ({worst.quantity})" if worst.quantity else "")
    if worst.share > 1:
        where = f"OVER: {where}"
    row = [layer, where, f"{max(place.apart for place in found):.2e}"]
    if result.referee is not None:
        for figures in zip(*((p.first, p.second, p.fp64) for p in found), strict=True):
            known = [figure for figure in figures if figure is not None]
            row.append(f"{max(known):.2e}" if known else "–")
    return row
