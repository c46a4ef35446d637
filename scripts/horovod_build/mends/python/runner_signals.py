"""Let Ctrl-C and SIGTERM end horovodrun over Gloo as what they are, not as a failure of a rank.

The ranks that horovodrun itself had ended were reported as "exited with non-zero status", by a
traceback, and the exit code was 1; schedulers and scripts expect 128 and the signal's number.
"""

FILE = "horovod/runner/gloo_run.py"


def mend(source):
    source.edit(
        FILE,
        "    event = threading.Event()\n\n    def set_event_on_signal(signum, frame):\n",
        "    event = threading.Event()\n    event.signum = None\n\n"
        "    def set_event_on_signal(signum, frame):\n"
        "        event.signum = event.signum or signum\n",
    )
    source.edit(
        FILE,
        "                                                 block_until_all_done=True)\n",
        "                                                 block_until_all_done=True)\n"
        "    if event.signum:\n"
        "        from horovod.runner._launching import Stopped\n"
        "        raise Stopped(event.signum)\n",
    )
