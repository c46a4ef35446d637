"""Let `zero_grad` drop passes that are too few for a reduction.

With `backward_passes_per_step=2` and an epoch of three batches the last pass reduces nothing, so
nothing can race with `zero_grad`, which was refused all the same. A loop that then cleared the
gradients in another way began the next epoch in the middle of a count: an error some passes later
that said nothing of this, or, with groups, no message at all. `zero_grad` of the optimizer now
forgets such passes, and the message says what to do. See
https://github.com/horovod/horovod/issues/2466 and https://github.com/horovod/horovod/issues/2497.
"""

FILE = "horovod/torch/optimizer.py"
TOO_MANY = (
    '"accumulate gradients locally. At the end of an epoch that "\n'
    '                        "leaves passes over, call step(), which applies them, or "\n'
    '                        "zero_grad() of this optimizer, which drops them.")\n'
)
FORGET = '''def _reduction_has_begun(optimizer):
    """Whether gradients are being reduced. If not, the passes so far are forgotten."""
    if any(handle is not None for handle, _ in optimizer._handles.values()):
        return True
    optimizer._handles.clear()
    for p in optimizer._allreduce_delay:
        optimizer._allreduce_delay[p] = optimizer.backward_passes_per_step
    for group in getattr(optimizer, '_group_counts', ()):
        optimizer._group_counts[group] = 0
    return False


class _DistributedOptimizer(torch.optim.Optimizer):
'''


def mend(source):
    source.edit(FILE, "class _DistributedOptimizer(torch.optim.Optimizer):\n", FORGET)
    source.edit(
        FILE,
        '        if self._handles:\n            raise AssertionError("optimizer.zero_grad()',
        "        if _reduction_has_begun(self):\n"
        '            raise AssertionError("optimizer.zero_grad()',
        times=2,
    )
    source.edit(FILE, '"accumulate gradients locally.")\n', TOO_MANY, times=2)
    source.edit(
        FILE,
        "            assert self._allreduce_delay[p] > 0\n",
        "            if self._allreduce_delay[p] <= 0:\n"
        "                raise AssertionError(\n"
        '                        "Gradients were computed more than "\n'
        '                        "backward_passes_per_step times before call "\n'
        '                        "to step(). Increase backward_passes_per_step to "\n'
        f"                        {TOO_MANY}",
        times=2,
    )
