"""`horovod-lm prepare`."""

from pathlib import Path

import click

from horovod_lm.cli.common import config_argument, load, set_option

EPILOG = """\b
Examples:
  horovod-lm prepare configs/quickstart.toml
  horovod-lm prepare my.toml --set data.vocabulary=4096"""


@click.command(epilog=EPILOG)
@config_argument
@set_option
def command(config: Path, overrides: tuple[str, ...]) -> None:
    """Turn the corpus into a tokenizer and token shards.

    They go into a cache, keyed by the text and the settings: a second call takes seconds. `train`
    and `compare` do this by themselves the first time.
    """
    from horovod_lm.data.prepare import prepare

    settings = load(config, overrides)
    prepared = prepare(settings, log=click.echo)
    click.echo(
        f"{len(prepared.train):,} training tokens, {len(prepared.validation):,} validation tokens, "
        f"unigram entropy {prepared.unigram_entropy:.3f} nats: {prepared.folder}"
    )
