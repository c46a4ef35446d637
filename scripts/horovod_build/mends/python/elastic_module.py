"""Add horovod/tensorflow/_elastic_variables.py, which other mends of elastic states use."""

from horovod_build.mending import ADDED


def mend(source):
    source.edit(
        "horovod/tensorflow/elastic.py",
        "from tensorflow.python.framework import ops\n",
        "from tensorflow.python.framework import ops\n\n"
        "from horovod.tensorflow import _elastic_variables\n",
    )
    source.add(
        "horovod/tensorflow/_elastic_variables.py",
        (ADDED / "_elastic_variables.py").read_text(encoding="utf-8"),
    )
