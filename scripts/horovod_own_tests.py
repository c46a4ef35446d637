#!/usr/bin/env python3
"""Runs Horovod's own tests on two ranks, over MPI and over Gloo, with the mends of this checkout.

  python scripts/horovod_own_tests.py FOLDER [FILE ...]

FOLDER is `test` of Horovod's repository at v0.28.1; its release on PyPI and this repository do not
have it. FILE is a name in FOLDER/parallel, the four for PyTorch, TensorFlow and Keras if none is
given. A test has passed if it did on both ranks. What has failed is listed with what it said.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent))

from horovod_build import ranks
from horovod_build.facts import BuildError
from horovod_build.progress import Progress

FILES = ("test_torch.py", "test_tensorflow.py", "test_tensorflow2_keras.py", "test_keras.py")
RANKS = 2
SECONDS = 1200  # for a file
# A rank that waits for one whose test has failed fails after this long, not at the end of the file.
STALLED = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "5", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "15"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("files", nargs="*", metavar="FILE", default=FILES)
    options = parser.parse_args()
    missing = [f for f in options.files if not (options.folder / "parallel" / f).is_file()]
    if missing:
        print(f"{options.folder / 'parallel'} has no {', '.join(missing)}.", file=sys.stderr)
        return 2
    progress = Progress()
    failed = 0
    try:
        with tempfile.TemporaryDirectory(prefix="horovod-own-tests-") as folder:
            package = ranks.package(Path(folder, "package"))
            for name in options.files:
                for launcher in ranks.LAUNCHERS:
                    progress.stage(f"{name} over {launcher}")
                    results = Path(tempfile.mkdtemp(dir=folder))
                    ended = run(options.folder / "parallel" / name, launcher, package, results)
                    failed += report(f"{name}, {launcher}", results, ended)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return min(failed, 1)


def run(file: Path, launcher: str, package: Path, results: Path) -> str:
    """Runs one file on the ranks, each of which writes its results; returns the end of the job's
    output if it broke off."""
    script = (
        "import os, sys, pytest\n"
        "rank = os.environ.get('OMPI_COMM_WORLD_RANK') or os.environ['HOROVOD_RANK']\n"
        "results = f'--junit-xml={sys.argv[1]}/rank-{rank}.xml'\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-o', 'timeout=120', results,\n"
        "                      sys.argv[2]]))\n"
    )
    command = [*ranks.LAUNCHERS[launcher], str(RANKS), sys.executable, "-c", script]
    ended = subprocess.run(
        ["timeout", "--kill-after", "5", str(SECONDS), *command, str(results), file.name],
        cwd=file.parent,
        env={**ranks.environment(package), **STALLED},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ranks.end_processes_with(str(results))
    return "" if ended.returncode in (0, 1) else ended.stdout[-2000:]


def report(title: str, results: Path, ended: str) -> int:
    """Prints how the tests of a file have ended and what failed; returns the number of failures."""
    outcome: dict[str, str] = {}
    said: dict[str, str] = {}
    read = [ElementTree.parse(file).getroot() for file in sorted(results.glob("rank-*.xml"))]
    for case in (case for root in read for case in root.iter("testcase")):
        name = case.get("name", "")
        bad = next((e for e in case if e.tag in ("failure", "error")), None)
        if bad is not None:
            outcome[name] = "failed"
            said.setdefault(name, (bad.get("message") or "").splitlines()[0][:160])
        elif outcome.get(name) != "failed":
            skipped = case.find("skipped") is not None
            outcome[name] = "skipped" if skipped else "passed"
    counts = Counter(outcome.values())
    print(f"{title}: " + (", ".join(f"{n} {what}" for what, n in counts.items()) or "no results"))
    for name, what in said.items():
        print(f"  {name}: {what}")
    if len(read) < RANKS:
        print(f"  {RANKS - len(read)} ranks did not end:\n{ended}")
    return counts["failed"] + RANKS - len(read)


if __name__ == "__main__":
    sys.exit(main())
