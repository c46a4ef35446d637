"""Add horovod/runner/_launching.py, with which horovodrun's mends tell how a job has ended."""

from horovod_build.mending import ADDED


def mend(source):
    text = (ADDED / "_launching.py").read_text(encoding="utf-8")
    source.add("horovod/runner/_launching.py", text)
