"""Backends are found by entry point and imported when they are asked for, not before."""

import sys
from pathlib import Path

import pytest

from horovod_lm.backend import ERROR, INTERRUPT, OVERFLOW, STOP, backend_names, load_backend
from horovod_lm.errors import UserError


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution that gives three backends: one that works, and two whose framework is
    missing. Others that are installed are out of sight."""
    information = tmp_path / "some_backends-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: some_backends\nVersion: 1\n"
    )
    (information / "entry_points.txt").write_text(
        "[horovod_lm.backends]\n"
        "third = third_backend:Backend\n"
        "torch = broken_backend:Backend\n"
        "other = broken_backend:Backend\n"
    )
    (tmp_path / "third_backend.py").write_text(
        "class Backend:\n    def __init__(self, threads):\n        self.threads = threads\n"
    )
    (tmp_path / "broken_backend.py").write_text("import no_such_framework\n")
    plain = [entry for entry in sys.path if "site-packages" not in entry and not is_root(entry)]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *plain])
    yield
    for name in ("third_backend", "broken_backend"):
        sys.modules.pop(name, None)


def is_root(entry: str) -> bool:
    return Path(entry or ".").resolve() == Path(__file__).parents[2]


def test_names_come_from_entry_points_without_an_import(installed):
    assert backend_names() == ["other", "third", "torch"]
    assert "third_backend" not in sys.modules


def test_the_one_that_is_asked_for_is_loaded(installed):
    backend = load_backend("third", threads=3)
    assert backend.threads == 3
    assert "broken_backend" not in sys.modules


def test_an_unknown_name_is_refused_with_the_known_ones(installed):
    with pytest.raises(UserError) as caught:
        load_backend("pytorch")
    assert str(caught.value) == (
        '"pytorch" is not a backend; installed are: other, third, torch '
        "(entry points of group horovod_lm.backends)"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torch", "needs torch, which is missing; pip install 'horovod_lm[torch]'"),
        ("other", "can't be imported: No module named 'no_such_framework'; install "
         "no_such_framework, and see horovod-lm doctor"),
    ],
)  # fmt: skip
def test_a_missing_framework_is_named_with_the_mend(installed, monkeypatch, name, said):
    # An earlier test may have imported it, and what is imported is found without a path.
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(UserError) as caught:
        load_backend(name)
    assert str(caught.value) == f"backend {name} {said}"


def test_the_status_bits_do_not_overlap():
    assert STOP | INTERRUPT | ERROR | OVERFLOW == STOP + INTERRUPT + ERROR + OVERFLOW == 15
