#!/usr/bin/env python3
"""Builds one Horovod wheel for the PyTorch and TensorFlow of the running interpreter, and prints
its path.

  python scripts/build_horovod.py             build it, or take it from the cache
  python scripts/build_horovod.py --install   and install it for this interpreter

The wheel is kept in a per-user cache under a key of everything that went into it. Horovod's own
switches (HOROVOD_GPU_OPERATIONS=NCCL, HOROVOD_WITHOUT_MPI=1, …), MPI_HOME, CXX and MAKEFLAGS are
honoured. See docs/horovod.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from horovod_build import facts, wheel
from horovod_build.cache import WheelCache, cache_root
from horovod_build.mending import MendError
from horovod_build.progress import Progress


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--install", action="store_true", help="install the wheel for this interpreter"
    )
    parser.add_argument(
        "--key",
        action="store_true",
        help="print the wheel's key and path in the cache, build nothing",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        env = facts.build_environment(os.environ)
        found = facts.gather(env)
        cache = WheelCache(cache_root())
        if options.key:
            print(found.key(), cache.find(found.key()) or "not built")
            return 0
        built = get_wheel(found, env, cache)
        if options.install:
            wheel.install(built)
    except (facts.BuildError, MendError) as error:
        print(f"Horovod can't be built. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; nothing is left of this build.", file=sys.stderr)
        return 130
    print(built)
    return 0


def get_wheel(found: facts.Facts, env: dict[str, str], cache: WheelCache) -> Path:
    """The tried wheel of these facts, from the cache or built now."""
    key = found.key()
    progress = Progress()

    def build(folder: Path) -> Path:
        with cache.log(key).open("w") as log:
            return wheel.Builder(found, env, folder, log, progress).build()

    return cache.get_or_build(
        key, build, lambda: progress.stage("another process is building this wheel; waiting for it")
    )


if __name__ == "__main__":
    sys.exit(main())
