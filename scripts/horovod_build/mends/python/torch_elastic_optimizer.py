"""Restore an optimizer of torch more than once, and without the gradients of the lost step.

`load_state_dict` of today's torch takes over the tensors that it is given. The saved state became
the one that is trained: a second failure before the next commit restored moments that had moved on,
to weights that had not. Gradients of the step that failed also stayed: they were added to those of
the first step afterwards where it does not begin with `zero_grad`.

https://github.com/pytorch/pytorch/issues/196083, https://github.com/pytorch/pytorch/pull/106082
"""


def mend(source):
    source.edit(
        "horovod/torch/elastic/state.py",
        "        self.value.load_state_dict(self._saved_optimizer_state)\n",
        "        self.value.load_state_dict(copy.deepcopy(self._saved_optimizer_state))\n"
        "        self.value.zero_grad()\n",
    )
