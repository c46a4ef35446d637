"""Say why an elastic job waits or ends where it has one host only.

It waited for a second host without a word, for ten minutes. And when each host had had a failure,
the failure of a worker was all that was said: that the other workers of its host had to end too,
and that no host was left, was not.

https://github.com/horovod/horovod/issues/2076
"""

WAITING = """        min_hosts = _get_min_start_hosts(settings)
        if len(driver._host_manager.current_hosts.available_hosts) < min_hosts:
            print('horovodrun: waiting for a second host, with which to find out the network that '
                  'workers can use. To begin with one host, name it: --network-interfaces eth0 '
                  '(lo if all workers will be on this machine).', file=sys.stderr, flush=True)
"""

NO_HOST = """            self._driver.stop(error_message=(
                'A worker has failed on every host that was left ({}). The host of a failed worker '
                'is given up, with all its workers, so an elastic job needs another host to go on; '
                'one machine can be two under two of its names (localhost:1, 127.0.0.1:1).'
                .format(', '.join(sorted({host for host, _ in self.get_recorded_slots()})))))
"""


def mend(source):
    source.edit(
        "horovod/runner/gloo_run.py",
        "        min_hosts = _get_min_start_hosts(settings)\n",
        WAITING,
    )
    source.edit(
        "horovod/runner/elastic/registration.py",
        "            logging.error('blacklisted slots count == {} -> stop running'.format(self._size))\n"
        "            self._driver.stop()\n",
        "            logging.error('blacklisted slots count == {} -> stop running'.format(self._size))\n"
        + NO_HOST,
    )
