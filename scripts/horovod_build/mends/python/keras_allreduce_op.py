"""Let `horovod.keras.allreduce` take `op`.

Its `average` was True unless the caller said otherwise, and `op` beside `average` is an error. See
https://github.com/horovod/horovod/issues/2627, which mended horovod.tensorflow.keras alone.
"""


def mend(source):
    anchor = "def allreduce(value, name=None, average=True, prescale_factor"
    source.edit("horovod/keras/__init__.py", anchor, anchor.replace("True", "None"))
