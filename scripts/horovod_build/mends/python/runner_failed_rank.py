"""Name the rank that failed under Gloo, with its exit code and the end of its output.

Its last lines were lost among those of the others, which fail because of it and often end before
it: then one of them was named. Its exit code was not horovodrun's. See
https://github.com/horovod/horovod/issues/2975, https://github.com/horovod/horovod/issues/1421 and
https://github.com/horovod/horovod/issues/3647.
"""

FILE = "horovod/runner/gloo_run.py"


def mend(source):
    source.edit(
        FILE,
        "from horovod.runner.common.util import env as env_util, safe_shell_exec\n",
        "from horovod.runner import _launching\n"
        "from horovod.runner.common.util import env as env_util, safe_shell_exec\n",
    )
    source.edit(
        FILE,
        "        all_events = []\n        if events:\n",
        "        tail = _exec_command.tails[index] = _launching.Tail()\n"
        "        stdout = MultiFile([stdout or sys.stdout, tail])\n"
        "        stderr = MultiFile([stderr or sys.stderr, tail])\n\n"
        "        all_events = []\n        if events:\n",
    )
    source.edit(
        FILE,
        "        if exit_code != 0 and terminate_all_event:\n",
        "        tail.code = exit_code\n"
        "        if exit_code != 0 and terminate_all_event:\n"
        "            _launching.wait_for_cause(_exec_command.tails, index, all_events)\n",
    )
    source.edit(
        FILE,
        "    return _exec_command\n",
        "    _exec_command.tails = {}\n    return _exec_command\n",
    )
    source.edit(
        FILE,
        """
            raise RuntimeError('Horovod detected that one or more processes exited with non-zero '
                               'status, thus causing the job to be terminated. The first process '
                               'to do so was:\\nProcess name: {name}\\nExit code: {code}\\n'
                               .format(name=name, code=exit_code))
""",
        """
            slot = host_alloc_plan[name]
            tails = getattr(exec_command, 'tails', {})
            raise _launching.RankFailed(slot.rank, exit_code, tails, slot.hostname)
""",
    )
