"""Let `horovodrun` start on Python 3.12 and later, which have no distutils."""


def mend(source):
    source.edit(
        "horovod/runner/js_run.py",
        "from distutils.spawn import find_executable\n",
        "from shutil import which as find_executable\n",
    )
