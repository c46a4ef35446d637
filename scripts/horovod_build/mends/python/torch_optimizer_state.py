"""Broadcast the state of an optimizer as it is.

`broadcast_optimizer_state` made every rank whose optimizer had no state take a step with gradients
of zero. That step decayed the weights (on the new ranks alone, where one had resumed: they
differed from then on), and was counted: Adam's first real step was corrected as its second, and was
a quarter too short. Gradients of zero stayed behind, on some ranks alone. Now the root's state comes
as it is, with no step, also that of LBFGS, which was refused; and ranks whose optimizers have other
parameters say so instead of waiting for ever. Gradients of zero, which scripts may read, are still
left where the root has no state, on all ranks. See https://github.com/horovod/horovod/issues/2805 and
https://github.com/horovod/horovod/issues/1608.
"""

from horovod_build.mending import ADDED


def mend(source):
    source.edit(
        "horovod/torch/functions.py",
        "    from horovod.torch.optimizer import DistributedOptimizer\n",
        "    from horovod.torch import _optimizer_state\n"
        "    return _optimizer_state.broadcast(optimizer, root_rank)\n\n"
        "    from horovod.torch.optimizer import DistributedOptimizer\n",
    )
    source.add(
        "horovod/torch/_optimizer_state.py",
        (ADDED / "_torch_optimizer_state.py").read_text(encoding="utf-8"),
    )
