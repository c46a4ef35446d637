"""Let `DistributedOptimizer.zero_grad` take `set_to_none`, as every optimizer of torch does.

It took no argument, so that a loop that gives one failed in its first step.

See https://github.com/horovod/horovod/issues/3405 and https://github.com/horovod/horovod/pull/4026.
"""


def mend(source):
    path = "horovod/torch/optimizer.py"
    source.edit(path, "def zero_grad(self):", "def zero_grad(self, *args, **kwargs):", times=2)
    source.edit(
        path,
        "super(self.__class__, self).zero_grad()",
        "super(self.__class__, self).zero_grad(*args, **kwargs)",
        times=2,
    )
