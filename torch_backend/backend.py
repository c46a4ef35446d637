"""PyTorch as a backend of horovod_lm: the object behind the entry point `torch`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path

import torch

from horovod_lm.backend import EngineSettings
from horovod_lm.spec import ModelSpec
from torch_backend.bench import BenchTools
from torch_backend.communicator import Communicator
from torch_backend.convert import ConvertTools
from torch_backend.engine import Engine
from torch_backend.profiler import profile


class Backend:
    """See `horovod_lm.backend.Backend`."""

    name = "torch"

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def versions(self) -> dict[str, str]:
        """Names and versions of what it runs on."""
        return {"torch": torch.__version__, "horovod": version("horovod")}

    def communicator(self) -> Communicator:
        """Start Horovod."""
        return Communicator()

    def engine(
        self, spec: ModelSpec, settings: EngineSettings, communicator: Communicator
    ) -> Engine:
        """A model with zero weights."""
        # The one place that chooses a device.
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", communicator.local_rank)
        return Engine(spec, settings, communicator, device)

    def profile(self, path: Path) -> AbstractContextManager[None]:
        """Record what happens inside and write it to `path`."""
        return profile(path)

    def bench(self) -> BenchTools:
        """Peers, bare products and an allreduce, for `horovod-lm bench`."""
        return BenchTools()

    def convert(self) -> ConvertTools:
        """Its part in conversion, for `horovod-lm convert`."""
        return ConvertTools()
