"""Reduce in `step(closure)` what the closure has computed.

The gradients of before the closure were reduced, and its own ones applied while their reduction had
just begun: each rank took a step of its own, in silence. LBFGS, which decides by the loss whether
to go on, now gets the loss reduced as the gradients are, so that all ranks decide alike: see
https://github.com/pytorch/pytorch/issues/30439.
"""

FILE = "horovod/torch/optimizer.py"
REDUCING = '''def _reducing(optimizer, closure):
    """`closure`, whose gradients are reduced before it returns."""
    if not optimizer._should_synchronize:
        raise ValueError('optimizer.step(closure) computes gradients, which have to be reduced: '
                         'do not call it under skip_synchronize().')

    def reduced():
        loss = closure()
        optimizer.synchronize()
        optimizer._synchronized = False
        if isinstance(optimizer, torch.optim.LBFGS) and optimizer.process_set.included():
            from horovod.torch.mpi_ops import allreduce
            loss = allreduce(torch.as_tensor(loss).detach(), name='loss of the closure',
                             op=optimizer.op, process_set=optimizer.process_set)
        return loss

    return reduced


'''


def mend(source):
    source.edit(
        FILE,
        "    def step(self, closure=None):\n        if self._should_synchronize:\n",
        "    def step(self, closure=None):\n"
        "        if closure is not None:\n"
        "            return super(self.__class__, self).step(_reducing(self, closure))\n"
        "        if self._should_synchronize:\n",
    )
    source.edit(
        FILE,
        "def DistributedOptimizer(optimizer,",
        f"{REDUCING}def DistributedOptimizer(optimizer,",
    )
