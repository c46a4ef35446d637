"""Reduce bfloat16 and float16 tensors in float32 where no compression is asked for.

Horovod has no bfloat16 ("Tensor type torch.BFloat16Tensor is not supported"), and it adds float16
up in float16, where a mean of gradients overflows on the way and each addition rounds. Now their
sum is taken in float32 and rounded once: by `DistributedOptimizer`, `hvd.allreduce`,
`hvd.grouped_allreduce` and `hvd.reducescatter`. `hvd.Compression.fp16` sends float16 as before. See
https://github.com/horovod/horovod/issues/4047.
"""

FILE = "horovod/torch/compression.py"
OLD = '''        """Returns the tensor unmodified."""
        return tensor, None
'''
NEW = '''        """Returns the tensor, one of 16 bits as float32, in which it can be added up."""
        if tensor.dtype in (torch.bfloat16, torch.float16):
            return tensor.float(), tensor.dtype
        return tensor, None
'''
BACK = '''        """Returns the tensor in the type that it came in."""
        return tensor if ctx is None else tensor.to(ctx)
'''


def mend(source):
    source.edit(FILE, OLD, NEW)
    source.edit(FILE, '        """Returns the tensor unmodified."""\n        return tensor\n', BACK)
