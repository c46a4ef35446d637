"""Reduce the gradients of parameters that are unfrozen or added after the optimizer was wrapped.

They were known to the optimizer and to no hook: each rank applied its own gradients, and the ranks
drifted apart in silence. A parameter that is frozen later, on the other hand, got a gradient of
zeros, by which weight decay and momentum went on to change it. See
https://github.com/horovod/horovod/issues/1618.
"""

FILE = "horovod/torch/optimizer.py"
FOLLOW = '''def _follow_parameters(optimizer):
    """Reduce from now on what takes a gradient now, on every rank, and nothing else."""
    if size() == 1 and os.environ.get('HOROVOD_ELASTIC') != '1':
        return
    hooked = optimizer.__dict__.setdefault('_hooked', set(optimizer._requires_update))
    for i, param_group in enumerate(optimizer.param_groups):
        for j, p in enumerate(param_group['params']):
            if p.requires_grad == (p in optimizer._requires_update):
                continue
            if not p.requires_grad:
                group = optimizer._p_to_group.get(p)
                if group in optimizer._handles:
                    continue  # it has a gradient of before
                optimizer._requires_update.discard(p)
                if group is not None:
                    _leave_group(optimizer, p)
                    _group_alone(optimizer, p)
                continue
            optimizer._requires_update.add(p)
            optimizer._parameter_names.setdefault(p, f'allreduce.noname.{i}.{j}')
            optimizer._allreduce_delay[p] = optimizer.backward_passes_per_step
            if optimizer._groups is not None and p not in optimizer._p_to_group:
                _group_alone(optimizer, p)
            if p not in hooked:
                hooked.add(p)
                grad_acc = p.expand_as(p).grad_fn.next_functions[0][0]
                grad_acc.register_hook(optimizer._make_hook(p))
                optimizer._grad_accs.append(grad_acc)


def _group_alone(optimizer, p):
    optimizer._p_to_group[p] = (p,)
    optimizer._group_counts[(p,)] = 0


def _leave_group(optimizer, p):
    """Let the rest of its group be reduced without `p`."""
    group = optimizer._p_to_group.pop(p)
    count = optimizer._group_counts.pop(group)
    rest = tuple(q for q in group if q is not p)
    for q in rest:
        optimizer._p_to_group[q] = rest
    if rest:
        optimizer._group_counts[rest] = count


class _DistributedOptimizer(torch.optim.Optimizer):
'''


def mend(source):
    source.edit(FILE, "class _DistributedOptimizer(torch.optim.Optimizer):\n", FOLLOW)
    source.edit(
        FILE,
        "        if not self.process_set.included():\n"
        "            self._synchronized = True\n            return\n",
        "        if not self.process_set.included():\n"
        "            self._synchronized = True\n            return\n"
        "        with torch.enable_grad():\n"
        "            _follow_parameters(self)\n",
    )
