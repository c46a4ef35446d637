"""`horovod-lm generate`."""

import sys
from pathlib import Path

import click

from horovod_lm.cli.common import backend_option, json_option

EPILOG = """\b
Examples:
  horovod-lm generate runs/mine --prompt "The river"
  echo -n "The river" | horovod-lm generate runs/mine --prompt - --temperature 0.8 --seed 3"""


@click.command(epilog=EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    required=True,
    metavar="TEXT",
    help="The text to go on from, or to encode; the name of a special token, such as "
    "<extra_id_0>, stands for it; -: stdin.",
)
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="How many.")
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="0: always the likeliest token.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of sampling.")
@backend_option
@json_option
def command(
    run: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    backend: str | None,
    as_json: bool,
) -> None:
    """Let a trained RUN continue or answer a text."""
    from contextlib import redirect_stdout

    from horovod_lm.errors import UserError

    text = _standard_input() if prompt == "-" else prompt
    if not text:
        raise UserError("the prompt is empty; give at least one character")
    import numpy as np

    from horovod_lm.decode import generate
    from horovod_lm.objectives.registry import prompt_begin, prompt_is_prefix
    from horovod_lm.objectives.words import decoder_start
    from horovod_lm.restored import restore

    with redirect_stdout(sys.stderr):  # the text alone belongs on stdout
        restored = restore(run, backend, data=False)
        config, tokenizer = restored.config, restored.tokenizer
        ids, source = tokenizer.encode(text, special=True), None
        if config.model.kind == "encoder-decoder":
            source = np.append(ids, np.int32(tokenizer.end))[None]
            start = decoder_start(tokenizer) if restored.start is None else restored.start
            ids = np.array([start], np.int32)
        elif (begin := prompt_begin(config, tokenizer)) is not None:
            ids = np.append(np.int32(begin), ids)
        out = generate(
            restored.engine,
            ids[None],
            tokens,
            context=config.model.context,
            temperature=temperature,
            seed=seed,
            end=tokenizer.end,
            source=source,
            prefix=source is None and prompt_is_prefix(config),
        )
        restored.communicator.shutdown()
    if restored.communicator.rank:
        return
    continuation = tokenizer.decode(out[0])
    if as_json:
        import json

        click.echo(json.dumps({"prompt": text, "continuation": continuation}, ensure_ascii=False))
    else:
        # What a decoder alone gives goes on with the prompt; behind an encoder it is a text apart.
        click.echo(continuation if source is not None else text + continuation)


def _standard_input() -> str:
    from horovod_lm.errors import UserError

    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt on standard input is not UTF-8 text: {error}") from None
