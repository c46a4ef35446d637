"""Synchronize after every reset, also where hosts were only removed.

This was left out there as all ranks had the same state. But their ranks and number had changed:
`ElasticSampler`, which takes note when it is synchronized, went on with the old parts of the data,
so that samples were trained twice or not at all. And where too few were left, new workers had come
by the time of the reset: these waited in `sync` for the others, which had gone on.

https://github.com/horovod/horovod/issues/3399, https://github.com/horovod/horovod/issues/3494
"""


def mend(source):
    source.edit(
        "horovod/common/elastic.py",
        "                    skip_sync = e.skip_sync\n",
        "                    skip_sync = False\n",
    )
