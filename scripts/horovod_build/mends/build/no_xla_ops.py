"""Leave out TensorFlow's XLA operations.

xla_mpi_ops.cc includes a header (highwayhash/arch_specific.h) that the TensorFlow wheel no longer
ships. All it gives is HOROVOD_ENABLE_XLA_OPS, which exists for GPUs only.

A build against TensorFlow 2.18 was seen to fail in that file:
https://github.com/horovod/horovod/pull/4302.
"""


def mend(source):
    source.edit(
        "horovod/tensorflow/CMakeLists.txt",
        'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\n',
        "",
    )
