"""Reduce a group as a group on every rank, with the options that were asked for.

Where a rank had no gradient for one parameter of a group, or fewer passes than
`backward_passes_per_step`, it reduced the group's parameters one by one, and the others, which
reduced the group, waited for ever. Groups also lost `gradient_predivide_factor`, failed on sparse
gradients with `sparse_as_dense=True`, and in a process set without rank 0 at once. One half of the
first was seen in https://github.com/horovod/horovod/pull/2850.
"""

FILE = "horovod/torch/optimizer.py"
OLD = """        tensors_compressed, ctxs = zip(*[self._compression.compress(p.grad) for p in ps])

        handle = grouped_allreduce_async_(tensors_compressed, name=name, op=self.op,
                                          process_set=self.process_set)
"""
NEW = """        tensors = [_dense_gradient(self, p) for p in ps]
        tensors_compressed, ctxs = zip(*[self._compression.compress(t) for t in tensors])

        factor = self.gradient_predivide_factor if self.op == Average else 1.0
        handle = grouped_allreduce_async_(tensors_compressed, name=name, op=self.op,
                                          prescale_factor=1.0 / factor, postscale_factor=factor,
                                          process_set=self.process_set)
"""
UNPACK_SPARSE = """                    if gp.grad.is_sparse:
                        gp.grad = self._compression.decompress(output, gctx).to_sparse(gp.grad.sparse_dim())
                        continue
"""
HELPERS = '''def _dense_gradient(optimizer, p):
    """The gradient of a parameter in a group: zeros where this rank has none."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    if not p.grad.is_sparse:
        return p.grad.contiguous()
    if not optimizer.sparse_as_dense:
        raise ValueError('A group can not reduce sparse gradients: give sparse_as_dense=True, or '
                         'no groups.')
    return p.grad.to_dense()


def _reduce_groups(optimizer, completed):
    """Reduce each group that is not being reduced yet."""
    for group in optimizer._group_counts:
        known = group and optimizer._requires_update.issuperset(group)
        if known and group not in optimizer._handles:
            for p in group:
                optimizer._handles.pop(p, None)
            optimizer._handles[group] = optimizer._grouped_allreduce_grad_async(group)
            completed.update(group)


class _DistributedOptimizer(torch.optim.Optimizer):
'''


def mend(source):
    source.edit(FILE, "class _DistributedOptimizer(torch.optim.Optimizer):\n", HELPERS)
    source.edit(FILE, OLD, NEW)
    source.edit(
        FILE,
        "        missing_p = self._requires_update - completed\n",
        "        _reduce_groups(self, completed)\n"
        "        missing_p = self._requires_update - completed\n",
    )
    source.edit(
        FILE,
        "                    self._allreduce_delay[gp] = self.backward_passes_per_step\n",
        "                    self._allreduce_delay[gp] = self.backward_passes_per_step\n"
        + UNPACK_SPARSE,
    )
    source.edit(
        FILE,
        "        self._handles = {}\n        self._synchronized = False\n"
        "        self._should_synchronize = True\n        for p in",
        "        self._handles = {}\n        self._synchronized = False\n"
        "        self._should_synchronize = True\n"
        "        self._group_counts = dict.fromkeys(self._group_counts, 0)\n        for p in",
    )
    source.edit(
        FILE,
        "broadcast_object(p_list_names, root_rank=0, process_set",
        "broadcast_object(p_list_names, root_rank=min(self.process_set.ranks), process_set",
    )
