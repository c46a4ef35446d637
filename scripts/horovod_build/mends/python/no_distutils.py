"""Let `horovodrun` start on Python 3.12 and later, which have no distutils.

It imports one function of it, for jobs that it does not start.

Users had asked for other modules in its place: https://github.com/horovod/horovod/issues/3634.
"""


def mend(source):
    source.edit(
        "horovod/runner/js_run.py",
        "from distutils.spawn import find_executable\n",
        "from shutil import which as find_executable\n",
    )
