"""Add horovod/_keras3_callbacks.py, from which other mends take Horovod's callbacks for Keras 3.

`horovod._keras.callbacks` uses `optimizer.lr`, `optimizer.variables()`, `variable.ref()` and
`keras.backend.constant`, none of which Keras 3 has. Each callback has a mend of its own.

See https://github.com/horovod/horovod/issues/4290.
"""

from horovod_build.mending import ADDED


def mend(source):
    name = "_keras3_callbacks.py"
    source.add(f"horovod/{name}", (ADDED / name).read_text(encoding="utf-8"))
    for path in ("horovod/keras/callbacks.py", "horovod/tensorflow/keras/callbacks.py"):
        anchor = "from horovod._keras import callbacks as _impl\n"
        source.edit(path, anchor, "from horovod import _keras3_callbacks\n" + anchor)
