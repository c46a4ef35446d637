"""Each mend of Horovod has a reason, links to public threads, and a test that undoes it; without a
job."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from horovod_build.mending import KINDS, MENDS  # noqa: E402

FILES = {f"{kind}/{f.stem}": f for kind in KINDS for f in sorted((MENDS / kind).glob("*.py"))}
PYTHON = [name for name in FILES if name.startswith("python/")]
# These add a file that other mends use: they have no fault of their own that a test could show.
MODULES = {
    "python/elastic_module": "used by keras3_elastic and elastic_tensorflow_state",
    "python/keras3_callbacks": "used by the mends of the callbacks",
    "python/keras3_module": "used by every mend for Keras 3",
    "python/runner_module": "used by the mends of horovodrun",
}
# Faults that were found here: no public thread tells of them.
NO_THREAD = {
    "build/build_record",
    "build/relocatable",
    "python/broadcast_object_fn",
    "python/elastic_missed_updates",
    "python/join_again",
    "python/runner_signals",
    "python/runner_start_signal",
    "python/torch_elastic_sync",
    *MODULES,
}


def docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def links(text: str) -> list[str]:
    return [link.rstrip(".") for link in re.findall(r"\w+://[^\s,;)]+", text)]


def undone(folder: Path) -> set[str]:
    """The mends that tests in `folder` undo: those that a file names as "python/NAME", or as "NAME"
    where it puts "python/" before names itself."""
    found = set()
    for file in folder.glob("test_*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        said = {n.value for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings
        constants = {n for n in ast.walk(tree) if isinstance(n, ast.Constant)} - said
        names = {n.value for n in constants if isinstance(n.value, str)}
        if "undone" not in {n.arg for n in ast.walk(tree) if isinstance(n, ast.keyword | ast.arg)}:
            continue
        found |= {name for name in names if name in PYTHON}
        joined = [n.values[0] for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) and n.values]
        if any(isinstance(part, ast.Constant) and part.value == "python/" for part in joined):
            found |= {f"python/{name}" for name in names if f"python/{name}" in PYTHON}
    return found


@pytest.mark.parametrize("name", FILES)
def test_it_says_what_it_mends_and_why(name: str) -> None:
    first, *others = docstring(FILES[name]).split("\n\n")
    assert re.fullmatch(r"[A-Z`].*[^.]\.", first, re.S), f"no first sentence: {first}"
    reasons = [text for text in others if not text.startswith(("See http", "http"))]
    assert reasons or (name in MODULES and "which" in first), "no reason"


@pytest.mark.parametrize("name", FILES)
def test_its_links_lead_to_public_threads(name: str) -> None:
    found = links(docstring(FILES[name]))
    for link in found:
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", link), link
    assert name in NO_THREAD or found, "no link"


def test_the_exceptions_are_needed() -> None:
    assert set(MODULES) | NO_THREAD <= set(FILES)
    for name in MODULES:
        assert "source.add(" in FILES[name].read_text(encoding="utf-8"), name
    for name in NO_THREAD - set(MODULES):
        assert not links(docstring(FILES[name])), f"{name} has a link"


def test_a_test_on_ranks_undoes_each_mend() -> None:
    missing = set(PYTHON) - undone(ROOT / "tests" / "ranks") - set(MODULES)
    assert not missing, f"no test undoes {', '.join(sorted(missing))}"


def test_what_counts_as_undone(tmp_path: Path) -> None:
    one, other = (name.removeprefix("python/") for name in PYTHON[:2])
    (tmp_path / "test_a.py").write_text(f'A = "python/{one}"\n')
    assert undone(tmp_path) == set()
    (tmp_path / "test_b.py").write_text(
        f'"""python/{other}"""\npackage(x, undone=["python/{one}"])\n'
    )
    assert undone(tmp_path) == {f"python/{one}"}
    (tmp_path / "test_c.py").write_text(
        f'N = ["{other}", "none"]\npackage(x, undone=[f"python/{{n}}" for n in N])\n'
    )
    assert undone(tmp_path) == {f"python/{one}", f"python/{other}"}
