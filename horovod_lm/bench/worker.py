"""The process of a contestant: makes its work, then does as many steps of it as it is told."""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

from horovod_lm.errors import UserError
from horovod_lm.topology import place

WARM_STEPS = 3  # untimed ones after the first, before a part's first turn


class Work(Protocol):
    """What a contestant does. It is made in each process of the contestant by a function
    `module:name` with keyword arguments that JSON can hold; in a job of several ranks all of them
    make the same calls. `parts` are the things that it can do, [""] where there is only one."""

    parts: Sequence[str]

    def step(self, part: str) -> float:
        """Do one step of `part` to its end; returns its units, of all ranks together."""

    def broadcast(self, data: bytes) -> bytes:
        """`data` of rank 0, on every rank; the same `data` where there is only one rank."""


def main(address: str, work: str, arguments: str) -> None:
    """Make the work and serve turns until the driver goes away."""
    # torchrun, which starts some of the peers, tells the rank in another variable.
    rank = int(os.environ.get("RANK", place().rank))
    driver = None
    if rank == 0:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        driver = connection.makefile("rw", encoding="utf-8")
    try:
        _serve(driver, work, json.loads(arguments))
    except UserError as error:
        _send(driver, {"mistake": str(error)})
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        # A launcher's own words may hide those of the rank that failed.
        said = str(error).partition("\n")[0]
        _send(driver, {"failure": f"{type(error).__name__}: {said}"})
        raise


def _serve(driver: Any, work: str, arguments: dict[str, Any]) -> None:
    module, _, name = work.partition(":")
    begin = time.perf_counter()
    made: Work = getattr(import_module(module), name)(**arguments)
    _send(driver, {"seconds": time.perf_counter() - begin, "parts": list(made.parts)})
    pace: dict[str, float] = {}
    while True:
        asked = json.loads(made.broadcast((driver.readline() if driver else "").encode()) or "{}")
        if not asked:
            return
        part = asked["part"]
        if part not in pace:
            answer = _warm(made, part)
            pace[part] = answer["step_seconds"]
        else:
            plan = json.dumps(max(1, round(asked["seconds"] / pace[part])))
            count = json.loads(made.broadcast(plan.encode()))
            begin = time.perf_counter()
            units = sum(made.step(part) for _ in range(count))
            seconds = time.perf_counter() - begin
            pace[part] = seconds / count
            answer = {"seconds": seconds, "units": units}
        _send(driver, answer)


def _warm(work: Work, part: str) -> dict[str, float]:
    """The first step, which may trace and compile, apart from the next ones."""
    begin = time.perf_counter()
    work.step(part)
    first, begin = time.perf_counter() - begin, time.perf_counter()
    for _ in range(WARM_STEPS):
        work.step(part)
    return {
        "first_seconds": first,
        "step_seconds": (time.perf_counter() - begin) / WARM_STEPS,
        "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _send(driver: Any, answer: dict[str, Any]) -> None:
    if driver is not None:
        driver.write(json.dumps(answer) + "\n")
        driver.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
