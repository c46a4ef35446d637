"""`horovod-lm convert`."""

from pathlib import Path

import click

from horovod_lm.cli.common import backend_option

EPILOG = """\b
Examples:
  horovod-lm convert --from hf ~/models/bert-base-uncased --to run runs/bert
  horovod-lm convert --from run runs/mine --to hf ~/models/mine
  horovod-lm convert --from run runs/mine --to saved-model exported"""


def _end(*kinds: str) -> click.Tuple:
    return click.Tuple([click.Choice(kinds), click.Path(path_type=Path)])


@click.command(epilog=EPILOG)
@click.option(
    "--from", "source", nargs=2, type=_end("hf", "run"), required=True, metavar="hf|run PATH",
    help="A folder of transformers, or that of a run.",
)  # fmt: skip
@click.option(
    "--to", "target", nargs=2, type=_end("run", "hf", "saved-model"), required=True,
    metavar="run|hf|saved-model PATH", help="A new folder.",
)  # fmt: skip
@click.option("--legacy", is_flag=True, help="Also read pytorch_model.bin, without running code.")
@click.option("--keep-extra", is_flag=True, help="Carry along tensors that have no place.")
@backend_option
def command(
    source: tuple[str, Path],
    target: tuple[str, Path],
    legacy: bool,
    keep_extra: bool,
    backend: str | None,
) -> None:
    """Turn models of transformers into runs, and back.

    BERT, RoBERTa, DistilBERT, GPT-2, T5, T5 v1.1 and Llama: config.json, safetensors (sharded
    too), tokenizer.json. A run can then be evaluated, generate, and be trained further: start
    another one with --set train.start_from=RUN. docs/convert.md has the details.

    A backend is at work for --legacy (torch's) and for a SavedModel (tensorflow's) alone.
    """
    from horovod_lm.convert.run import export_run, import_run
    from horovod_lm.errors import UserError

    (kind, path), (form, place) = source, target
    if (kind, form) == ("hf", "run"):
        import_run(path, place, legacy=legacy, keep_extra=keep_extra, log=click.echo)
    elif legacy or keep_extra:
        raise UserError("--legacy and --keep-extra go with --from hf alone")
    elif (kind, form) == ("run", "hf"):
        family = export_run(path, place, log=click.echo)
        click.echo(f"written as {family}")
    elif (kind, form) == ("run", "saved-model"):
        from horovod_lm.convert.saved_model import export_saved_model

        export_saved_model(path, place, backend or "tensorflow")
    else:
        raise UserError(f"--from {kind} --to {form} does nothing; convert to a run, or from one")
    click.echo(str(place))
