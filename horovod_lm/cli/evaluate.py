"""`horovod-lm evaluate`."""

import sys
from pathlib import Path

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
    """Measure validation loss and perplexity of a RUN.

    Takes the newest valid checkpoint; either framework reads what the other wrote.
    """
    from contextlib import redirect_stdout

    from horovod_lm.hooks import finite
    from horovod_lm.restored import evaluate, restore

    with redirect_stdout(sys.stderr):  # the result alone belongs on stdout
        restored = restore(run, backend)
        result = evaluate(restored)
        restored.communicator.shutdown()
    if restored.communicator.rank:
        return
    if as_json:
        import json

        # JSON has no infinity, which a perplexity can be.
        result["losses"] = {k: finite(v) for k, v in result["losses"].items()}
        figures = {k: v if k == "losses" else finite(v) for k, v in result.items()}
        click.echo(json.dumps(figures))
    elif len(result["losses"]) > 1:
        parts = ", ".join(f"{name} {loss:.4f}" for name, loss in result["losses"].items())
        click.echo(
            f"step {result['step']}: validation loss {result['loss']:.4f} nats ({parts}), over "
            f"{result['tokens']:,} targets"
        )
    else:
        click.echo(
            f"step {result['step']}: validation loss {result['loss']:.4f} nats per token, "
            f"perplexity {result['perplexity']:.2f}, over {result['tokens']:,} tokens"
        )
