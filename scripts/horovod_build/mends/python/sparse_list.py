"""Give reduced sparse tensors the shapes of the sparse ones.

`grouped_allreduce` paired them with the list of all tensors: beside dense ones a sparse tensor took
a wrong shape, or the call failed.

See https://github.com/horovod/horovod/issues/3994.
"""


def mend(source):
    source.edit(
        "horovod/tensorflow/__init__.py",
        "zip(new_values, new_indices, tensors)]",
        "zip(new_values, new_indices, indexed_slices_list)]",
    )
