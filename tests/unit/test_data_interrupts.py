"""Ctrl-C while data is prepared: at once, with one line, and without what belongs to processes that
were just starting."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from horovod_lm.data.interrupts import interruptible

COMMAND = [sys.executable, "-m", "horovod_lm", "prepare"]
MESSAGE = "horovod-lm: interrupted; the same command goes on with what is done"


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    draw = np.random.default_rng(1)
    words = ["".join(map(chr, draw.integers(97, 123, 7))) for _ in range(3000)]
    text = "\n\n".join(" ".join(draw.choice(words, 60)) for _ in range(6000))
    (tmp_path / "text.txt").write_text(text)
    path = tmp_path / "my.toml"
    path.write_text(
        '[model]\ncontext = 8\n[data]\ntext = ["text.txt"]\nvocabulary = 500\nworkers = 2\n'
    )
    return path


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1, 0.3])
def test_workers_that_are_starting_say_nothing(config, delay):
    process = subprocess.Popen(
        [*COMMAND, str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("tokenising"):
            break
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stdout.read().strip()
    assert process.wait() == 130
    assert rest == MESSAGE


def test_a_library_that_takes_the_texts_in_its_own_threads_is_left(config):
    # So slowly that it takes a minute, on a terminal, whose bar goes and whose cursor comes back.
    slow = (
        "import time\n"
        "from horovod_lm.data import making as module\n"
        "cut = module._first\n"
        "def slowly(*arguments):\n"
        "    for piece in cut(*arguments):\n"
        "        time.sleep(0.01)\n"
        "        yield piece\n"
        "module._first = slowly\n"
        "from horovod_lm.cli import main\n"
        f"main(['prepare', {str(config)!r}])\n"
    )
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", slow],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
    )
    os.close(theirs)
    shown, begun = b"", None
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:
            break
        if not block:
            break
        shown += block
        if begun is None and re.search(rb"[1-9]\d*/5700", re.sub(rb"\x1b\[[0-9;?]*m", b"", shown)):
            begun = time.monotonic()
            os.killpg(process.pid, signal.SIGINT)
    os.close(ours)
    assert process.wait() == 130
    assert time.monotonic() - begun < 10
    assert MESSAGE.encode() in shown and b"Traceback" not in shown
    assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h") > 0


def test_a_reader_of_the_log_that_goes_is_no_fault_of_the_cache(config):
    process = subprocess.Popen(
        [*COMMAND, str(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("training"):
            break
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1
    again = subprocess.run([*COMMAND, str(config)], capture_output=True, text=True, check=True)
    assert "going on with what was left unfinished" in again.stdout


def test_what_the_work_gives_or_raises_comes_out():
    assert interruptible(lambda texts: "".join(texts) * 2, iter("ab")) == "abab"
    assert interruptible(lambda texts: [*texts, *texts], ["a", "b"]) == ["a", "b"] * 2
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda texts: 1 / 0, [])
