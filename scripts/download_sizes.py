"""Adds up how much `pip install` will download: reads pip's `--report` on standard input.

Prints JSON: {"packages", "bytes" to download, "unknown": how many files gave no size, "largest":
[[name and version, bytes], ...], "pins": ["name==version", ...]}. A report has no sizes, so each
file is asked for its own by a HEAD request through pip's session: the user's proxy, certificate
and login apply. Files that already lie on this machine count nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any


@contextmanager
def pip_session() -> Iterator[Any]:
    """The HTTP session that `pip download` itself would use here; None if this pip hides it."""
    try:
        from pip._internal.commands import create_command  # no public way leads to pip's settings

        command = create_command("download")
        options, _ = command.parse_args([])
        with ExitStack() as stack:
            stack.enter_context(command.main_context())
            session = command.get_default_session(options)
            closing = stack.pop_all()
    except Exception:  # another pip than this was written for: sizes stay unknown
        yield None
        return
    with closing:
        yield session


def size(session: Any, url: str) -> int | None:
    """Bytes of the file at `url`; None where the server doesn't say."""
    if url.startswith("file:"):
        return 0
    if session is None:
        return None
    try:
        reply = session.head(url, allow_redirects=True, timeout=10)
        return int(reply.headers["Content-Length"]) if reply.ok else None
    except Exception:  # whatever it is, the download itself will say it better
        return None


def main() -> None:
    items = json.load(sys.stdin)["install"]
    # The project itself is a folder: nothing to download.
    items = [item for item in items if "dir_info" not in item["download_info"]]
    names = [f"{item['metadata']['name']}=={item['metadata']['version']}" for item in items]
    with pip_session() as session, ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(partial(size, session), (i["download_info"]["url"] for i in items)))
    known = sorted(((n, s) for n, s in zip(names, sizes, strict=True) if s), key=lambda p: -p[1])
    print(
        json.dumps(
            {
                "packages": len(items),
                "bytes": sum(bytes_ for _, bytes_ in known),
                "unknown": sizes.count(None),
                "largest": known[:3],
                "pins": names,
            }
        )
    )


if __name__ == "__main__":
    main()
