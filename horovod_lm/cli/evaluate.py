"""`horovod-lm evaluate`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from horovod_lm.cli.common import backend_option, json_option

EPILOG = """\b
Examples:
  horovod-lm evaluate runs/mine
  horovod-lm evaluate runs/mine --backend tensorflow --json"""


@click.command(epilog=EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@backend_option
@json_option
def command(run: Path, backend: str | None, as_json: bool) -> None:
    """Measure validation losses and accuracies of a RUN.

    Takes the newest valid checkpoint; either framework reads what the other wrote.
    """
    from contextlib import redirect_stdout

    from horovod_lm.restored import evaluate, restore

    with redirect_stdout(sys.stderr):  # the result alone belongs on stdout
        restored = restore(run, backend)
        result = evaluate(restored)
        restored.communicator.shutdown()
    if restored.communicator.rank:
        return
    if as_json:
        import json

        from horovod_lm.run_folder import plain

        click.echo(json.dumps(plain(result)))
        return
    for line in lines(result):
        click.echo(line)


def lines(result: Mapping[str, Any]) -> list[str]:
    """What is printed of `restored.evaluate`."""
    first = f"step {result['step']}: validation loss"
    names = list(result["losses"])
    if len(names) == 1:
        return [f"{first} {_figures(result, names[0])}"]
    return [f"{first} {result['loss']:.4f} nats", *(f"  {n}: {_figures(result, n)}" for n in names)]


def _figures(result: Mapping[str, Any], name: str) -> str:
    """What is said of one loss."""
    perplexity = result["perplexities"].get(name)
    of = "sequence" if perplexity is None else "token"
    parts = [f"{result['losses'][name]:.4f} nats per {of}"]
    if perplexity is not None:
        parts.append(f"perplexity {perplexity:.2f}")
    parts.append(f"accuracy {100 * result['accuracies'][name]:.1f}%")
    return ", ".join([*parts, f"over {result['targets'][name]:,} {of}s"])
