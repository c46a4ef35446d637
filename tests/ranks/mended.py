"""Checks of Horovod in jobs of several ranks, with other mends than it was built with.

A test of a mend must fail without it: `package` makes a copy of the installed package in which
chosen mends of its Python are undone. With none undone it has those of this checkout, without a
build.

A test file holds its checks, functions without arguments that raise where something is wrong, ends
in `if __name__ == "__main__": main(CHECKS)`, and runs them by `run_checks` on its own `__file__`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from horovod_build import ranks
from horovod_build.facts import BuildError
from horovod_build.ranks import BIN, LAUNCHERS, ROOT, main, run_checks

__all__ = ["BIN", "LAUNCHERS", "ROOT", "main", "package", "run_checks"]


def package(folder: Path, undone: Collection[str] = ()) -> Path:
    """As `ranks.package`, which says what it makes; skips the test where that can't be done."""
    try:
        return ranks.package(folder, undone)
    except BuildError as error:
        pytest.skip(str(error))
