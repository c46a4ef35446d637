"""`horovod-lm doctor`."""

import click

from horovod_lm.cli.common import json_option

EPILOG = """\b
Examples:
  horovod-lm doctor
  horovod-lm doctor --fix
  horovod-lm doctor --json"""


@click.command(epilog=EPILOG)
@click.option("--fix", is_flag=True, help="Mend what can be mended safely, without root.")
@json_option
def command(fix: bool, as_json: bool) -> int:
    """Say what is installed, what will go wrong, and the mend.

    Ends with two steps of a tiny model on two ranks of each backend. Exit code 0 if every installed
    backend can train here, 1 if not.
    """
    from horovod_lm.doctor import examine

    return examine(fix, as_json)
