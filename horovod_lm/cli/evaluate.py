"""`horovod-lm evaluate`."""

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
    from horovod_lm.topology import place
    from horovod_lm.train import evaluate, restore

    result = evaluate(restore(run, backend, None))
    if place().rank:
        return
    if as_json:
        import json

        click.echo(json.dumps(result))
    else:
        click.echo(
            f"step {result['step']}: validation loss {result['loss']:.4f} nats per token, "
            f"perplexity {result['perplexity']:.2f}, over {result['tokens']:,} tokens"
        )
