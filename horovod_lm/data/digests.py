"""Whether files are what their digests say. Reading them takes time, so that those which were right
are known again by their stamps: size, times of the last changes, and place on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from horovod_lm.data.cache import replace

_SAID = 10**9  # bytes from which on it takes long enough to be said


def are_right(
    folder: Path,
    files: Sequence[Mapping[str, Any]],
    record: Path,
    log: Callable[[str], None],
) -> bool:
    """Whether each of `files`, mappings with "file" and "sha256", is in `folder` as it should be.

    That they are is put on `record`; files whose stamps stand there are not read. A record that
    can't be written costs the reading only.
    """
    try:
        stamps = [_stamp(folder / file["file"]) for file in files]
        with suppress(OSError, ValueError):
            if json.loads(record.read_text()) == stamps:
                return True
        size = sum(stamp[1] for stamp in stamps)
        if size >= _SAID:
            log(f"comparing {size / 1e6:,.0f} MB of prepared data with their digests")
        for file in files:
            with (folder / file["file"]).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != file["sha256"]:
                    return False
    except OSError:
        return False
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        replace(record, json.dumps(stamps))
    return True


def _stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
