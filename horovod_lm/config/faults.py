"""What is wrong with a configuration, in words: the key, what was given and what is allowed."""

from __future__ import annotations

import difflib
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from horovod_lm.config.whole import Config, known_keys


def unknown_key(key: str, sections: bool = False) -> str:
    """That there is no such key, and the nearest one that there is; `sections` are keys too."""
    known = known_keys() + (list(Config.model_fields) if sections else [])
    tail = key.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == tail][:1]  # in another section
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"there is no key {key}" + (f"; did you mean {near[0]}?" if near else "")


def explain(error: ValidationError, where: str) -> list[str]:
    """One plain line for each fault."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        given, context = fault["input"], fault.get("ctx", {})
        if fault["type"] == "extra_forbidden":
            text = unknown_key(key, sections=True)
        elif fault["type"] == "value_error":
            text = f"{key}: {context['error']}" if key else str(context["error"])
        elif fault["type"] == "missing":
            text = f"{key} is missing; it must be {_allowed(fault['loc'])[1]}"
        else:
            field, allowed = _allowed(fault["loc"])
            name = "it" if field == key else field
            text = f"{key} = {given!r} is not allowed; {name} must be {allowed}"
        lines.append(f"{where}: {text}")
    return lines


def _alternatives(kind: Any) -> str:
    return " or ".join(f'"{value}"' for value in get_args(kind))


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
_BOUNDS = {
    "ge": "at least",
    "gt": "above",
    "le": "at most",
    "lt": "below",
    "multiple_of": "a multiple of",
}


def _allowed(location: tuple[int | str, ...]) -> tuple[str, str]:
    """The key of the field at `location` and, in words, the values that it may have."""
    model: type[BaseModel] = Config
    path: list[str] = []
    for part in location:
        path.append(str(part))
        if isinstance(part, int):  # of a list of sections
            continue
        info = model.model_fields[part]
        kind: Any = info.annotation
        inner = get_args(kind)[0] if get_origin(kind) is tuple else kind
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    else:
        is_list = get_origin(kind) is tuple and not isinstance(location[-1], int)
        return ".".join(path), "a list of sections" if is_list else "a section of keys"
    if get_origin(kind) is Literal:
        return ".".join(path), _alternatives(kind)
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        if get_origin(inner) is Literal:
            return ".".join(path), f"a list of {_alternatives(inner)}"
        if inner is not str:
            return ".".join(path), info.description or "a list"
        some = "one or more " if any(getattr(r, "min_length", 0) for r in info.metadata) else ""
        return ".".join(path), f"a list of {some}strings"
    plain = next(k for k in (get_args(kind) or (kind,)) if k is not type(None))
    words = [_KINDS[plain]]
    for rule in info.metadata:
        words += [f"{w} {getattr(rule, b)}" for b, w in _BOUNDS.items() if hasattr(rule, b)]
    if plain is str and info.metadata:
        words.append(info.description or "")
    return ".".join(path), ", ".join(words)
