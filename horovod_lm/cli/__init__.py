"""The command line: `horovod-lm COMMAND …`.

Only click is imported here and at the top of the command modules; a command imports what it needs
when it runs, so that `--help` and shell completion answer at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

import click

from horovod_lm import __version__
from horovod_lm.errors import HorovodLmError
from horovod_lm.topology import place

# The process may be older: a shell script that waited, and then became this command by exec.
BEGAN = time.time()

COMMANDS = (
    "doctor", "prepare", "train", "compare", "report", "parity", "bench", "evaluate", "generate",
    "inspect", "convert", "completion",
)  # fmt: skip

EPILOG = """\b
A first run:
  horovod-lm doctor
  horovod-lm compare configs/quickstart.toml -np 2
  mpirun -np 2 horovod-lm train configs/quickstart.toml --backend torch

\b
Shell completion: eval "$(horovod-lm completion bash)"   (or zsh, fish)

\b
Exit codes: 0 good, 1 the run failed, 2 a mistake in what was given, 3 compared things differ,
75 stopped by a signal with a checkpoint (start it again with --resume), 130 Ctrl-C."""


class LazyGroup(click.Group):
    """Commands by name; the module of one is imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return import_module(f"horovod_lm.cli.{name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            near = get_close_matches(args[0], COMMANDS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            ctx.fail(f"there is no command {args[0]}; {hint}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="horovod-lm")
def group() -> None:
    """One Transformer, one training loop, two frameworks: train in PyTorch or TensorFlow over
    Horovod, and compare them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code; see EPILOG for the codes."""
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has gone; a second error at exit, from flushing, is no news.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = group.main(arguments, prog_name="horovod-lm", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        _wait_for_lower_ranks()
        click.echo(f"horovod-lm: {_usage(error)}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 130
    except HorovodLmError as error:
        _report(error, str(error))
        return error.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        name = type(error).__name__
        _report(
            error,
            f"internal error: {name}: {error} (set HOROVOD_LM_TRACEBACK=1 for the traceback)",
        )
        return 1


def _usage(error: click.ClickException) -> str:
    """click's message as one sentence, with the command whose help would tell."""
    message = error.format_message()
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    return f"{message[:1].lower()}{message[1:].rstrip('.')} (see {context.command_path} --help)"


def _report(error: Exception, message: str) -> None:
    """One message for the whole job. An error of a running job says itself whether this rank is
    the one to print it (`shown_by_me`)."""
    shown = getattr(error, "shown_by_me", None)
    if shown is False:
        return
    if shown is None:
        _wait_for_lower_ranks()
    if os.environ.get("HOROVOD_LM_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    click.echo(f"horovod-lm: {message}", err=True)


def _wait_for_lower_ranks() -> None:
    """Before the ranks can talk, each sees a faulty command line or config for itself. Launchers
    end a job at its first failed rank: if rank 0 has failed, it prints and the others are ended
    while they wait here; if it hasn't, this rank is the one that has something to say."""
    if place().rank > 0:
        time.sleep(2)
