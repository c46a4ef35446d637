"""Add horovod/_keras3.py, with which the other mends recognise and refuse what is of Keras 3."""

from horovod_build.mending import ADDED


def mend(source):
    source.add("horovod/_keras3.py", (ADDED / "_keras3.py").read_text(encoding="utf-8"))
