"""Say in one message that a command can't be started, before anything is.

Each rank over Gloo said so in `env`'s words, and a traceback of the launcher followed; mpirun
ended with exit code 183. Now it is a shell's: 127 for a program that is not there, 126 for a file that
is not executable. Looked for on this machine, if ranks run here. See
https://github.com/horovod/horovod/issues/1812.
"""


def mend(source):
    source.edit(
        "horovod/runner/launch.py",
        "    if len(remote_host_names) > 0:\n        if settings.verbose >= 2:\n",
        "    if not args.run_func and len(remote_host_names) < len(all_host_names):\n"
        "        from horovod.runner._launching import check_command\n"
        "        check_command(args.command)\n\n"
        "    if len(remote_host_names) > 0:\n        if settings.verbose >= 2:\n",
    )
