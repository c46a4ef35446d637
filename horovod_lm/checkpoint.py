"""Checkpoints: canonical names in safetensors, beside a JSON manifest with digests.

Tensors are fp32, and fp64 in a run of that precision, which would not go on as it was otherwise.

A checkpoint is a folder `step-00000200` with `weights.safetensors`, `moments.safetensors` and
`manifest.json`. It belongs to the run, not to a framework or a number of ranks. It appears by one
rename, whole, so a kill at any moment leaves the one before it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from horovod_lm.backend import EngineState
from horovod_lm.config import Config, load_config
from horovod_lm.errors import RunFailed, UserError
from horovod_lm.optimizers import KEYS, moment_shapes
from horovod_lm.spec import ModelSpec

MANIFEST, WEIGHTS, MOMENTS = "manifest.json", "weights.safetensors", "moments.safetensors"
_NAME = re.compile(r"step-\d{8,}")
_TEMPORARY = ".tmp-"
_BLOCK = 1 << 20  # bytes hashed at a time


@dataclass
class RunState:
    """Where a run stands: attempted `steps`, applied `updates`, the loss scaler's and the engine's
    state. The position in the data is `step`. `extra` is JSON of the caller's; its `data_digest`
    (of the prepared data) lets `check_same_run` accept the same text in another place."""

    step: int
    updates: int
    scaler: dict[str, float]
    engine: EngineState
    extra: dict[str, Any] = field(default_factory=dict)


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class _Manifest(BaseModel):
    """What `manifest.json` may hold. File names are two fixed ones, so they cannot lead out of the
    folder; `tensors` are the shapes of the weights, from which with the optimizer's name in `run`
    those of the moments follow."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = Field(1, alias="schema")
    step: int = Field(ge=0)
    updates: int = Field(ge=0)
    scaler: dict[str, float]
    extra: dict[str, Any]
    run: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    files: dict[Literal["weights.safetensors", "moments.safetensors"], _File]


def save(folder: Path, state: RunState, config: Config, keep: int) -> Path:
    """Write `folder/step-NNNNNNNN` and then remove all but the newest `keep`; returns its path.

    Only one rank may do so. A valid checkpoint of this step that is there already stays as it is.
    Raises `RunFailed` if it cannot be written, a full disk above all; the last one is then kept.
    """
    target = folder / f"step-{state.step:08d}"
    work = folder / f"{_TEMPORARY}{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        if target.exists():
            if _is_valid(target):
                return target
            _remove(target)
        work.mkdir()
        _write(work, state, config)
        os.rename(work, target)
        _sync(folder)
        _prune(folder, state.step, keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise RunFailed(_cannot_write(folder, state.step, error)) from error
    return target


def reason(error: BaseException) -> str:
    """Why something could not be written, in the system's words."""
    said = error.strerror if isinstance(error, OSError) else None
    number = re.search(r"os error (\d+)", str(error))
    if number:  # safetensors gives the system's error as text alone
        said = os.strerror(int(number[1]))
    return (said or str(error)).lower()


def _cannot_write(folder: Path, step: int, error: Exception) -> str:
    kept = _steps(folder) if folder.is_dir() else []
    last = f"the last checkpoint, {kept[-1]}, is kept" if kept else "there is no earlier one"
    return (
        f"the checkpoint of step {step} can't be written to {folder}: {reason(error)}; {last}. "
        "Make room or mend the folder, then start again with --resume"
    )


def _write(work: Path, state: RunState, config: Config) -> None:
    """Write the files of a checkpoint into `work` and bring them to the disk."""
    engine = state.engine
    moments = {f"{m}.{n}": a for m, table in engine.moments.items() for n, a in table.items()}
    files = {}
    kind = _kind(config.trajectory)
    for name, tensors in ((WEIGHTS, engine.weights), (MOMENTS, moments)):
        arrays = {n: np.ascontiguousarray(a, dtype=kind) for n, a in tensors.items()}
        save_file(arrays, work / name)
        _sync(work / name)
        files[name] = _File(sha256=_sha256(work / name), size=(work / name).stat().st_size)
    manifest = _Manifest.model_validate(
        {
            "schema": 1,
            "step": state.step,
            "updates": state.updates,
            "scaler": state.scaler,
            "extra": state.extra,
            "run": config.trajectory,
            "tensors": {n: a.shape for n, a in engine.weights.items()},
            "files": files,
        }
    )
    text = manifest.model_dump_json(indent=1, by_alias=True)
    (work / MANIFEST).write_text(text + "\n", encoding="utf-8")
    _sync(work / MANIFEST)
    _sync(work)


def _kind(run: Mapping[str, Any]) -> np.dtype[Any]:
    """The type of the tensors of a run, given its trajectory."""
    return np.dtype("<f8" if run.get("train.precision") == "fp64" else "<f4")


def _sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first; none is opened."""
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and not p.is_symlink()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _prune(folder: Path, step: int, keep: int) -> None:
    # Checkpoints of later steps can only be ones that could not be loaded: they must not push out
    # good ones.
    for old in [p for p in _steps(folder) if _step_of(p) <= step][:-keep]:
        _remove(old)


def _remove(path: Path) -> None:
    """Remove a checkpoint; renamed first, so that a kill leaves no half of it under its name."""
    doomed = path.with_name(f"{_TEMPORARY}old-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Turn whatever can go wrong in reading a checkpoint into one `UserError`."""
    try:
        yield
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        reason = f"{MANIFEST}: {key}: {fault['msg']}" if key else f"{MANIFEST}: {fault['msg']}"
    except (OSError, SafetensorError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.filename:
            reason = f"{Path(error.filename).name}: {reason}"
    else:
        return
    raise UserError(f"{path} is not a valid checkpoint: {reason}")


def _regular(path: Path) -> Path:
    """`path` itself, if it is a plain file."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"{path.name} is not a plain file (links are refused)")
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> _Manifest:
    if path.is_symlink():
        raise ValueError("it is a link; give the folder itself")
    return _Manifest.model_validate_json(_regular(path / MANIFEST).read_bytes())


def _checked_manifest(path: Path) -> _Manifest:
    """The manifest, after its files were compared with its digests."""
    manifest = _read_manifest(path)
    for name in (WEIGHTS, MOMENTS):
        if name not in manifest.files:
            raise ValueError(f"{MANIFEST} does not list {name}")
        size, expected = _regular(path / name).lstat().st_size, manifest.files[name]
        if size != expected.size:
            raise ValueError(f"{name} has {size} bytes instead of {expected.size}")
        if _sha256(path / name) != expected.sha256:
            raise ValueError(f"{name} is damaged: its SHA-256 is not the one in {MANIFEST}")
    return manifest


def verify(path: Path) -> None:
    """Compare the files of a checkpoint with its manifest. Raises `UserError` naming what is
    wrong."""
    with _faults(path):
        _checked_manifest(path)


def _is_valid(path: Path) -> bool:
    try:
        verify(path)
    except UserError:
        return False
    return True


def newest(folder: Path, log: Callable[[str], None] = print) -> Path | None:
    """The newest valid checkpoint in `folder`, digests compared; None if there is none. `log` is
    told which newer ones are passed over, and why. Raises `UserError` for a folder that can't be
    read: to say that there is none would start a run anew."""
    try:
        steps = _steps(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"{folder} can't be read: {error.strerror}; make it readable, or give another folder"
        ) from None
    for path in reversed(steps):
        try:
            verify(path)
        except UserError as error:
            log(f"passed over: {error}")
        else:
            return path
    return None


def config_of_run(run: Path, overrides: Iterable[str] = ()) -> Config:
    """The config in the folder of a run, with `overrides`. Raises `UserError` if there is none."""
    with suppress(PermissionError):  # of a folder above it: loading says so
        if not (run / "config.toml").exists():
            raise UserError(f"{run} is not the folder of a run: it has no config.toml")
    return load_config(run / "config.toml", overrides)


def newest_of_run(run: Path, config: Config) -> Path:
    """The newest valid checkpoint in the folder of a run. Raises `UserError` if there is none, or
    if it is not of the model of `config`."""
    path = newest(run / "checkpoints")
    if path is None:
        raise UserError(f"{run} has no checkpoint yet; let it train to its first one")
    check_model(path, config.model)
    return path


def load(path: Path) -> RunState:
    """Read a checkpoint, digests first, with one copy of its tensors in memory. Raises `UserError`
    naming what is wrong."""
    with _faults(path):
        manifest = _checked_manifest(path)
        kind = _kind(manifest.run)
        weights = _read_tensors(path / WEIGHTS, kind)
        moments: dict[str, dict[str, np.ndarray]] = {}
        for key, array in _read_tensors(path / MOMENTS, kind).items():
            moment, _, name = key.partition(".")
            moments.setdefault(moment, {})[name] = array
        if _shapes(weights) != manifest.tensors:
            raise ValueError(f"{WEIGHTS} does not hold the tensors that {MANIFEST} lists")
        optimizer = manifest.run.get("optimizer.name")
        if not isinstance(optimizer, str) or optimizer not in KEYS:
            raise ValueError(f"{MANIFEST}: run: optimizer.name is {_shown(optimizer)}")
        expected = moment_shapes(optimizer, manifest.tensors)
        if moments and {m: _shapes(table) for m, table in moments.items()} != expected:
            raise ValueError(
                f"{MOMENTS} does not hold the moments of {optimizer} for the tensors that "
                f"{MANIFEST} lists"
            )
        engine = EngineState(weights, moments, manifest.updates)
        return RunState(manifest.step, manifest.updates, manifest.scaler, engine, manifest.extra)


def _shapes(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tensors.items()}


def _read_tensors(path: Path, kind: np.dtype[Any]) -> dict[str, np.ndarray]:
    # pread: with mmap the file's pages would stand in memory beside the arrays.
    tensors = load_file(path, backend="pread")
    for name, array in tensors.items():
        if array.dtype != kind:
            raise ValueError(f"{path.name}: {name} is {array.dtype}, not {kind}")
    return tensors


def check_model(path: Path, spec: ModelSpec) -> None:
    """Raise `UserError`, naming the first parameter that differs, unless the checkpoint's weights
    are those of `spec`."""
    with _faults(path):
        found = dict(_read_manifest(path).tensors)
    for parameter in spec.parameters:
        shape = found.pop(parameter.name, None)
        if shape != parameter.shape:
            has = f"has shape {shape}" if shape else "is missing"
            raise UserError(
                f"{path} is a checkpoint of another model: {parameter.name} {has} in it, and "
                f"shape {parameter.shape} in [model]"
            )
    if found:
        raise UserError(
            f"{path} is a checkpoint of another model: it has {next(iter(found))}, which [model] "
            f"does not have"
        )


_HEADS = ("heads.", "pooler.")


def check_start(run: Path, spec: ModelSpec) -> Path:
    """The newest valid checkpoint in the folder of `run`, whose weights a model of `spec` can start
    with: all but heads and pooler must be the same. Raises `UserError` if there is none."""
    path = newest(run / "checkpoints")
    if path is None:
        raise UserError(
            f"train.start_from = {run} has no valid checkpoint; give the folder of a run that has "
            "one (a relative path begins in the folder of the config file)"
        )
    with _faults(path):
        found = dict(_read_manifest(path).tensors)
    for parameter in spec.parameters:
        shape = found.pop(parameter.name, None)
        if shape == parameter.shape or (shape is None and parameter.name.startswith(_HEADS)):
            continue
        has = f"has shape {shape}" if shape else "is missing"
        raise UserError(
            f"train.start_from: {parameter.name} {has} in {path}, and has shape {parameter.shape} "
            "in [model]; take [model] over from the config.toml of that run"
        )
    left = [name for name in found if not name.startswith(_HEADS)]
    if left:
        raise UserError(
            f"train.start_from: {path} has {left[0]}, which [model] does not have; take [model] "
            "over from the config.toml of that run"
        )
    return path


def start_weights(run: Path, spec: ModelSpec, new: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The `new` weights of `spec`, with those of the newest checkpoint of `run` in their places."""
    weights = load(check_start(run, spec)).engine.weights
    return {name: weights.get(name, array) for name, array in new.items()}


def check_same_run(path: Path, config: Config, data_digest: str | None = None) -> None:
    """Raise `UserError`, naming each changed key with its old and new value, if `config` would
    make the checkpoint's run another one (see `Config.trajectory`).

    Files may have moved. With `data_digest`, of the prepared data, the checkpoint's own
    `extra["data_digest"]` must be equal in place of the paths in [data]. The run that it started
    from is not read again, so of train.start_from the folder's own name counts: another one is
    most likely meant to be started from, which would not happen.
    """
    with _faults(path):
        manifest = _read_manifest(path)
    old, new = dict(manifest.run), dict(config.trajectory)
    for values in (old, new):
        if isinstance(start := values.get("train.start_from"), str):
            values["train.start_from"] = Path(start).name
    if data_digest and "data_digest" in manifest.extra:
        for values, digest in ((old, manifest.extra["data_digest"]), (new, data_digest)):
            _drop_paths(values)
            values["digest of the prepared data"] = digest
    changes = [
        f"{key}: {_shown(old.get(key))} → {_shown(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if old.get("schedule.updates") != new.get("schedule.updates") and not config.schedule.updates:
        changes.append("(schedule.updates follows train.steps; to train longer, set it as it was)")
    if changes:
        raise UserError(
            f"{path} belongs to another run; changed since then:\n  "
            + "\n  ".join(changes)
            + "\nchange them back, or start a new run in another folder"
        )


def _drop_paths(values: dict[str, Any]) -> None:
    """Leave out of a trajectory where the data come from."""
    for key in ("data.text", "data.target", "data.tokenizer"):
        values.pop(key, None)
    sources = values.get("data.sources")
    if isinstance(sources, list):
        values["data.sources"] = [
            {key: value for key, value in source.items() if key not in ("text", "target")}
            for source in sources
            if isinstance(source, dict)
        ]


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
