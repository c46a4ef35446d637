"""Let an elastic job survive new workers that start slowly or fail as they start.

After a reset the workers that were there met at once, and waited for the new ones for 30 s, in
which these must have started Python and imported their framework; then all aborted ("terminate
called after throwing an instance of 'gloo::IoException' … Wait timeout after 30 seconds"), and the
job with them. The same if a new worker crashed in its first seconds: adding a host with a broken
environment ended a job that did well. horovod/runner/elastic/meeting.py keeps them waiting until
the new ones have come, for as long as --elastic-timeout but at least these 30 s, and leaves out a
host that fails.

https://github.com/horovod/horovod/issues/2484, https://github.com/horovod/horovod/issues/2015
"""

from horovod_build.mending import ADDED

DRIVER = "horovod/runner/elastic/driver.py"
RENDEZVOUS = "horovod/runner/elastic/rendezvous.py"


def mend(source):
    source.add(
        "horovod/runner/elastic/meeting.py",
        (ADDED / "_elastic_meeting.py").read_text(encoding="utf-8"),
    )
    source.edit(
        DRIVER,
        "from horovod.runner.elastic.registration import WorkerStateRegistry\n",
        "from horovod.runner.elastic.meeting import Meeting\n"
        "from horovod.runner.elastic.registration import WorkerStateRegistry\n",
    )
    source.edit(
        DRIVER,
        "        self._create_worker_fn = None\n",
        "        self.meeting = Meeting(self)\n        self._create_worker_fn = None\n",
    )
    source.edit(
        DRIVER,
        "    def _activate_workers(self, min_num_proc):\n",
        "    def _activate_workers(self, min_num_proc):\n"
        "        with self.meeting:\n"
        "            self._activate_workers_that_meet(min_num_proc)\n\n"
        "    def _activate_workers_that_meet(self, min_num_proc):\n",
    )
    source.edit(
        DRIVER,
        "        self._start_worker_processes(pending_slots)\n",
        "        self.meeting.begin(pending_slots)\n"
        "        self._start_worker_processes(pending_slots)\n",
    )
    source.edit(
        DRIVER,
        "        host_event = self._host_manager.get_host_event(slot_info.hostname)\n",
        "        host_event = self._host_manager.get_host_event(slot_info.hostname)\n"
        "        end_event = self.meeting.end_of(slot_info)\n",
    )
    source.edit(
        DRIVER,
        "create_worker_fn(slot_info, [shutdown_event, host_event])",
        "create_worker_fn(slot_info, [shutdown_event, host_event, end_event])",
    )
    source.edit(
        DRIVER,
        "    def _handle_worker_exit(self, slot_info, exit_code, timestamp):\n",
        "    def _handle_worker_exit(self, slot_info, exit_code, timestamp):\n"
        "        if self.meeting.ended(slot_info):\n"
        "            return\n\n",
    )
    source.edit(
        RENDEZVOUS,
        "            driver.record_ready(host, local_rank)\n",
        "            driver.record_ready(host, local_rank)\n            driver.meeting.wait()\n",
    )
    source.edit(
        RENDEZVOUS,
        "            super(RendezvousHandler, self)._put_value(scope, key, value)\n",
        "            super(RendezvousHandler, self)._put_value(scope, key, value)\n"
        "            rank = key.rpartition('_')[2]  # Gloo's keys are rank_1 and 1\n"
        "            if scope == 'global' and rank.isdigit():\n"
        "                driver.meeting.come(int(rank))\n",
    )
