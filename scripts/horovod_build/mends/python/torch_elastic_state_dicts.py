"""Let `TorchState` hold learning-rate schedules, GradScalers and whatever else has a state_dict.

They were handled as plain objects. What a schedule had counted was not restored; and on every rank
but the first `sync` put a copy in its place, which changed the learning rate of a copy of the
optimizer: ranks then trained with different rates.

Users had asked for schedules that are sent: https://github.com/horovod/horovod/issues/1281.
"""

HANDLER = '''class StateDictHandler(StateHandler):
    """Of an object with a `state_dict` and a `load_state_dict`."""
    def __init__(self, value):
        super().__init__(value)
        self.save()

    def save(self):
        self._saved_state = copy.deepcopy(self.value.state_dict())

    def restore(self):
        self.value.load_state_dict(copy.deepcopy(self._saved_state))

    def sync(self):
        self.value.load_state_dict(broadcast_object(self.value.state_dict()))


def _union(sets):
'''

CHOICE = """            return handler_cls(v)
    if not isinstance(v, type) and all(callable(getattr(v, name, None))
                                       for name in ('state_dict', 'load_state_dict')):
        return StateDictHandler(v)
    return None
"""


def mend(source):
    path = "horovod/torch/elastic/state.py"
    source.edit(path, "def _union(sets):\n", HANDLER)
    source.edit(path, "            return handler_cls(v)\n    return None\n", CHOICE)
