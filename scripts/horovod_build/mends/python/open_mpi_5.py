"""Give Open MPI its binding options with two dashes.

Open MPI 5 refuses `-bind-to none -map-by slot`; Open MPI 4 takes both forms. Other MPIs keep
theirs.

Open MPI said so beforehand, in a warning: see https://github.com/open-mpi/ompi/issues/7565.
"""


def mend(source):
    source.edit(
        "horovod/runner/mpi_run.py",
        "return list(_OMPI_FLAGS), list(_NO_BINDING_ARGS), _OMPI_IMPL",
        "return list(_OMPI_FLAGS), ['--bind-to none', '--map-by slot'], _OMPI_IMPL",
    )
