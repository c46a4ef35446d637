"""Folders that a user may not enter: said in a line, not taken for empty or for our fault."""

import subprocess
import sys

import pytest

from tests.helpers import open_to_others

# In a process of its own, which gives up root's right to enter everything.
NOBODY = """
import os, sys
from pathlib import Path
from horovod_lm.checkpoint import config_of_run, newest
from horovod_lm.config import make_config
from horovod_lm.data.documents import find_files
from horovod_lm.data.prepare import prepare
from horovod_lm.errors import UserError
from horovod_lm.inspection import check_disk
from horovod_lm.run_folder import claim
from horovod_lm.train import claim_check
os.getuid() or os.setuid(65534)
locked = sys.argv[1] + "/locked"
try:
    {}
except UserError as error:
    print(error)
"""


@pytest.fixture
def locked(tmp_path):
    folder = tmp_path / "locked"
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "text.txt").write_text("one\n\ntwo\n")
    open_to_others(tmp_path)
    folder.chmod(0)
    yield folder
    folder.chmod(0o755)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("find_files([locked + '/text.txt'])", "locked can't be read: Permission denied"),
        ("find_files([locked + '/texts/*.txt'])", "locked can't be read: Permission denied"),
        ("claim(Path(locked), False)", "locked is not writable"),
        ("claim(Path(locked, 'run'), False)", "run can't be made: permission denied"),
        ("claim_check(Path(locked, 'run'), False)", ""),
        ("newest(Path(locked, 'run', 'checkpoints'))", "can't be read: Permission denied"),
        ("config_of_run(Path(locked, 'run'))", "config.toml can't be read: Permission denied"),
        ("check_disk(Path(locked, 'run'), 0)", ""),
        (
            "prepare(make_config({'data': {'text': [sys.argv[1] + '/text.txt'], "
            "'tokenizer': locked + '/tokenizer.json'}}, ''))",
            "tokenizer.json can't be read (Permission denied)",
        ),
    ],
)
def test_a_folder_that_may_not_be_entered_is_named(locked, code, said):
    process = [sys.executable, "-c", NOBODY.format(code), str(locked.parent)]
    done = subprocess.run(process, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and bool(said) == bool(done.stdout)
