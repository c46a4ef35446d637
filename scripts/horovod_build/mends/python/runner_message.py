"""End horovodrun with one message and an exit code, where it ended with its own traceback.

What went wrong (in a rank, in the options, in what this machine lacks) stood above or below some
fifteen lines about Horovod's source, and the exit code was always 1. So did Ctrl-C before the ranks
had started. See https://github.com/horovod/horovod/issues/3472 and
https://github.com/horovod/horovod/issues/2484. Errors that Horovod does not raise on purpose keep
their traceback, and with --verbose all do.
"""


def mend(source):
    source.edit(
        "horovod/runner/launch.py",
        "        logging.basicConfig(level=logging.getLevelName(args.log_level))\n\n    _run(args)\n",
        "        logging.basicConfig(level=logging.getLevelName(args.log_level))\n\n"
        "    from horovod.runner import _launching\n"
        "    from horovod.runner.common.util.timeout import TimeoutException\n"
        "    try:\n"
        "        _run(args)\n"
        "        return\n"
        "    except KeyboardInterrupt:\n"
        "        error = _launching.Stopped(2)\n"
        "    except _launching.LauncherError as failure:\n"
        "        error = failure\n"
        "    except Exception as failure:\n"
        "        known = (Exception, RuntimeError, ValueError, TimeoutException)\n"
        "        if args.verbose or type(failure) not in known:\n"
        "            raise\n"
        "        error = _launching.LauncherError(str(failure), 1)\n"
        "    _launching.say(error)\n"
        "    sys.exit(error.exit_code)\n",
    )
