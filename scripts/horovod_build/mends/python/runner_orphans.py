"""End what a failed rank leaves behind: the processes that it had started.

Only the rank's own process got a signal. Its data loaders and the like went on, and horovodrun
waited for them as long as they held the rank's output open, so a failed job did not end. See
https://github.com/horovod/horovod/issues/2402.

Two threads waited for the rank's shell, and where the one that ends it was first, the other one saw
exit code 0, whatever the rank's was.
"""

FILE = "horovod/runner/common/util/safe_shell_exec.py"


def mend(source):
    source.edit(
        FILE,
        "    exit_code = executor_shell.wait()\n",
        "    exit_code = executor_shell.wait()\n"
        "    if exit_code != 0 or exit_event.is_set():\n"
        "        from horovod.runner._launching import end_session\n"
        "        end_session(GRACEFUL_TERMINATION_TIME_S)\n",
    )
    # These look at the shell's children, and it may end meanwhile.
    source.edit(
        FILE,
        "args=(executor_shell.pid,), daemon=True)",
        "args=(executor_shell.pid,), daemon=True, silent=True)",
    )
    source.edit(
        FILE,
        "in_thread(kill_executor_children_if_parent_dies)",
        "in_thread(kill_executor_children_if_parent_dies, silent=True)",
    )
    source.edit(
        FILE,
        "    try:\n"
        "        p.wait(timeout=GRACEFUL_TERMINATION_TIME_S)\n"
        "    except psutil.TimeoutExpired:\n",
        "    from horovod.runner._launching import wait_for_end\n"
        "    if not wait_for_end(p, GRACEFUL_TERMINATION_TIME_S):\n",
    )
