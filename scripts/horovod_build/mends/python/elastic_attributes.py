"""Elastic attributes: `restore` brings back those of the last commit, `sync` sends present ones.

`commit` kept references: a list, dictionary or array that was changed in place after it was not
restored. And `sync` sent what the last commit had kept beside the present values of model and
optimizer: what was set before `run`, as the epoch of a checkpoint, was lost, and after
`check_host_updates` without a commit (https://github.com/horovod/horovod/pull/1849 describes it as
the cheap way to look for new hosts) steps were counted twice
(https://github.com/horovod/horovod/issues/2844 tells of wrong epochs after a worker came).
"""


def mend(source):
    path = "horovod/common/elastic.py"
    source.edit(path, "import functools\n", "import copy\nimport functools\n")
    source.edit(
        path,
        "        self._saved_state = kwargs\n        self._set_attrs()\n",
        "        self._saved_state = kwargs\n        self._set_attrs()\n"
        "        self._saved_state = copy.deepcopy(kwargs)\n",
    )
    source.edit(
        path,
        "            new_state[attr] = getattr(self, attr)\n",
        "            new_state[attr] = copy.deepcopy(getattr(self, attr))\n",
    )
    source.edit(
        path,
        "    def restore(self):\n        self._set_attrs()\n",
        "    def restore(self):\n        self._set_attrs(copy.deepcopy(self._saved_state))\n",
    )
    source.edit(
        path,
        "            self._saved_state = self._bcast_object(self._saved_state)\n"
        "            self._set_attrs()\n",
        "            present = {attr: getattr(self, attr) for attr in self._saved_state}\n"
        "            present = self._bcast_object(present)\n"
        "            self._saved_state = copy.deepcopy(present)\n"
        "            self._set_attrs(present)\n",
    )
    source.edit(
        path,
        "    def _set_attrs(self):\n        for attr, value in self._saved_state.items():\n",
        "    def _set_attrs(self, state=None):\n"
        "        for attr, value in (self._saved_state if state is None else state).items():\n",
    )
