"""What all tests share."""

import signal

import pytest
from hypothesis import settings

from tests.parity.compare import FIGURES

# No test depends on how fast a machine is, or finds its files changed by an earlier run.
settings.register_profile("ours", deadline=None, database=None)
settings.load_profile("ours")

# A shell starts background jobs with SIGINT ignored, and their children inherit that: tests of
# Ctrl-C would wait in vain.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session):
    """In one of several processes: hand the figures to the one that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = FIGURES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for title, value in getattr(node, "workeroutput", {}).get("figures", {}).items():
        FIGURES[title] = max(FIGURES.get(title, 0.0), value)


def pytest_terminal_summary(terminalreporter):
    """Print how far apart things were, and not only that they were near enough."""
    for title, value in sorted(FIGURES.items()):
        terminalreporter.write_line(f"{title}: at most {value:.1e}")
