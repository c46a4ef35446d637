"""The ways in which a command ends, as exceptions that carry the exit code."""

from __future__ import annotations


class HorovodLmError(Exception):
    """Base of every error that is shown to a person as one message, without a traceback.

    `exit_code` is what the process ends with; see "How a command ends" in the README. Where all
    ranks of a job raise the same error, `shown_by_me` says whether this one prints it.
    """

    exit_code = 1
    shown_by_me: bool | None = None


class RunFailed(HorovodLmError):
    """The work began and could not be finished (exit code 1)."""

    exit_code = 1


class CollectiveFailed(RunFailed):
    """Another rank has ended, or the job has stalled: nothing can be agreed on any more."""


class UserError(HorovodLmError):
    """A mistake in what the user gave, found before the work began (exit code 2).

    The message says what was given, what is allowed, and the mend.
    """

    exit_code = 2


class Stopped(HorovodLmError):
    """The run was stopped by a signal, with a checkpoint: start it again with `--resume`.

    `exit_code` is 75 for SIGTERM and the like, 130 for Ctrl-C.
    """

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code
