"""Refuse to wrap a Keras 3 optimizer.

Keras 3 applies gradients through `apply`; the wrapper overrides `_compute_gradients` and
`apply_gradients` of the Keras before it, so that nothing is reduced and every rank trains a model
of its own. `DistributedOptimizer` and `PartialDistributedOptimizer` of horovod.keras and
horovod.tensorflow.keras and `DistributedOptimizer` of horovod.tensorflow all end in this one
function; `backward_passes_per_step` goes with it.
"""


def mend(source):
    path = "horovod/_keras/__init__.py"
    source.edit(
        path,
        "import horovod.tensorflow as hvd\n",
        "import horovod.tensorflow as hvd\nfrom horovod import _keras3\n",
    )
    source.edit(
        path,
        "    class _DistributedOptimizer(*optimizer.__class__.__bases__):\n",
        "    _keras3.refuse('hvd.DistributedOptimizer', 'it would reduce no gradient and say nothing',\n"
        "                   _keras3.CUSTOM_LOOP, optimizer)\n\n"
        "    class _DistributedOptimizer(*optimizer.__class__.__bases__):\n",
    )
