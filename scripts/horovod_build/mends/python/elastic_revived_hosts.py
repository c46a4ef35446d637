"""Start the workers of a host again when its time on the blacklist is over.

With --blacklist-cooldown-range the host of a failed worker may come back. Where the job had waited
for it, as fewer workers than --min-np were left, it had the same slots as before, which the driver
took for filled: nobody was started, the others aborted after 30 s, and horovodrun waited for ever.
And the late end of an old worker no longer counts as the end of the one that took its place.

https://github.com/horovod/horovod/pull/3319, https://github.com/horovod/horovod/issues/1926
"""

DRIVER = "horovod/runner/elastic/driver.py"


def mend(source):
    source.edit(
        DRIVER,
        "        self._host_assignments = {}\n",
        "        self._host_assignments = {}\n        self._worker_threads = {}\n",
    )
    source.edit(
        DRIVER,
        "    def resume(self):\n",
        "    def resume(self):\n"
        "        self._host_assignments = {\n"
        "            host: slots for host, slots in self._host_assignments.items()\n"
        "            if not self._host_manager.is_blacklisted(host)}\n",
    )
    source.edit(
        DRIVER,
        "            exit_code, timestamp = res\n",
        "            exit_code, timestamp = res\n"
        "            if self._worker_threads[key] is not threading.current_thread():\n"
        "                return\n",
    )
    source.edit(
        DRIVER,
        "        thread.daemon = True\n        thread.start()\n        self._results.expect(thread)\n",
        "        key = (slot_info.hostname, slot_info.local_rank)\n"
        "        self._worker_threads[key] = thread\n"
        "        thread.daemon = True\n        thread.start()\n        self._results.expect(thread)\n",
    )
