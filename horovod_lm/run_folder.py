"""A run's folder: who may write into it, and `run.json`."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from horovod_lm.config import Config, to_toml
from horovod_lm.data.cache import replace
from horovod_lm.errors import RunFailed, UserError

STATE = "run.json"
IMPORTED = "imported"  # what an imported run keeps of its source
TOKENIZER = "tokenizer.json"
_KEPT = ("first_step_seconds", "loss", "validation_loss", "checkpoint")


def default_folder(config: Config) -> Path:
    """`runs/NAME-TIME` below the working directory."""
    return Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def claim(folder: Path, resume: bool) -> None:
    """Make the folder for a run. Raises `UserError` if there is a run in it and `resume` is not
    set, or an imported model, or if it can't be made or written."""
    if _reached(folder).get("imported") is not None:
        raise UserError(
            f"{folder} is an imported model, which stays as it is; train another run that starts "
            f"with it: --set train.start_from={folder.absolute()}, and another --output"
        )
    if os.path.exists(folder / STATE) and not resume:
        raise UserError(
            f"{folder} has a run in it; go on with it by --resume, or give another --output"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output.folder = {folder} can't be made: {(error.strerror or str(error)).lower()}"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"output.folder = {folder} is not writable; give another --output")


def _reached(folder: Path) -> dict[str, Any]:
    """What `run.json` says, nothing if there is none."""
    try:
        return dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # a new run, or one that was cut off while it began
        return {}


def keep_tokenizer(folder: Path, source: Path) -> None:
    """Keep a tokenizer.json in the run's folder: the text that it came from may go."""
    replace(folder / TOKENIZER, source.read_bytes().decode("utf-8"))  # its line ends as well


def tokenizer_file(folder: Path, config: Config) -> Path | None:
    """The tokenizer.json of the run in `folder`, whose config is `config`; None if only preparing
    its text would give it."""
    given = [] if config.data.is_trained else [Path(config.data.tokenizer)]
    if given:  # an imported model's, wherever that run has been moved to
        given.append(folder / IMPORTED / TOKENIZER)
    return next((path for path in (folder / TOKENIZER, *given) if os.path.isfile(path)), None)


def carry_over(source: Path, folder: Path) -> None:
    """Take along what the run in `source` keeps of a model that it was imported from, so that a run
    which starts with its weights can be exported as that model. It comes whole or not at all.
    Raises `RunFailed` where it can't be copied."""
    if not (source / IMPORTED).is_dir() or (folder / IMPORTED).exists():
        return
    partial = folder / f"{IMPORTED}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
        shutil.copytree(source / IMPORTED, partial)
        partial.rename(folder / IMPORTED)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        # Of a tree, the library gives a list with the cause for each file, as text.
        listed = isinstance(error, shutil.Error) and isinstance(error.args[0], list)
        cause = error.args[0][0][-1] if listed else error
        raise RunFailed(
            f"{source / IMPORTED} can't be copied to {folder}: {cause}; mend that, then start "
            "again with --resume"
        ) from error


def plain(value: Any) -> Any:
    """As JSON has it, without inf and nan: null."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunRecord:
    """`run.json`, written anew as a whole whenever something changes; rank 0 alone has one. A run
    that is resumed keeps what it had reached."""

    def __init__(self, folder: Path, config: Config, **values: Any) -> None:
        self._path = folder / STATE
        self.values: dict[str, Any] = {
            "schema": 1,
            "name": config.name,
            "state": "running",
            "message": None,
            "started": time.time(),
            "ended": None,
            "digest": config.digest,
            "steps": 0,
            "updates": 0,
            "first_step_seconds": None,
            "loss": None,
            "validation_loss": None,
            "memory_mib": None,
            "sample": None,
            "checkpoint": None,
            "machine": machine(),
            **{key: value for key, value in _reached(folder).items() if key in _KEPT},
            **values,
        }
        replace(folder / "config.toml", to_toml(config))  # without it the run can't be used
        self.update()

    def update(self, **values: Any) -> None:
        """Change `values` and write the file, atomically."""
        self.values |= values
        text = json.dumps(plain(self.values), indent=1, allow_nan=False) + "\n"
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self._path)
        except OSError:
            temporary.unlink(missing_ok=True)
            # On a full disk there is room only where the old one stands.
            with self._path.open("r+", encoding="utf-8") as file:
                file.write(text)
                file.truncate()

    def end(self, state: str, message: str | None = None) -> None:
        """The run has ended as `state`: finished, failed or stopped."""
        self.update(state=state, message=message, ended=time.time())


def machine() -> dict[str, Any]:
    """What the run is on: processor, cores, memory, host, system."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "host": platform.node(),
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
