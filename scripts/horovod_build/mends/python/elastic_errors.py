"""TensorFlow's elastic `run` meets again after any failed operation of Horovod.

It knew allreduce, allgather and broadcast by name, not grouped allreduce, reducescatter or alltoall,
and only in the training function: where a second worker died while the others synchronised their
state, these ended too. An UnknownError that was not Horovod's was swallowed, and the worker ended as
if it had succeeded, which ends the whole job
(https://github.com/horovod/horovod/pull/1968 saw such an exit code of 0).
"""


def mend(source):
    path = "horovod/tensorflow/elastic.py"
    source.edit(
        path,
        "    from tensorflow.python.framework.errors_impl import UnknownError\n\n"
        "    def wrapper(state, *args, **kwargs):\n"
        "        try:\n"
        "            return func(state, *args, **kwargs)\n"
        "        except UnknownError as e:\n"
        "            if 'HorovodAllreduce' in e.message or \\\n"
        "                    'HorovodAllgather' in e.message or \\\n"
        "                    'HorovodBroadcast' in e.message:\n"
        "                raise HorovodInternalError(e)\n",
        "    def wrapper(state, *args, **kwargs):\n"
        "        with horovod_errors():\n"
        "            return func(state, *args, **kwargs)\n",
    )
    source.edit(
        path,
        "from horovod.common.exceptions import HorovodInternalError\n",
        "from horovod.tensorflow._elastic_variables import horovod_errors\n",
    )
    source.edit(
        path,
        "    def sync(self):\n",
        "    @horovod_errors()\n    def sync(self):\n",
        times=2,
    )
