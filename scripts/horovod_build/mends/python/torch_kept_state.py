"""Let `DistributedOptimizer` keep all of the optimizer that it wraps.

It made a new optimizer from the parameter groups alone. Moments of an optimizer that had been
trained or loaded before were lost in silence, so were its defaults, which `add_param_group` uses,
and its hooks; one whose constructor needs more than the groups failed; hooks of the new one ran
twice a step. See https://github.com/horovod/horovod/issues/697 and
https://github.com/determined-ai/determined/issues/5162.
"""

FILE = "horovod/torch/optimizer.py"
TAKE_OVER = '''def _take_over(distributed, optimizer):
    """Make `distributed` what `optimizer` is: its groups, state, defaults and hooks."""
    for name, value in optimizer.__dict__.items():
        # A learning-rate schedule has put a step of its own in place of the class's.
        if not (callable(value) and hasattr(type(optimizer), name)):
            distributed.__dict__[name] = value
    distributed.param_groups = list(optimizer.param_groups)
    # The wrapped class's step runs the hooks; torch would make this one run them too.
    type(distributed).step.hooked = True


class _DistributedOptimizer(torch.optim.Optimizer):
'''


def mend(source):
    source.edit(FILE, "class _DistributedOptimizer(torch.optim.Optimizer):\n", TAKE_OVER)
    source.edit(
        FILE,
        "        super(self.__class__, self).__init__(params)\n",
        "        _take_over(self, params)\n",
        times=2,
    )
    source.edit(
        FILE,
        "return cls(optimizer.param_groups, named_parameters, compression,",
        "return cls(optimizer, named_parameters, compression,",
        times=2,
    )
