"""Tell the variables of `groups` apart by what they are, not by their names.

Gradients were filed under `var.name`. Of two variables with one name (every Dense layer has a
`kernel`) the second took the place of the first, whose gradient came back as None, in silence. Each
variable of a group now has a key of its own, given outside the traced function, where variables are
still the user's objects. A group none of whose variables has a gradient, which failed, is left out.

`groups` came with https://github.com/horovod/horovod/pull/2523.
"""

KEYED = """    reduce_grads = _make_subgraph(allreduce_grads) if _executing_eagerly() else allreduce_grads
    if not isinstance(groups, list):
        return reduce_grads
    keyed = [[f'{g}.{i}' for i in range(len(group))] for g, group in enumerate(groups)]
    key_of = {}
    for group, keys in zip(groups, keyed):
        for var, key in zip(group, keys):
            key_of.setdefault(var.ref(), key)

    def reduce_keyed(grads, vars, use_generic_names=False):
        keys = [key_of.get(_keras3.tf_variable(var).ref(), str(i)) for i, var in enumerate(vars)]
        return reduce_grads(grads, keys, use_generic_names)

    return reduce_keyed
"""


def mend(source):
    path = "horovod/tensorflow/__init__.py"
    anchor = "from horovod.tensorflow.mpi_ops import init, shutdown\n"
    source.edit(path, anchor, "from horovod import _keras3\n" + anchor)
    source.edit(path, "var_name2grad[var.name]", "var_name2grad[var]", times=3)
    source.edit(path, "if var.name in var_name2grad:", "if var in var_name2grad:")
    source.edit(path, "for group in groups:\n", "for group in keyed:\n")
    source.edit(
        path,
        "                        grads_split.append(grad_group)\n",
        "                        if grad_group:\n"
        "                            grads_split.append(grad_group)\n",
    )
    source.edit(
        path,
        "    if _executing_eagerly():\n"
        "        return _make_subgraph(allreduce_grads)\n"
        "    else:\n"
        "        return allreduce_grads\n",
        KEYED,
    )
    path = "horovod/tensorflow/util.py"
    source.edit(
        path, "import tensorflow as tf\n", "import tensorflow as tf\nfrom horovod import _keras3\n"
    )
    source.edit(path, "    return vars.ref()\n", "    return _keras3.tf_variable(vars).ref()\n")
