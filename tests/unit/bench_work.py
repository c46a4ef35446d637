"""A contestant's work without a framework, for tests of the processes around it."""

from __future__ import annotations

import os
import time

from horovod_lm.errors import UserError


class Sleeping:
    """A step sleeps; its units are the number of steps in a step."""

    def __init__(self, seconds: float = 0.01, mistake: str = "", fails_at: int = 0) -> None:
        if mistake:
            raise UserError(mistake)
        self.parts = ["one", "two"]
        self._seconds, self._fails_at, self._steps = seconds, fails_at, 0

    def step(self, part: str) -> float:
        self._steps += 1
        if self._steps == self._fails_at:
            raise ValueError(f"step {self._steps} fails\nin two lines")
        time.sleep(self._seconds)
        return 1.0 if part == "one" else 2.0

    def broadcast(self, data: bytes) -> bytes:
        return data


class Environment:
    """Its units tell a variable of the environment."""

    def __init__(self, name: str) -> None:
        self.parts, self._value = [""], float(os.environ.get(name, "-1"))

    def step(self, part: str) -> float:
        return self._value

    def broadcast(self, data: bytes) -> bytes:
        return data
