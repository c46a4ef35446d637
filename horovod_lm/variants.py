"""What a comparison compares: values of keys, their grid, and what its cells are called."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from horovod_lm.config import Config, flatten, known_keys, read_value, unknown_key
from horovod_lm.errors import UserError

DEFAULT = "launch.backend=torch,tensorflow"
MOST_VARIANTS = 16
_BACKENDS = {"torch": "PyTorch", "tensorflow": "TensorFlow"}
_CONTROLLERS = {"mpi": "MPI", "gloo": "Gloo"}
# Keys whose values say by themselves what they are values of.
_PLAIN = ("launch.backend", "launch.launcher", "launch.controller", "train.precision")
_FOLLOWS = "model.vocabulary"  # data.vocabulary, and is never set
_SEPARATE = ("name", "output")  # what two runs may differ in without being compared for it


@dataclass(frozen=True)
class Variant:
    """One cell of the grid: `label` names its folder and its figures in JSON, `overrides` are its
    values by key, `config` is the whole run."""

    label: str
    overrides: dict[str, Any]
    config: Config


def make_variants(
    vary: Sequence[str], load: Callable[[Sequence[str]], Config], several_seeds: bool = False
) -> list[Variant]:
    """The grid of every `KEY=A,B` in `vary` (none: both backends), the last key varying fastest.

    `load` makes a config of further `key=value` overrides. Raises `UserError` for a key that
    there is not or that says nothing, fewer than two values, or a cell that is no valid config.
    """
    axes = [parse_vary(text) for text in vary or (DEFAULT,)]
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--vary {key} is given twice; list all its values in one")
    if several_seeds and "train.seed" in keys:
        raise UserError("--vary train.seed and --seeds both change the seed; give one of them")
    cells = list(itertools.product(*(values for _, values in axes)))
    if len(cells) > MOST_VARIANTS:
        raise UserError(
            f"--vary makes {len(cells)} variants, which all run at the same time; give at most "
            f"{MOST_VARIANTS}"
        )
    labels: list[str] = []
    variants = []
    for cell in cells:
        overrides = dict(zip(keys, cell, strict=True))
        label = _label(overrides, labels)
        labels.append(label)
        variants.append(Variant(label, overrides, load([*map(_assignment, keys, cell)])))
    return variants


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """Key and values of `KEY=A,B`. A value is read as TOML, or taken as a string if it is none;
    of a key, the part behind the last dot will do where it belongs to one key alone."""
    short, equals, raw = (part.strip() for part in text.partition("="))
    if not equals or not short or not raw:
        raise UserError(f'--vary "{text}" is not of the form KEY=A,B')
    key = full_key(short)
    values = _values(raw)
    if key == "name" or key.startswith("output."):
        raise UserError(f"--vary {key}: it changes nothing that could be compared")
    if len(values) < 2:
        raise UserError(f"--vary {key} = {raw} is one value; give at least two, as in {short}=A,B")
    if len({json.dumps(value) for value in values}) < len(values):
        raise UserError(f"--vary {key} = {raw} has the same value twice")
    return key, values


def full_key(short: str) -> str:
    """The key that `short` means. Raises `UserError` if there is none, or more than one."""
    known = known_keys()
    if short in known:
        return short
    found = [key for key in known if key.rpartition(".")[2] == short and key != _FOLLOWS]
    if len(found) > 1:
        raise UserError(f"--vary {short} could be {' or '.join(found)}; say which")
    if not found:
        raise UserError(f"--vary {short}: {unknown_key(short)}")
    return found[0]


def _values(raw: str) -> list[Any]:
    try:
        return list(tomllib.loads(f"values = [{raw}]")["values"])
    except tomllib.TOMLDecodeError:
        return [read_value(part.strip()) for part in raw.split(",")]


def _assignment(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"  # JSON writes values as TOML reads them


def _label(overrides: dict[str, Any], taken: Sequence[str]) -> str:
    """A name for a folder: letters, digits, dots and hyphens, unlike those in `taken`."""
    parts = [
        str(value) if key in _PLAIN else f"{_short(key)}-{_text(value)}"
        for key, value in overrides.items()
    ]
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts)).strip("-.")[:60] or "variant"
    label = plain
    for number in itertools.count(2):
        if label not in taken:
            return label
        label = f"{plain}-{number}"
    raise AssertionError


def display_name(backend: str) -> str:
    """How a backend is called in front of people."""
    return _BACKENDS.get(backend, backend)


def display_names(configs: Sequence[Config]) -> list[str]:
    """How runs of these configs are called in front of people: by what they differ in, by their
    backend if by nothing."""
    keys = differing_keys(configs) or ["launch.backend"]
    keys.sort(key=lambda key: key != "launch.backend")  # it is read first
    flat = [flat_values(config) for config in configs]
    return [" ".join(_word(key, values[key]) for key in keys) for values in flat]


def differing_keys(configs: Sequence[Config]) -> list[str]:
    """The keys whose values are not the same in all configs; without `name` and `output`."""
    flat = [flat_values(config) for config in configs]
    return [
        key
        for key in flat[0]
        if any(values[key] != flat[0][key] for values in flat)
        and key.partition(".")[0] not in _SEPARATE
        and key != _FOLLOWS
    ]


def flat_values(config: Config) -> dict[str, Any]:
    """Every value of a config by its key."""
    return flatten(config.model_dump(mode="json"))


def _word(key: str, value: Any) -> str:
    if key == "launch.backend":
        return display_name(value)
    if key == "launch.ranks":
        return f"{value} rank" + ("" if value == 1 else "s")
    if key == "launch.controller":
        return _CONTROLLERS[value]
    text = _text(value)
    text = text if len(text) <= 24 else f"{text[:23]}…"
    return text if key in _PLAIN else f"{_short(key)}={text}"


def _short(key: str) -> str:
    section, _, last = key.rpartition(".")
    return section if last == "name" else last


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
