"""Runs functions on ranks, with Horovod as it is released or with chosen mends undone.

`package` makes a copy of the installed package whose Python has other mends than it was built
with; none of it needs a build. A file of checks, functions without arguments that raise where
something is wrong, ends in `if __name__ == "__main__": main(CHECKS)`; `run_checks` runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from horovod_build.cache import cache_root
from horovod_build.facts import SDIST, SDIST_SHA256, VERSION, BuildError
from horovod_build.mending import apply_mends, digest_of, load_mends

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Where mpirun keeps its session, in a folder named after its process's number. One that was killed
# leaves it behind, and a later one of that number fails: https://github.com/openpmix/openpmix/issues/4022
OPEN_MPI_SESSION = "PRTE_MCA_prte_local_tmpdir_base"
LAUNCHERS = {
    "mpi": [str(BIN / "mpirun"), "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "-np"],
    "gloo": [str(BIN / "horovodrun"), "--gloo", "-np"],
}


def run_checks(
    launcher: str,
    file: str,
    names: Sequence[str],
    folder: Path,
    *,
    path: Path | None = None,
    ranks: int = 2,
    seconds: float = 150,
    env: Mapping[str, str] | None = None,
) -> tuple[list[dict[str, str | None]], str]:
    """Run the checks `names` of `file` on ranks started by "mpi" or "gloo", with the package at
    `path` (see `package`) or the installed one. Returns for each rank what each check that ended
    raised (None: it passed), and the end of the job's output; "hang" in it where time was up. No
    rank is left behind."""
    command = [*LAUNCHERS[launcher], str(ranks), sys.executable, file, str(folder), *names]
    limited = ["timeout", "--kill-after", "5", str(seconds), *command]
    with tempfile.TemporaryDirectory(prefix="mpirun-", ignore_cleanup_errors=True) as session:
        try:
            ended = subprocess.run(
                limited,
                env={**environment(path), OPEN_MPI_SESSION: session, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        finally:
            end_processes_with(str(folder))
    results = []
    for rank in range(ranks):
        lines = folder / f"rank-{rank}.jsonl"
        results.append(dict(map(json.loads, lines.open())) if lines.exists() else {})
    what = "hang" if ended.returncode in (124, 137) else f"exit code {ended.returncode}"
    return results, f"{what}\n{ended.stdout[-5000:]}"


def measured(file: str, launcher: str, *, mends: bool, env: Mapping[str, str]) -> Any:
    """What rank 0 of a job of two puts into FOLDER/result.json. The ranks run `file FOLDER work`
    with the installed package, or with the `mends` of this checkout.

    Raises BuildError if the job fails, or if Horovod's source can't be had.
    """
    with tempfile.TemporaryDirectory(prefix="horovod-measured-") as name:
        folder = Path(name)
        path = package(folder / "package") if mends else None
        _, said = run_checks(launcher, file, ["work"], folder, path=path, seconds=3600, env=env)
        result = folder / "result.json"
        if not said.startswith("exit code 0\n") or not result.exists():
            raise BuildError(f"The job failed: {said}")
        return json.loads(result.read_text())


def environment(path: Path | None = None) -> dict[str, str]:
    """The environment of a job with the package at `path`: ranks that share few cores."""
    places = (path, ROOT, ROOT / "scripts")
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(str(p) for p in places if p is not None),
        # The library finds its MPI by its own place, which a link in `path` hides.
        "LD_LIBRARY_PATH": f"{sys.prefix}/lib{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "HOROVOD_CYCLE_TIME": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def processes_with(word: str) -> list[int]:
    """The processes, other than this one, that have `word` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(OSError):  # it has ended
                if word.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def end_processes_with(word: str) -> list[int]:
    """Ends `processes_with(word)`, and returns them."""
    found = processes_with(word)
    for number in found:
        with suppress(OSError):
            os.kill(number, signal.SIGKILL)
    return found


def main(checks: Mapping[str, Callable[[], None]]) -> None:
    """One rank: runs the checks that are asked for, in order, and writes how each has ended.

    A check that takes longer than $CHECK_SECONDS, if that is set, ends the process, and so the job.
    """
    folder, *names = sys.argv[1:]
    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["HOROVOD_RANK"]
    with Path(folder, f"rank-{rank}.jsonl").open("w") as results:
        for name in names:
            limit = threading.Timer(float(os.environ.get("CHECK_SECONDS", 1e6)), os._exit, [1])
            limit.daemon = True
            limit.start()
            try:
                checks[name]()
                error = None
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"
                traceback.print_exc()
            limit.cancel()
            print(json.dumps([name, error]), file=results, flush=True)


def package(folder: Path, undone: Collection[str] = ()) -> Path:
    """A folder for PYTHONPATH under `folder`, whose horovod lacks the mends `undone`, such as
    "python/keras3_optimizer"; "python" undoes all of that kind. Mends of C++ stay as built.

    Raises BuildError where Horovod's source can't be had.
    """
    with tarfile.open(_archive()) as tar:
        tar.extractall(folder, filter="data")
    source = folder / f"horovod-{VERSION}"
    mends = [m for m in load_mends() if m.name not in undone and m.name.split("/")[0] not in undone]
    known = {name for m in load_mends() for name in (m.name, m.name.split("/")[0])}
    assert set(undone) <= known, set(undone) - known
    apply_mends(source, mends)
    spec = find_spec("horovod")
    if spec is None or spec.origin is None:
        raise BuildError("Horovod is not installed: scripts/build_horovod.py --install")
    installed, made = Path(spec.origin).parent, folder / "site"
    for file in installed.rglob("*"):
        place = made / "horovod" / file.relative_to(installed)
        if file.is_dir() or file.suffix in (".py", ".pyc"):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file)
    for file in (source / "horovod").rglob("*.py"):
        place = made / "horovod" / file.relative_to(source / "horovod")
        if (installed / file.relative_to(source / "horovod").parent).is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    shutil.rmtree(source)
    return made


def _archive() -> Path:
    """Horovod's released source, from the user's cache or by pip into it."""
    kept = cache_root() / "source" / SDIST
    if kept.is_file() and digest_of(kept) == SDIST_SHA256:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", f"horovod=={VERSION}", "--no-deps"]
        command += ["--no-binary", "horovod", "--no-build-isolation", "--dest", folder]
        subprocess.run(command, capture_output=True, check=False)
        archive = Path(folder, SDIST)
        if not archive.is_file() or digest_of(archive) != SDIST_SHA256:
            raise BuildError(f"pip can't download the source of horovod {VERSION}")
        os.replace(archive, kept)
    return kept
