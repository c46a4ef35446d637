"""Let BestModelCheckpoint be made under Keras 3, and write on rank 0 alone.

It passes `filepath=None`, to be set later, which Keras 3 refuses; and each rank that had it would
write the same file at the same time. `filepath` can now be given too.

https://github.com/horovod/horovod/issues/54
"""

FILES = ("horovod/keras/callbacks.py", "horovod/tensorflow/keras/callbacks.py")


def mend(source):
    for path in FILES:
        source.edit(
            path,
            "class BestModelCheckpoint(",
            "class BestModelCheckpoint(_keras3_callbacks.part(keras, 'SavesOnRank0'),\n"
            "                          ",
        )
        source.edit(
            path,
            "                 save_freq='epoch'):\n",
            "                 save_freq='epoch',\n                 filepath=None):\n",
        )
        source.edit(path, "__init__(filepath=None,\n", "__init__(filepath=filepath,\n")
