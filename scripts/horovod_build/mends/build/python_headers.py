"""Find Python's headers without distutils.

Python 3.12 has no distutils; sysconfig gives the same folder.

See https://github.com/horovod/horovod/issues/3634.
"""


def mend(source):
    source.edit(
        "horovod/torch/CMakeLists.txt",
        "from distutils.sysconfig import get_python_inc; print(get_python_inc())",
        "import sysconfig; print(sysconfig.get_path('include'))",
    )
