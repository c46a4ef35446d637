"""Horovod as the neutral code sees it."""

from __future__ import annotations

from contextlib import contextmanager

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

from horovod_lm.errors import CollectiveFailed
from horovod_lm.installed import require_horovod
from tf_backend.profiler import scope


@contextmanager
def _collective():
    try:
        yield
    except (HorovodInternalError, tf.errors.OpError, ValueError) as error:
        raise CollectiveFailed(
            f"a collective failed, since another rank has ended or stalled: {error}"
        ) from error


class Communicator:
    """The ranks of this job; see `horovod_lm.backend.Communicator`."""

    def __init__(self) -> None:
        require_horovod("tensorflow")
        hvd.init()
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()

    def broadcast(self, data: bytes, root: int = 0) -> bytes:
        """`data` of rank `root`, on every rank."""
        with _collective():
            length = tf.constant([len(data)], dtype=tf.int64)
            length = int(hvd.broadcast(length, root, name="broadcast.length")[0])
            content = np.zeros(length, dtype=np.uint8)
            if self.rank == root:
                content[:] = np.frombuffer(data, dtype=np.uint8)
            if not length:
                return b""
            tensor = tf.constant(content)
            return hvd.broadcast(tensor, root, name="broadcast.bytes").numpy().tobytes()

    def allgather(self, data: bytes) -> list[bytes]:
        """The `data` of every rank, in the order of ranks."""
        with _collective():
            length = tf.constant([len(data)], dtype=tf.int64)
            lengths = hvd.allgather(length, name="allgather.lengths").numpy().tolist()
            # A rank may have nothing to say, and an empty tensor can't be gathered everywhere.
            padded = np.zeros(max(1, max(lengths)), dtype=np.uint8)
            padded[: len(data)] = np.frombuffer(data, dtype=np.uint8)
            rows = hvd.allgather(tf.constant(padded[None]), name="allgather.bytes").numpy()
            return [rows[i, :n].tobytes() for i, n in enumerate(lengths)]

    def allreduce(self, array: np.ndarray) -> np.ndarray:
        """The sum over ranks."""
        with _collective():
            tensor = tf.constant(np.atleast_1d(np.ascontiguousarray(array)))
            total = hvd.allreduce(tensor, op=hvd.Sum, name=f"allreduce.{array.dtype}")
            return total.numpy().reshape(array.shape)

    @scope("communication")
    def reduce(self, buffer: tf.Tensor) -> tf.Tensor:
        """The sum of a gradient buffer over the ranks by ring-allreduce."""
        with _collective():
            return hvd.allreduce(buffer, op=hvd.Sum, name="gradients")

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.allreduce(np.zeros(1, dtype=np.int32))  # Horovod has no barrier for TensorFlow

    def start_timeline(self, path: str) -> None:
        """Have rank 0 write Horovod's timeline to `path` from now on."""
        hvd.start_timeline(path)

    def stop_timeline(self) -> None:
        """End the timeline; its file is whole a moment later."""
        hvd.stop_timeline()

    def shutdown(self) -> None:
        """Leave the job in good order."""
        hvd.shutdown()
