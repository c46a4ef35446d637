"""Reduce sparse gradients whatever they are made of, or say that it can't be done.

Values that are an expanded tensor (the gradient of a sum over an embedding's output) were refused
as not contiguous; with `hvd.Compression.fp16` every sparse gradient failed, as did those of
bfloat16; and `op=hvd.Min` and the like added them up in silence. Sparse gradients came with
https://github.com/horovod/horovod/pull/2580.
"""

FILE = "horovod/torch/optimizer.py"
OLD = """        handle = sparse_allreduce_async(p.grad, name=name, op=self.op,
                                        process_set=self.process_set)
"""
NEW = """        if self.op not in (Average, Sum):
            raise ValueError('Sparse gradients can be averaged and summed only: give '
                             'sparse_as_dense=True for another op.')
        grad = p.grad
        if grad.dtype in (torch.bfloat16, torch.float16):
            grad = grad.float()
        handle = sparse_allreduce_async(grad, name=name, op=self.op,
                                        process_set=self.process_set)
"""


def mend(source):
    source.edit(FILE, OLD, NEW)
    source.edit(
        FILE,
        "                    aggregated = self._compression.decompress(output, ctx)\n",
        "                    aggregated = output\n"
        "                    if not callable(handle):\n"
        "                        aggregated = self._compression.decompress(output, ctx)\n"
        "                    elif output.dtype != p.grad.dtype:\n"
        "                        aggregated = output.coalesce().to(p.grad.dtype)\n",
    )
    source.edit(
        FILE,
        "aggregated = aggregated.to_sparse()",
        "aggregated = aggregated.to_sparse(p.grad.sparse_dim())",
    )
    source.edit(
        "horovod/torch/mpi_ops.py",
        "allgather_async(t._values(), name=",
        "allgather_async(t._values().contiguous(), name=",
    )
