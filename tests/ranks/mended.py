"""Checks of Horovod in jobs of several ranks, with other mends than it was built with.

A test of a mend must fail without it: `package` makes a copy of the installed package in which
chosen mends of its Python are undone. With none undone it has those of this checkout, without a
build.

A test file holds its checks, functions without arguments that raise where something is wrong, ends
in `if __name__ == "__main__": main(CHECKS)`, and runs them by `Jobs` on its own `__file__`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from horovod_build import ranks
from horovod_build.facts import BuildError
from horovod_build.ranks import (
    BIN,
    LAUNCHERS,
    end_processes_with,
    environment,
    main,
    processes_with,
    run_checks,
)

__all__ = [
    "BIN",
    "LAUNCHERS",
    "Job",
    "Jobs",
    "end_processes_with",
    "environment",
    "folder_of_job",
    "main",
    "package",
    "processes_with",
]

Errors = list[dict[str, str | None]]  # for each rank, what each check that ended raised, or None


def package(folder: Path, undone: Collection[str] = ()) -> Path:
    """As `ranks.package`, which says what it makes; skips the test where that can't be done."""
    try:
        return ranks.package(folder, undone)
    except BuildError as error:
        pytest.skip(str(error))


def folder_of_job() -> Path:
    """In a rank: a folder that is this job's alone."""
    return Path(sys.argv[1])


@dataclass(frozen=True)
class Job:
    """How the checks of one job have ended on each rank, and the end of its output."""

    ranks: Errors
    output: str

    def passed(self, check: str) -> None:
        """Asserts that it passed on every rank."""
        assert self._said(check) == [None] * len(self.ranks), self.output

    def failed(self, check: str, *, may_wait: bool = False) -> None:
        """Asserts that it raised on some rank. It must have ended on all, or what came before it
        might have ended the job, unless it `may_wait` for ever and is the last one."""
        said = self._said(check)
        assert any(said), f"{check} passed\n{self.output}"
        assert may_wait or _MISSING not in said, f"{check}: {said}\n{self.output}"

    def _said(self, check: str) -> list[str | None]:
        return [rank.get(check, _MISSING) for rank in self.ranks]


_MISSING = "did not end"


class Jobs:
    """Jobs with checks of `file`. Each combination of launcher, checks and undone mends runs once,
    and each set of undone mends gets one package."""

    def __init__(
        self, file: str, folders: pytest.TempPathFactory, env: Mapping[str, str] | None = None
    ) -> None:
        self._file, self._folders, self._env = file, folders, env or {}
        self._packages: dict[tuple[str, ...], Path] = {}
        self._done: dict[tuple[object, ...], Job] = {}

    def __call__(
        self,
        launcher: str,
        checks: Sequence[str],
        undone: Collection[str] = (),
        *,
        seconds: float = 150,
        check_seconds: float | None = None,
        ranks: int = 2,
    ) -> Job:
        """The job with these checks, in this order, in at most `seconds`; a check that takes longer
        than `check_seconds` ends it."""
        without = tuple(sorted(undone))
        key = (launcher, tuple(checks), without, ranks)
        if key not in self._done:
            if without not in self._packages:
                self._packages[without] = package(self._folders.mktemp("package"), without)
            env = dict(self._env)
            if check_seconds is not None:
                env["CHECK_SECONDS"] = str(check_seconds)
            self._done[key] = Job(
                *run_checks(
                    launcher,
                    self._file,
                    checks,
                    self._folders.mktemp("job"),
                    path=self._packages[without],
                    ranks=ranks,
                    seconds=seconds,
                    env=env,
                )
            )
        return self._done[key]
