"""What is installed, told from package metadata: no framework is imported to find out."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from horovod_lm.errors import UserError

# A framework's distributions, and the tag that our builds of Horovod carry: 0.28.1+lm4.
DISTRIBUTIONS = {
    "torch": ("torch",),
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tensorflow-rocm"),
    "keras": ("keras",),
}
TAG = "lm"
BUILDER = Path(__file__).resolve().parent.parent / "scripts" / "build_horovod.py"


def version_of(package: str) -> str | None:
    """The installed version of a package with its local tag, or None."""
    for name in DISTRIBUTIONS.get(package, (package,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def find_program(name: str) -> str | None:
    """The path of a program, beside the running interpreter first, so that no venv has to be
    active; None if there is none."""
    beside = Path(sys.executable).parent / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def build_command() -> str:
    """How to get our Horovod here, as a line for a shell."""
    if BUILDER.is_file():
        return f"{sys.executable} {BUILDER} --install"
    return "python scripts/build_horovod.py --install, in a checkout of horovod_lm"


@dataclass(frozen=True)
class Horovod:
    """The Horovod that is installed: `version`, or None, and where its package lies."""

    version: str | None
    folder: Path | None = None

    @classmethod
    def find(cls) -> Horovod:
        """That of the running interpreter."""
        try:
            distribution = metadata.distribution("horovod")
        except metadata.PackageNotFoundError:
            return cls(None)
        return cls(distribution.version, Path(str(distribution.locate_file("horovod"))))

    @property
    def is_ours(self) -> bool:
        """Whether it carries our tag. The plain release reduces nothing under Keras 3, in
        silence."""
        return self.version is not None and self.version.partition("+")[2].startswith(TAG)

    @cached_property
    def record(self) -> dict[str, Any]:
        """What the wheel was built with; empty if it doesn't say."""
        if self.folder is None:
            return {}
        try:
            return dict(json.loads((self.folder / "_lm_build.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def fault(self, framework: str) -> str | None:
        """Why this Horovod can't serve `framework` as it is installed now, or None if it can."""
        if self.version is None:
            return "Horovod is not installed"
        if not self.is_ours:
            return (
                f"Horovod {self.version} is the plain release, which fails on today's frameworks "
                "or trains wrongly without a word"
            )
        built = self.record.get("frameworks")
        if built is None:
            return None
        now = version_of(framework)
        if framework not in DISTRIBUTIONS:
            return None
        if not built.get(framework):
            return f"Horovod {self.version} was built without {framework}"
        if now is not None and built[framework] != now:
            return (
                f"Horovod {self.version} was built for {framework} {built[framework]}, "
                f"but {framework} {now} is installed"
            )
        return None


def require_horovod(framework: str) -> None:
    """Raise `UserError` with the mend unless a Horovod that fits `framework` is installed. A
    framework that is missing itself is not Horovod's fault, and so no error here."""
    if version_of(framework) is None:
        return
    fault = Horovod.find().fault(framework)
    if fault is not None:
        raise UserError(f"{fault}; build the one that fits with: {build_command()}")
