"""Reduce and broadcast tensors of any strides.

"Tensor is required to be contiguous" ended the first backward pass, or the first broadcast, of a
model in `channels_last`, and of every parameter that is a transposed one. Such a tensor is now
copied and copied back. See https://github.com/horovod/horovod/issues/3491 and
https://github.com/horovod/horovod/issues/3622.
"""

FILE = "horovod/torch/optimizer.py"


def mend(source):
    source.edit(
        FILE,
        "        tensor_compressed, ctx = self._compression.compress(tensor)\n",
        "        tensor_compressed, ctx = self._compression.compress(tensor.contiguous())\n",
    )
    source.edit(
        FILE,
        "gp.grad.set_(self._compression.decompress(output, gctx))",
        "_store(gp, self._compression.decompress(output, gctx))",
    )
    source.edit(
        FILE,
        "                    p.grad.set_(self._compression.decompress(output, ctx))\n",
        "                    _store(p, self._compression.decompress(output, ctx))\n",
    )
    source.edit(
        FILE,
        "def DistributedOptimizer(optimizer,",
        "def _store(p, gradient):\n"
        '    """Make `gradient` the gradient of `p`, with strides as before."""\n'
        "    if p.grad.is_contiguous():\n"
        "        p.grad.set_(gradient)\n"
        "    else:\n"
        "        p.grad.copy_(gradient)\n\n\n"
        "def DistributedOptimizer(optimizer,",
    )
    source.edit(
        "horovod/torch/functions.py",
        "        handle = broadcast_async_(p, root_rank, name)\n        handles.append(handle)\n",
        "        whole = p if p.is_contiguous() else p.detach().contiguous()\n"
        "        handles.append((broadcast_async_(whole, root_rank, name), p, whole))\n",
    )
    source.edit(
        "horovod/torch/functions.py",
        "    for handle in handles:\n        synchronize(handle)\n",
        "    for handle, p, whole in handles:\n"
        "        synchronize(handle)\n"
        "        if whole is not p:\n"
        "            p.detach().copy_(whole)\n",
    )
