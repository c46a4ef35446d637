"""Let `hvd.broadcast` and `hvd.broadcast_parameters` take bfloat16.

Horovod has no bfloat16, so a model in it could not even start. Its bits are broadcast as those of
float16, which nothing calculates with. See https://github.com/horovod/horovod/issues/4047.
"""

FILE = "horovod/torch/mpi_ops.py"


def mend(source):
    source.edit(
        FILE,
        "    function = _check_function(_broadcast_function_factory, tensor)\n    try:\n",
        "    given = tensor, output\n"
        "    if tensor.dtype is torch.bfloat16:\n"
        "        tensor, output = (t.detach().view(torch.float16) for t in given)\n"
        "    function = _check_function(_broadcast_function_factory, tensor)\n    try:\n",
    )
    source.edit(
        FILE,
        "            tensor, output, root_rank, name.encode() if name is not None else _NULL,\n"
        "            process_set.process_set_id)\n"
        "    except RuntimeError as e:\n"
        "        raise HorovodInternalError(e)\n"
        "    _handle_map[handle] = (tensor, output)\n",
        "            tensor, output, root_rank, name.encode() if name is not None else _NULL,\n"
        "            process_set.process_set_id)\n"
        "    except RuntimeError as e:\n"
        "        raise HorovodInternalError(e)\n"
        "    _handle_map[handle] = given\n",
    )
