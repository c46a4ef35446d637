"""What the repository promises at first sight: its README, scripts, licence and configs."""

from __future__ import annotations

import os
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from horovod_lm.config import load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Places of one machine or user, and addresses of package registries.
PRIVATE = re.compile(
    r"/(?:root|work|tmp|Users)/\w|/home/(?!trainer/)\w|/opt/(?:wheels|pypi)"
    r"|https?://[^\s\"']*(?:pypi|pythonhosted|download\.pytorch|registry|/simple\b)"
)


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Every file that git keeps, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("this copy is not a git checkout")
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE
    )
    names = listed.stdout.decode().split("\0")
    return [Path(name) for name in names if name and (ROOT / name).exists()]


def tree() -> dict[str, str]:
    """The README's file tree: path (folders end with /) and what is said of it."""
    block = README.split("## What is where\n```\n")[1].split("```")[0]
    found, folder = {}, ""
    for line in block.splitlines():
        indented = line.startswith("  ")
        names, said = [], line.split()
        while said and re.fullmatch(r"[\w./]*(/|\.\w+)|LICENSE|NOTICE|\.ci/run", said[0]):
            names.append(said.pop(0))
            if names[-1].endswith("/"):
                break
        for name in names:
            found[(folder if indented else "") + name] = " ".join(said)
        if not indented:
            folder = names[0] if names[0].endswith("/") else ""
    return found


def test_tree_names_what_there_is() -> None:
    for path, said in tree().items():
        assert (ROOT / path).exists(), f"README names {path}, which is not there"
        assert said, f"README says nothing of {path}"


def test_everything_is_in_the_tree(tracked: list[Path]) -> None:
    rooms = {f"{path.parent}/" for path in tracked if 1 <= len(path.parent.parts) <= 2}
    rooms |= {f"{path.parts[0]}/" for path in tracked if len(path.parts) > 1}
    files = {
        str(path)
        for path in tracked
        if len(path.parts) == 1 or str(path.parent) in ("horovod_lm", "scripts", ".ci")
    }
    templates = {"horovod_lm/report/templates/", ".ci/", "README.md"}
    missing = (rooms | files) - tree().keys() - templates
    assert not missing, f"the README's tree lacks {', '.join(sorted(missing))}"


def test_no_source_is_ignored(tracked: list[Path]) -> None:
    # A careless line in .gitignore once left the mends in build/ out of every clone.
    command = ["git", "-c", "safe.directory=*", "ls-files", "--others", "--ignored"]
    listed = subprocess.run(
        [*command, "--exclude-standard", "horovod_lm", "torch_backend", "tf_backend", "scripts"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert not [name for name in listed.stdout.split() if name.endswith((".py", ".sh"))]


def test_readme_names_both_commands_first() -> None:
    assert README.index("```\nscripts/quickstart.sh\n") < README.index("```\nscripts/test.sh\n")
    assert len(README.splitlines()) < 200


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), f"README links to {target}, which is not there"


def test_exit_codes_in_the_readme_are_all_there_are() -> None:
    section = README.split("## How a command ends\n")[1].split("##")[0]
    assert re.findall(r"^\| (\d+) \|", section, re.M) == ["0", "1", "2", "3", "75", "130"]


def test_scripts_can_be_run(tracked: list[Path]) -> None:
    scripts = [p for p in tracked if p.suffix in (".sh", ".sbatch") or p == Path(".ci/run")]
    assert len(scripts) >= 8
    for script in scripts:
        assert os.access(ROOT / script, os.X_OK), f"{script} is not executable"
        first = (ROOT / script).read_text().splitlines()[0]
        assert first == "#!/usr/bin/env bash", f"{script} begins with {first}"
        assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0


def test_licence_and_notice() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert "Horovod" in (ROOT / "NOTICE").read_text()


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.toml")), ids=lambda p: p.stem)
def test_config_is_valid(path: Path) -> None:
    assert load_config(path).name == path.stem


def test_every_requirement_has_an_exact_version() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if re.fullmatch(r"[\w.-]+==[\w.]+", line)
    }
    wanted = {Requirement(text) for text in metadata.requires("horovod-lm") or []}
    here = {"sys_platform": "linux", "platform_machine": "x86_64"}
    names = {
        requirement.name.lower()
        for requirement in wanted
        for extra in ("torch", "tensorflow", "mpi", "test")
        if requirement.marker is None or requirement.marker.evaluate({**here, "extra": extra})
    }
    assert {"click", "numpy", "torch", "tensorflow-cpu", "pytest"} <= names
    assert not names - pinned


def test_no_place_of_one_machine_in_a_tracked_file(tracked: list[Path]) -> None:
    found = []
    for path in tracked:
        if path == Path(__file__).relative_to(ROOT) or path.suffix == ".png":
            continue
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
            if PRIVATE.search(line):
                found.append(f"{path}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
