"""JSON Lines: an object on each line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from horovod_lm.data.readers import Faults, Record, pick, whole_lines


def read(path: Path, fields: tuple[str, ...], faults: Faults) -> Iterator[Record]:
    """A record for each line that isn't blank; a field is "name", or "outer.inner" of nested
    objects."""
    fields = fields or ("text",)
    for number, line in whole_lines(path, faults):
        if line is None or not line.strip():
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError("it is JSON, but no object")
            record = {name: pick(values, name) for name in fields}
        except json.JSONDecodeError as error:
            reason = f"it is not JSON (column {error.colno}: {error.msg})"
            faults.broken(path, f"line {number}", reason)
        except (ValueError, RecursionError) as error:
            faults.broken(path, f"line {number}", _reason(error))
        else:
            yield Record(f"line {number}", record)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    # Python's own words, which speak of Python.
    return "it has a number with too many digits" if "set_int_max" in str(error) else str(error)
