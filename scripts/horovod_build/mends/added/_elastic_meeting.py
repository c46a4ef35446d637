"""The meeting of an elastic job's new workers with those that it goes on with."""

import logging
import threading
import time

from horovod.runner.elastic import constants

STARTING_SECONDS = 30  # at least, as without meetings: Gloo waits that long
ENDING_SECONDS = 30  # for workers that are told to end


class Meeting:
    """Brings workers together for `driver`, after a reset that has started new ones.

    Workers meet over Gloo, where each waits for the others for HOROVOD_GLOO_TIMEOUT_SECONDS and
    then aborts. New ones need longer where their programs start slowly, and some fail before they
    come. So whoever asks for its rank is kept waiting until all new workers have come, and these
    until the last of them has. If one fails meanwhile, its host is given up, as after any failure,
    and the meeting begins anew with whom is left.

    The first meeting of a job has nobody to go on with and is left alone.
    """

    def __init__(self, driver):
        self._driver = driver
        self._changed = threading.Condition(threading.RLock())
        self._number = 0
        self._end = {}  # of each new worker: the event that ends it
        self._awaited = set()  # new workers that have not come yet
        self._ending = set()  # workers that were told to end
        self._deadline = None

    def __enter__(self):
        """Keeps the meeting as it is while the driver assigns ranks and starts workers."""
        self._changed.acquire()

    def __exit__(self, *exception):
        self._changed.release()

    def begin(self, slots):
        """New workers are about to be started on `slots`."""
        with self._changed:
            self._number += 1
            self._end = {_key(slot): threading.Event() for slot in slots}
            self._awaited = set(self._end) if self._number > 1 else set()
            self._deadline = time.monotonic() + max(self._driver._timeout, STARTING_SECONDS)

    def end_of(self, slot):
        """The event that ends the new worker on `slot`."""
        return self._end[_key(slot)]

    def wait(self):
        """Returns when all new workers have come."""
        with self._changed:
            while self._going_on():
                self._changed.wait(1)
                if self._awaited and time.monotonic() > self._deadline:
                    late = sorted(self._awaited)
                    logging.error("new workers have not come in time: %s", late)
                    self._begin_anew(late[0], ended=False)

    def come(self, rank):
        """The worker of this rank has come. Returns when all new ones have, or it has to go."""
        with self._changed:
            slot = self._driver._rank_assignments.get(rank)
            number = self._number
            if slot is not None:
                self._awaited.discard(_key(slot))
            self._changed.notify_all()
            while self._number == number and self._going_on():
                self._changed.wait(1)

    def ended(self, slot):
        """Takes note that the worker on `slot` has ended; whether that is all there is to do."""
        key = _key(slot)
        with self._changed:
            if key in self._ending:
                self._ending.discard(key)
                self._changed.notify_all()
                return True
            if not self._going_on():
                return False
            if not self._driver._host_manager.is_blacklisted(slot.hostname):
                self._begin_anew(key, ended=True)
            return True

    def _going_on(self):
        return bool(self._awaited) and not self._driver.finished()

    def _begin_anew(self, failed, ended):
        """Gives up the host of the worker `failed`, and starts the new workers again elsewhere: they
        have been told a size and a rank that are no longer right."""
        driver = self._driver
        driver._host_manager.blacklist(failed[0])
        self._ending = {key for key in self._end if key != failed or not ended}
        for key in self._ending:
            self._end[key].set()
        stayed = {
            host: [slot for slot in slots if _key(slot) not in self._end]
            for host, slots in driver._host_assignments.items()
            if not driver._host_manager.is_blacklisted(host)
        }
        stayed = {host: slots for host, slots in stayed.items() if slots}
        end = time.monotonic() + ENDING_SECONDS
        while self._ending and time.monotonic() < end:
            self._changed.wait(1)
        registry = driver._worker_registry
        registry._reset_count += 1
        limit = registry._reset_limit
        if not stayed or self._ending:
            why = (
                "no worker is left that knows the state"
                if not stayed
                else (f"workers that were told to end have not: {sorted(self._ending)}")
            )
            driver.stop(error_message=f"After the failure of {failed[0]}[{failed[1]}] {why}.")
        elif limit is not None and registry._reset_count > limit:
            driver.stop(error_message=constants.RESET_LIMIT_EXCEEDED_MESSAGE.format(limit))
        else:
            driver._host_assignments = stayed
            try:
                driver._activate_workers(driver._min_num_proc)
            except Exception as error:
                logging.exception("failed to activate new hosts -> stop running")
                driver.stop(error_message=str(error))
        self._changed.notify_all()


def _key(slot):
    return slot.hostname, slot.local_rank
