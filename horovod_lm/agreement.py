"""Ranks fail together: an error that one of them sees ends all, with one message."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from horovod_lm.backend import Communicator
from horovod_lm.errors import CollectiveFailed, HorovodLmError, RunFailed, UserError


def explain(error: Exception) -> HorovodLmError:
    """`error` as one that can be shown to a person."""
    if isinstance(error, HorovodLmError):
        return error
    if os.environ.get("HOROVOD_LM_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return RunFailed(f"{where}{error.strerror.lower()}")
    return RunFailed(f"{type(error).__name__}: {error}")


def agree(communicator: Communicator, error: Exception | None) -> None:
    """A collective: raise on every rank if any rank comes with an error.

    All raise the error of the lowest failing rank, with its exit code; only that rank has
    `shown_by_me` set, so that one message is printed.
    """
    if isinstance(error, CollectiveFailed):
        raise error
    shown = None if error is None else explain(error)
    message = b"" if shown is None else json.dumps([str(shown), shown.exit_code]).encode()
    answers = communicator.allgather(message)
    for rank, answer in enumerate(answers):
        if answer:
            text, code = json.loads(answer)
            where = (
                f"rank {rank}: " if len(set(filter(None, answers))) > 1 or b"" in answers else ""
            )
            kind = UserError if code == UserError.exit_code else RunFailed
            raise together(kind(where + text), communicator, rank) from error


@contextmanager
def agreed(communicator: Communicator) -> Iterator[None]:
    """A collective around work that each rank does for itself: if one of them fails in it, all
    leave it with the same error; see `agree`."""
    trouble = None
    try:
        yield
    except Exception as error:
        trouble = error
    agree(communicator, trouble)


def together(error: HorovodLmError, communicator: Communicator, rank: int = 0) -> HorovodLmError:
    """Mark an error that every rank raises as shown by `rank` alone."""
    error.shown_by_me = communicator.rank == rank
    return error
