"""Keep Ctrl-C away from the helper processes of horovodrun while they start.

Each rank over Gloo has a helper that leaves the terminal's process group, but only after Python has
started: Ctrl-C before that ended each helper by a traceback. Its signal is now held back until
then; horovodrun tells it to end in another way.
"""

FILE = "horovod/runner/common/util/safe_shell_exec.py"


def mend(source):
    source.edit(
        FILE,
        "    os.setsid()\n",
        "    os.setsid()\n"
        "    if signal.sigpending() & {signal.SIGINT}:\n"
        "        signal.sigwait({signal.SIGINT})\n"
        "    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})\n",
    )
    source.edit(
        FILE,
        "    middleman.start()\n",
        "    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n"
        "    try:\n"
        "        middleman.start()\n"
        "    finally:\n"
        "        signal.pthread_sigmask(signal.SIG_SETMASK, before)\n",
    )
