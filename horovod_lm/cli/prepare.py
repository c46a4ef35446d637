"""`horovod-lm prepare`."""

from pathlib import Path

import click

from horovod_lm.cli.common import config_argument, load, set_option
from horovod_lm.errors import Stopped

EPILOG = """\b
Examples:
  horovod-lm prepare configs/quickstart.toml
  horovod-lm prepare my.toml --set data.vocabulary=4096
  horovod-lm prepare my.toml --set 'data.text=["web/*.jsonl.gz"]' --set data.on_error=skip"""


@click.command(epilog=EPILOG)
@config_argument
@set_option
def command(config: Path, overrides: tuple[str, ...]) -> None:
    """Turn corpora into a tokenizer and token shards.

    They go into a cache, keyed by the text and the settings: a second call takes seconds, and one
    after a kill goes on. `train` and `compare` do this by themselves the first time. Formats and
    tokenizers: docs/data.md.
    """
    from horovod_lm.data.prepare import prepare

    settings = load(config, overrides)
    try:
        prepared = prepare(settings, log=click.echo)
    except KeyboardInterrupt:
        raise Stopped("interrupted; the same command goes on with what is done", 130) from None
    for source, entry in zip(prepared.sources.values(), prepared.manifest["sources"], strict=True):
        for stream, train in source.train.items():
            which = [source.name] * (len(prepared.sources) > 1) + [stream] * (stream != "text")
            click.echo(
                (f"{' '.join(which)}: " if which else "")
                + f"{len(train):,} training tokens, {len(source.validation[stream]):,} validation "
                f"tokens, unigram entropy {entry['unigram_entropy'][stream]:.3f} nats: "
                f"{prepared.folder}"
            )
