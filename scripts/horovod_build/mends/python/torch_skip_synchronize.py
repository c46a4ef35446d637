"""Refuse a step under `skip_synchronize()` while gradients are being reduced.

Without `synchronize()` before it such a step applied each rank's own gradients, or half of a
reduction that went on meanwhile: ranks drifted apart in silence. The context came with
https://github.com/horovod/horovod/pull/1132.
"""


def mend(source):
    source.edit(
        "horovod/torch/optimizer.py",
        "        self._synchronized = False\n"
        "        return super(self.__class__, self).step(closure)\n",
        "        if any(handle is not None for handle, _ in self._handles.values()):\n"
        "            raise RuntimeError('optimizer.step() was called under skip_synchronize() while '\n"
        "                               'gradients are being reduced: call '\n"
        "                               'optimizer.synchronize() after loss.backward().')\n"
        "        self._synchronized = False\n"
        "        return super(self.__class__, self).step(closure)\n",
    )
