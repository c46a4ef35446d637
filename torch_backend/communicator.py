"""Horovod as the neutral code sees it."""

from __future__ import annotations

from contextlib import contextmanager

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError

from horovod_lm.errors import CollectiveFailed
from horovod_lm.installed import require_horovod
from torch_backend.profiler import scope


@contextmanager
def _collective():
    try:
        yield
    except (HorovodInternalError, ValueError, RuntimeError) as error:
        raise CollectiveFailed(
            f"a collective failed, since another rank has ended or stalled: {error}"
        ) from error


class Communicator:
    """The ranks of this job; see `horovod_lm.backend.Communicator`."""

    def __init__(self) -> None:
        require_horovod("torch")
        hvd.init()
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()

    def broadcast(self, data: bytes, root: int = 0) -> bytes:
        """`data` of rank `root`, on every rank."""
        with _collective():
            length = torch.tensor([len(data)], dtype=torch.int64)
            length = int(hvd.broadcast(length, root, name="broadcast.length")[0])
            content = np.zeros(length, dtype=np.uint8)
            if self.rank == root:
                content[:] = np.frombuffer(data, dtype=np.uint8)
            if not length:
                return b""
            tensor = torch.from_numpy(content)
            return hvd.broadcast(tensor, root, name="broadcast.bytes").numpy().tobytes()

    def allgather(self, data: bytes) -> list[bytes]:
        """The `data` of every rank, in the order of ranks."""
        with _collective():
            length = torch.tensor([len(data)], dtype=torch.int64)
            lengths = hvd.allgather(length, name="allgather.lengths").tolist()
            # A rank may have nothing to say, and an empty tensor can't be gathered everywhere.
            padded = np.zeros(max(1, max(lengths)), dtype=np.uint8)
            padded[: len(data)] = np.frombuffer(data, dtype=np.uint8)
            rows = hvd.allgather(torch.from_numpy(padded)[None], name="allgather.bytes").numpy()
            return [rows[i, :n].tobytes() for i, n in enumerate(lengths)]

    def allreduce(self, array: np.ndarray) -> np.ndarray:
        """The sum over ranks."""
        with _collective():
            tensor = torch.from_numpy(np.atleast_1d(np.ascontiguousarray(array)))
            total = hvd.allreduce(tensor, op=hvd.Sum, name=f"allreduce.{array.dtype}")
            return total.numpy().reshape(array.shape)

    @scope("communication")
    def reduce_in_place(self, buffer: torch.Tensor) -> None:
        """Sum a gradient buffer over the ranks by ring-allreduce."""
        with _collective():
            hvd.allreduce_(buffer, op=hvd.Sum, name="gradients")

    def barrier(self) -> None:
        """Return when every rank has come here."""
        with _collective():
            hvd.barrier()

    def start_timeline(self, path: str) -> None:
        """Have rank 0 write Horovod's timeline to `path` from now on."""
        hvd.start_timeline(path)

    def stop_timeline(self) -> None:
        """End the timeline; its file is whole a moment later."""
        hvd.stop_timeline()

    def shutdown(self) -> None:
        """Leave the job in good order."""
        hvd.shutdown()
