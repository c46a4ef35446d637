"""`bench allreduce`: Horovod's allreduce by size, against raw MPI and against a copy in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from horovod_lm.backend import load_backend
from horovod_lm.bench.display import Display
from horovod_lm.bench.processes import Stage
from horovod_lm.bench.result import BenchResult, Column, Ratio
from horovod_lm.bench.rounds import Rounds, interleave
from horovod_lm.config import Config, with_keys
from horovod_lm.errors import UserError

SIZES = (1_000, 16_000, 128_000, 1_000_000, 4_000_000, 20_000_000, 100_000_000)  # bytes
QUICK_SIZES = (1_000, 64_000)
AIMS = {20_000_000: 0.8, 100_000_000: 0.95}  # of raw MPI's rate, over MPI
TRANSPORTS = ("mpi", "gloo")
NAMES = {"mpi": "MPI", "gloo": "Gloo"}
# How a backend reduces gradients; another one's way is not known.
IN_PLACE = {"torch": True, "tensorflow": False}
_RAW = {"raw MPI in place": "in place", "raw MPI out of place": "out of place", "copy": "copy"}


class Horovod:
    """Allreduces by a backend, as its engine does them. A part is a number of bytes."""

    def __init__(self, backend: str, threads: int, sizes: Sequence[int]) -> None:
        self.parts = [str(size) for size in sizes]
        made = load_backend(backend, threads)
        self._tools, self._communicator = made.bench(), made.communicator()
        self._functions: dict[str, Callable[[], None]] = {}

    def step(self, part: str) -> float:
        """One allreduce; its bytes."""
        size = int(part)
        if part not in self._functions:
            self._functions[part] = self._tools.allreduce(self._communicator, size // 4)
        self._functions[part]()
        return float(size)

    def broadcast(self, data: bytes) -> bytes:
        """`data` of rank 0."""
        return self._communicator.broadcast(data)


class RawMPI:
    """`MPI_Allreduce` without Horovod, and copies of the same size on every rank at once. A part is
    a kind (`in place`, `out of place` or `copy`), a colon and a number of bytes."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.parts = [f"{kind}:{size}" for kind in _RAW.values() for size in sizes]
        try:
            self._mpi: Any = import_module("mpi4py.MPI")
        except ImportError as error:
            raise UserError(
                f"mpi4py can't be imported: {error}; pip install 'horovod_lm[bench]', which has "
                f"the raw MPI that Horovod is measured against"
            ) from error
        self._ranks = self._mpi.COMM_WORLD
        self._buffers: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def step(self, part: str) -> float:
        """One allreduce or copy; its bytes."""
        kind, _, count = part.partition(":")
        size = int(count)
        if size not in self._buffers:
            elements = size // 4
            # Written, both: pages of zeros that never were are one page, and stay in the cache.
            self._buffers[size] = np.ones(elements, np.float32), np.ones(elements, np.float32)
        first, second = self._buffers[size]
        if kind == "copy":
            np.copyto(second, first)
        else:
            self._ranks.Allreduce(self._mpi.IN_PLACE if kind == "in place" else first, second)
        return float(size)

    def broadcast(self, data: bytes) -> bytes:
        """`data` of rank 0."""
        return bytes(self._ranks.bcast(data))


def measure(
    config: Config,
    *,
    sizes: Sequence[int],
    backends: Sequence[str],
    transports: Sequence[str],
    rounds: int,
    seconds: float,
) -> BenchResult:
    """Measure on `launch.ranks` ranks. The rate of an allreduce is its bytes over its time; sizes
    and contestants are all interleaved."""
    ranks, threads = config.launch.ranks, config.launch.threads or 1
    reducers = [(backend, transport) for backend in backends for transport in transports]
    labels = [*_RAW, *(_name(*reducer) for reducer in reducers)]
    measured = _race(config, sizes, reducers, rounds, seconds)
    result = BenchResult(
        "allreduce",
        f"Allreduce of fp32 on {ranks} ranks, ms (in place, out of place: raw MPI)",
        [Column("size", "size"), *(Column(label, _RAW.get(label, label)) for label in labels)],
        {"ranks": ranks, "threads": threads, "rounds": rounds, "seconds": seconds},
    )
    for size in sizes:
        row: dict[str, Any] = {"size": size_text(size), "bytes": size}
        for label in labels:
            row[label] = 1e3 * size / measured.rate(f"{label}, {size_text(size)}")
        result.rows.append(row)
    for backend, transport in reducers:
        name = _name(backend, transport)
        other = "raw MPI in place" if IN_PLACE.get(backend, False) else "raw MPI out of place"
        for size in sizes:
            text = size_text(size)
            aim = AIMS.get(size) if transport == "mpi" and ranks > 1 else None
            value, interval = measured.ratio(f"{name}, {text}", f"{other}, {text}")
            result.ratios.append(
                Ratio(f"{name} / {other}", value, interval, aim, False, {"size": text})
            )
    result.notes = [
        "PyTorch's side reduces its gradients in place, TensorFlow's into a new tensor; each is "
        "compared with the raw MPI_Allreduce of its kind, started in the same environment.",
        "copy: NumPy's copy of as many bytes, on every rank at once.",
    ]
    return result


def _race(
    config: Config,
    sizes: Sequence[int],
    reducers: Sequence[tuple[str, str]],
    rounds: int,
    seconds: float,
) -> Rounds:
    """Start raw MPI and each backend over each transport, and let them take their turns."""
    ranks, threads = config.launch.ranks, config.launch.threads or 1
    turns = len(sizes) * (len(_RAW) + len(reducers)) * rounds
    with Stage() as stage, Display(turns, "B") as display:
        raw = stage.start(
            "raw MPI",
            f"{__name__}:RawMPI",
            {"sizes": sizes},
            config=_over(config, "mpi"),
            ranks=ranks,
        )
        # By label, the process and how its parts begin.
        lanes = {label: (raw, f"{kind}:") for label, kind in _RAW.items()}
        for backend, transport in reducers:
            name = _name(backend, transport)
            process = stage.start(
                name,
                f"{__name__}:Horovod",
                {"backend": backend, "threads": threads, "sizes": sizes},
                config=_over(config, transport),
                threads=threads,
                ranks=ranks,
            )
            lanes[name] = process, ""
        contestants = [
            process.contestant(f"{label}, {size_text(size)}", f"{begin}{size}")
            for size in sizes
            for label, (process, begin) in lanes.items()
        ]
        return interleave(contestants, rounds, seconds, display.turn)


def _name(backend: str, transport: str) -> str:
    return f"{backend} {NAMES[transport]}"


def _over(config: Config, transport: str) -> Config:
    """The config whose launcher makes Horovod reduce by this transport: Gloo needs horovodrun."""
    if transport == "mpi":
        return with_keys(config, launch={"launcher": "mpirun"})
    return with_keys(config, launch={"launcher": "horovodrun", "controller": "gloo"})


def size_text(size: int) -> str:
    """`20 MB`, of 20,000,000 bytes."""
    for unit, factor in (("MB", 1_000_000), ("KB", 1_000)):
        if size >= factor:
            return f"{size / factor:g} {unit}"
    return f"{size} B"
