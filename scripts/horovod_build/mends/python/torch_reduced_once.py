"""Reduce the gradients of a backward pass once.

`step()` after `synchronize()` without `skip_synchronize()` reduced what was reduced already: with
`op=hvd.Sum` each gradient was multiplied by the number of ranks, and the warning spoke of a
slowdown only. A second `synchronize()` did the same. Both now reduce only what a backward pass has
added since. The warning stays, which scripts may look for, and says what it is about; there is none
where GradScaler has reduced. See https://github.com/horovod/horovod/issues/1099 and
https://github.com/horovod/horovod/issues/1882.
"""

FILE = "horovod/torch/optimizer.py"
OLD = """            if self._synchronized:
                warnings.warn("optimizer.step() called without "
                              "optimizer.skip_synchronize() context after "
                              "optimizer.synchronize(). This can cause training "
                              "slowdown. You may want to consider using "
                              "optimizer.skip_synchronize() context if you use "
                              "optimizer.synchronize() in your code.")
"""
NEW = """            if self._synchronized and not self.__dict__.pop('_reduced_for_scaler', False):
                warnings.warn("optimizer.step() called without "
                              "optimizer.skip_synchronize() context after "
                              "optimizer.synchronize(). Horovod as it was released reduces the "
                              "gradients a second time then, which takes time, and is wrong with "
                              "op=hvd.Sum. You may want to use that context.")
"""


def mend(source):
    source.edit(FILE, OLD, NEW)
    source.edit(
        FILE,
        "        completed = set()\n",
        "        if self._synchronized and not self._handles:\n"
        "            return  # there was no backward pass since\n\n"
        "        completed = set()\n",
    )
    source.edit(
        FILE,
        "            assert not p.grad.requires_grad\n",
        "            assert not p.grad.requires_grad\n            self._synchronized = False\n",
        times=2,
    )
    source.edit(
        FILE,
        "        return super(self.__class__, self).zero_grad(",
        "        self._synchronized = False\n        return super(self.__class__, self).zero_grad(",
        times=2,
    )
