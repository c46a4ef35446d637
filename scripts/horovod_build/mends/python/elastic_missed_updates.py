"""Tell the workers of an elastic job about changed hosts until it has made use of them.

The driver told the worker of rank 0 once. A host that came while that one was meeting the others,
had just been lost or had not started yet was never used: its message was thrown away with those
from before the meeting. Now it is told of each change, and each second of all that it has not made
use of.
"""

DRIVER = "horovod/runner/elastic/driver.py"


def mend(source):
    source.edit(
        DRIVER,
        "        self._shutdown = threading.Event()\n",
        "        self._shutdown = threading.Event()\n"
        "        self._host_changes = HostUpdateResult.no_update\n"
        "        self._tell_again = 0.0  # at this time.monotonic()\n",
    )
    source.edit(
        DRIVER,
        "                if update_res != HostUpdateResult.no_update:\n"
        "                    self._notify_workers_host_changes(self._host_manager.current_hosts, update_res)\n"
        "                    self._wait_hosts_cond.notify_all()\n",
        "                self._host_changes |= update_res\n"
        "                if update_res or self._host_changes and time.monotonic() > self._tell_again:\n"
        "                    self._tell_again = time.monotonic() + 1\n"
        "                    self._notify_workers_host_changes(self._host_manager.current_hosts,\n"
        "                                                      update_res or self._host_changes)\n"
        "                if update_res != HostUpdateResult.no_update:\n"
        "                    self._wait_hosts_cond.notify_all()\n",
    )
    source.edit(
        DRIVER,
        "        if next_host_assignments == self.host_assignments:\n",
        "        if next_host_assignments == self.host_assignments:\n"
        "            self._host_changes = HostUpdateResult.no_update\n",
    )
