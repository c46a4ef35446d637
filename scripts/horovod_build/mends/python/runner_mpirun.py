"""Stay above mpirun: pass signals on to it, and name the rank that failed.

`horovodrun --mpi` became a shell that waits for mpirun. SIGTERM, or SIGINT from a script, ended
that shell alone or nothing at all: mpirun and its ranks went on. The failed rank's last lines were
lost among those of the others.

It became so for the sake of progress bars: https://github.com/horovod/horovod/pull/931.
"""


def mend(source):
    source.edit(
        "horovod/runner/mpi_run.py",
        "        os.execve('/bin/sh', ['/bin/sh', '-c', mpirun_command], env)\n",
        "        from horovod.runner._launching import run_mpirun\n"
        "        run_mpirun(mpirun_command, env)\n",
    )
