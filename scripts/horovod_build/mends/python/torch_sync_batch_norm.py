"""Let `hvd.SyncBatchNorm` run on CPUs, and outside training on one rank alone.

"SyncBatchNorm expected input tensor to be on GPU": torch's kernels for it are. On other devices a
function of ours takes their place, exact for batches of other sizes, also for an empty one. A layer
without running statistics waited for all ranks in evaluation too, and hung where one rank evaluates
(torch's own takes that rank's batch); `momentum=None` failed. See
https://github.com/horovod/horovod/pull/1923.
"""

from horovod_build.mending import ADDED

FILE = "horovod/torch/sync_batch_norm.py"
MOMENTUM = '''    def _momentum(self) -> float:
        """This batch's share in the running statistics."""
        if self.momentum is not None:
            return self.momentum
        if self.training and self.track_running_stats:
            if self.num_batches_tracked is not None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0

    @torch.jit.unused
    def _maybe_run_sync_bn(self, input):
'''


def mend(source):
    source.edit(
        FILE,
        "        # currently only GPU input is supported by underlying kernel from PyTorch\n"
        "        if not input.is_cuda:\n"
        "            raise ValueError('SyncBatchNorm expected input tensor to be on GPU')\n\n",
        "",
    )
    source.edit(
        FILE, "    .. note:: Only GPU input tensors are supported in the training mode.\n", ""
    )
    source.edit(
        FILE,
        "        if not self.training and self.track_running_stats:\n",
        "        if not self.training:\n",
    )
    source.edit(FILE, "    @torch.jit.unused\n    def _maybe_run_sync_bn(self, input):\n", MOMENTUM)
    source.edit(
        FILE,
        "self.track_running_stats, self.momentum, self.eps)",
        "self.track_running_stats, self._momentum(), self.eps)",
    )
    source.edit(
        FILE,
        "        return _SyncBatchNorm.apply(\n",
        "        if not input.is_cuda:\n"
        "            from horovod.torch._sync_batch_norm import SyncBatchNormFunction\n"
        "            return SyncBatchNormFunction.apply(\n"
        "                input, self.weight, self.bias, self.running_mean, self.running_var,\n"
        "                self.eps, self._momentum())\n"
        "        return _SyncBatchNorm.apply(\n",
    )
    source.edit(
        FILE, "            self.eps, self.momentum)\n", "            self.eps, self._momentum())\n"
    )
    source.add(
        "horovod/torch/_sync_batch_norm.py",
        (ADDED / "_torch_sync_batch_norm.py").read_text(encoding="utf-8"),
    )
