"""`horovod-lm completion`."""

import click

EPILOG = """\b
Examples:
  eval "$(horovod-lm completion bash)"                                in ~/.bashrc
  eval "$(horovod-lm completion zsh)"                                 in ~/.zshrc
  horovod-lm completion fish > ~/.config/fish/completions/horovod-lm.fish"""


@click.command(epilog=EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print a script for shell completion."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    root = context.find_root().command
    click.echo(kind(root, {}, "horovod-lm", "_HOROVOD_LM_COMPLETE").source())
