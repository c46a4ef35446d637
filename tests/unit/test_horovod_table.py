"""The table of Horovod's API in docs/horovod.md, and its list of mends: without running a job."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import horovod_table as made  # noqa: E402
from horovod_build import ranks  # noqa: E402
from horovod_build.mending import load_mends  # noqa: E402

WRONG = "AssertionError: ranks differ"
LOST = "HorovodInternalError: the other rank has left"


def section(mark: str) -> list[str]:
    """The lines of the page between the marks."""
    text = made.PAGE.read_text(encoding="utf-8")
    begin = f"<!-- {mark}: scripts/horovod_table.py page -->\n"
    return text.split(begin)[1].split(f"<!-- end of {mark} -->")[0].splitlines()


def test_the_page_has_every_mend() -> None:
    """If this fails: scripts/horovod_table.py page."""
    assert section("mends") == made.list_of_mends()
    assert len(made.list_of_mends()) == len(load_mends())


def test_the_page_has_the_table_of_the_cells() -> None:
    cells = made.read_cells(made.CELLS)
    assert section("table") == made.table(cells)
    assert cells


@pytest.mark.parametrize(
    ("raised", "output", "outcome"),
    [
        ([None, None], "exit code 0\n", "right"),
        ([None, ""], "hang\n", "hang"),
        ([WRONG, LOST], "exit code 0\n", "silently wrong"),
        ([LOST, WRONG], "exit code 0\n", "silently wrong"),
        (["ValueError: no", LOST], "exit code 0\n", "error"),
        (["Keras3NotSupported: use another", LOST], "exit code 0\n", "refused"),
        (["RuntimeError: call synchronize first", None], "exit code 0\n", "refused"),
        (["", ""], "exit code 1\nSegmentation fault", "error"),
    ],
)
def test_a_job_is_judged(raised: list[str | None], output: str, outcome: str) -> None:
    found, said = made.judge(raised, output, refusal="call synchronize")
    assert found == outcome
    assert (said == "") == (outcome in ("right", "hang"))


def test_cells_are_kept_and_tried_again_when_the_mends_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def try_cell(probe, launcher, package, folder, of):
        tried.append((probe.name, launcher))
        return made.Cell("error", f"no file {tmp_path}/kept/x.py", 1.0, of)

    monkeypatch.setattr(made, "try_cell", try_cell)
    monkeypatch.setattr(ranks, "package", lambda folder, undone: folder)
    mends = {"build/a.py": "1", "python/b.py": "1"}
    monkeypatch.setattr(made, "mend_digests", lambda: mends)
    output = tmp_path / "cells.json"
    options = made.parse(["run", "--output", str(output), "--only", "tape"])
    made.run(options)
    assert tried == [("tape", "mpi"), ("tape", "gloo")] * 2
    assert {c.said for c in made.read_cells(output).values()} == {"no file x.py"}
    made.run(options)
    assert len(tried) == 4
    mends["python/b.py"] = "2"  # which plain Horovod does not have
    made.run(options)
    assert len(tried) == 6
    made.run(made.parse(["run", "--output", str(output), "--only", "tape", "--again"]))
    assert len(tried) == 10
