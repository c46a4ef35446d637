"""Let `DistributedOptimizer` and `PartialDistributedOptimizer` reduce for a Keras 3 optimizer.

Keras 3 applies gradients through `apply`; the wrapper overrides `_compute_gradients` and
`apply_gradients` of the Keras before it, so that nothing was reduced and every rank trained a model
of its own, in silence. `from_config` lost slots and exclusions from weight decay, a saved file named
a class that can't be loaded, and under mixed_float16 one rank's overflow let the others wait for
ever. Both of horovod.keras, and those of horovod.tensorflow.keras and horovod.tensorflow, end in the
one function that is mended here; horovod/_keras3_optimizer.py has the wrapper for Keras 3.

The same in older times: https://github.com/horovod/horovod/issues/291 (does apply_gradients
average?), https://github.com/tensorflow/tensorflow/issues/46863 (ranks that wait for each other
under mixed precision), https://github.com/horovod/horovod/issues/3807 (mixed_float16),
https://github.com/horovod/horovod/issues/2590 (XLA).
"""

from horovod_build.mending import ADDED

WRAP = """    if _keras3.of_keras3(optimizer):
        from horovod import _keras3_optimizer
        return _keras3_optimizer.distribute(
            optimizer, name, device_dense, device_sparse, compression, sparse_as_dense,
            gradient_predivide_factor, op, backward_passes_per_step,
            average_aggregated_gradients, groups, process_set, scale_local_gradients)

"""

KEEP_LOCAL = """    if _keras3.of_keras3(_opt):
        from horovod import _keras3_optimizer
        _keras3_optimizer.keep_local(_opt, local_layers)
        return _opt

"""


def mend(source):
    source.add(
        "horovod/_keras3_optimizer.py",
        (ADDED / "_keras3_optimizer.py").read_text(encoding="utf-8"),
    )
    source.edit(
        "horovod/_keras/__init__.py",
        "import horovod.tensorflow as hvd\n",
        "import horovod.tensorflow as hvd\nfrom horovod import _keras3\n",
    )
    source.edit(
        "horovod/_keras/__init__.py",
        "    class _DistributedOptimizer(*optimizer.__class__.__bases__):\n",
        WRAP + "    class _DistributedOptimizer(*optimizer.__class__.__bases__):\n",
    )
    # A layer may be built later, and so has no variables yet that could be registered.
    source.edit(
        "horovod/keras/__init__.py",
        "import horovod._keras as _impl\n",
        "import horovod._keras as _impl\nfrom horovod import _keras3\n",
    )
    source.edit(
        "horovod/keras/__init__.py",
        "    if hasattr(_opt, 'register_local_var'):\n",
        KEEP_LOCAL + "    if hasattr(_opt, 'register_local_var'):\n",
    )
