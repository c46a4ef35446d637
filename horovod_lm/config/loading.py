"""From TOML and `--set key=value` to a configuration, and back to TOML."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from horovod_lm.config.faults import explain, unknown_key
from horovod_lm.config.sections import Data
from horovod_lm.config.whole import Config, known_keys
from horovod_lm.errors import UserError


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file, apply `section.key=value` overrides, validate.

    Relative paths in `[data]` and `train.start_from` become absolute, from the config file's
    folder. Raises
    `UserError` with one message that names every fault.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a TOML config") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path} can't be read: {reason}") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    values.setdefault("name", re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:80])
    for override in overrides:
        _override(values, override)
    return make_config(values, str(path), base=path.resolve().parent)


def preset_config(name: str, overrides: Iterable[str] = ()) -> Config:
    """All defaults, but for the model of a preset, with overrides; see `load_config`."""
    values: dict[str, Any] = {"name": name, "model": {"preset": name}}
    for override in overrides:
        _override(values, override)
    return make_config(values, "--preset")


def make_config(values: Mapping[str, Any], where: str, base: Path | None = None) -> Config:
    """Validate a mapping of sections; see `load_config`."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, where))) from None
    if base is None:
        return config
    config = with_keys(config, data=_absolute(config.data, base))
    if config.train.start_from is None:
        return config
    return with_keys(config, train={"start_from": str(base / config.train.start_from)})


def _absolute(data: Data, base: Path) -> dict[str, Any]:
    """The paths of `data`, from the folder `base`."""

    def texts(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(t if t.startswith("corpus:") else str(base / t) for t in names)

    sources = tuple(
        source.model_copy(update={"text": texts(source.text), "target": texts(source.target)})
        for source in data.sources
    )
    return {
        "text": texts(data.text),
        "target": texts(data.target),
        "sources": sources,
        "tokenizer": data.tokenizer if data.is_trained else str(base / data.tokenizer),
    }


def with_keys(config: Config, **sections: Mapping[str, Any]) -> Config:
    """`config` with some keys of its sections changed, unchecked."""
    changed = {
        name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()
    }
    return config.model_copy(update=changed)


def _override(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value`."""
    key, equals, raw = (part.strip() for part in override.partition("="))
    if not equals or not key:
        raise UserError(f'--set "{override}" is not of the form section.key=value')
    if key not in known_keys():
        raise UserError(f"--set {key}: {unknown_key(key)}")
    section, _, name = key.rpartition(".")
    target = values
    if section:
        target = values.setdefault(section, {})
        if not isinstance(target, dict):
            raise UserError(f"{section} must be a section of keys, not {target!r}")
    target[name] = read_value(raw)


def read_value(raw: str) -> Any:
    """A value read as TOML, or taken as a string if it isn't any."""
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


def to_toml(config: Config) -> str:
    """The resolved config as TOML that `load_config` reads back to an equal one; None is left
    out."""
    values = config.model_dump(mode="json")
    lines = [f"name = {_toml_value(values.pop('name'))}"]
    for section, keys in _titled(values):
        lines += ["", section]
        for key, value in keys.items():
            if (section, key) == ("[train]", "max_norm") and value is None:
                value = 0
            if value is not None:
                lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _titled(values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The sections with their titles: one for each of a list of tables."""
    for section, keys in values.items():
        if isinstance(keys, Mapping):
            yield f"[{section}]", keys
        else:
            yield from ((f"[[{section}]]", table) for table in keys)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        keys = (f"{key} = {_toml_value(item)}" for key, item in value.items() if item is not None)
        return "{ " + ", ".join(keys) + " }"
    # JSON writes strings, numbers and booleans as TOML reads them, but for this one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
