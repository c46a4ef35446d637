"""Let `DistributedOptimizer.zero_grad` take `set_to_none`, as every optimizer of torch does."""


def mend(source):
    path = "horovod/torch/optimizer.py"
    source.edit(path, "def zero_grad(self):", "def zero_grad(self, *args, **kwargs):", times=2)
    source.edit(
        path,
        "super(self.__class__, self).zero_grad()",
        "super(self.__class__, self).zero_grad(*args, **kwargs)",
        times=2,
    )
