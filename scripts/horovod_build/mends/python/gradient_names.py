"""Pair the gradients that ranks reduce by their places, not by the names of their tensors.

In a traced step these hold the names of layers, which Keras counts up: `dense_1` of a rank that has
made or loaded another model before is `dense` of the next rank. Both then waited for each other for
ever. The number of elements is part of the name, so that steps of several models, taken in turn, do
not replace each other in Horovod's cache of what ranks have agreed on.

https://github.com/horovod/horovod/issues/403
"""

PLACE = """def _place_name(place, grads):
    sizes = [g.shape.num_elements() for g in grads if not isinstance(g, tf.IndexedSlices)]
    return 'grad_%d_of_%s' % (place, '_'.join(str(s) for s in sizes[:1]) or 'sparse')


"""


def mend(source):
    path = "horovod/tensorflow/__init__.py"
    anchor = "@_cache\ndef _make_cached_allreduce_grads_fn("
    source.edit(path, anchor, PLACE + anchor)
    old = 'name=f"grad_{i}" if use_generic_names else None,\n'
    for indent, grads in ((63, "grad_group"), (36, "[grad]")):
        new = f'name=f"grad_{{i}}" if use_generic_names else _place_name(i, {grads}),\n'
        source.edit(path, f"\n{'':{indent}}{old}", f"\n{'':{indent}}{new}")
    for what in ("values", "indices"):
        source.edit(
            path,
            f"{what} = allgather(tensor.{what}, ",
            f"{what} = allgather(tensor.{what}, name=name and name + '.{what}', ",
        )
        source.edit(
            path,
            f"grouped_allgather([x.{what} for x in indexed_slices_list], ",
            f"grouped_allgather([x.{what} for x in indexed_slices_list],\n"
            f"                                       name=name and name + '.{what}', ",
        )
