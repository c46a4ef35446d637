"""Let `broadcast_parameters` take what its documentation names: `model.parameters()`.

`model.parameters()` and `model.named_parameters()` are generators, and were refused as "invalid
params of type: <class 'generator'>". Parameters without names were called by the number of
operations that the rank had begun, and ranks that had begun more or less than others waited for
ever; now by their place. See https://github.com/ChenRocks/UNITER/issues/50.
"""


def mend(source):
    source.edit(
        "horovod/torch/functions.py",
        "    elif isinstance(params, list):\n",
        "    elif isinstance(params, Iterable) and not torch.is_tensor(params):\n",
    )
    source.edit(
        "horovod/torch/functions.py",
        "[p if isinstance(p, tuple) else (None, p) for p in params]",
        "[p if isinstance(p, tuple) else (f'parameter {i}', p) for i, p in enumerate(params)]",
    )
