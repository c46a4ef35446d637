"""The hook that profiles some steps of a run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from horovod_lm.backend import Backend, Reduced
from horovod_lm.loop import Run
from horovod_lm.profiles import (
    SUMMARY,
    TRACE,
    Step,
    Trace,
    one_trace,
    read_timeline,
    summary,
    time_of_kinds,
)


class Profile:
    """Records `steps` on every rank; rank 0 writes the run's trace and `profile.json`. To be the
    last hook, so that a step that it begins after has ended, and one that it ends with too.

    `label` names the framework in the trace. `ideal`, called on every rank after the last step,
    measures the ms of each kind that this machine can't do without, if there are any.
    """

    every = 1

    def __init__(
        self,
        steps: range,
        folder: Path,
        backend: Backend,
        label: str,
        ideal: Callable[[], Mapping[str, float]],
    ) -> None:
        self._wanted, self._folder = steps, folder
        self._backend, self._label, self._ideal = backend, label, ideal
        self._recording: ExitStack | None = None
        self._steps: list[Step] = []

    def __call__(self, run: Run, reduced: Reduced) -> None:
        if self._recording is not None:
            self._steps.append(Step(run.step, *run.clock.span))
            if run.stopped:  # whoever sent the signal waits for the checkpoint, not for this
                self.close()
            elif run.last or run.step + 1 not in self._wanted:
                with run.clock.pause():
                    self._write(run)
        elif run.step + 1 == self._wanted.start and not run.last:
            with run.clock.pause():
                with run.guard():
                    self._begin(run)
                # Ranks need different times for this, and shouldn't wait for it in the step.
                run.communicator.barrier()

    def close(self) -> None:
        """Stop recording, if a run ends before the last of the steps."""
        if self._recording is not None:
            with suppress(Exception):
                self._recording.close()
            self._recording = None

    def _begin(self, run: Run) -> None:
        stack = self._recording = ExitStack()
        self._place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self._recorder = stack.enter_context(ExitStack())
        self._recorder.enter_context(self._backend.profile(self._place / "trace.json"))
        run.communicator.start_timeline(str(self._place / "timeline.json"))
        self._recorder.callback(run.communicator.stop_timeline)
        run.profiled = True

    def _write(self, run: Run) -> None:
        """Collective: put together what the ranks have."""
        communicator, steps = run.communicator, self._steps
        run.profiled = False
        kinds, data, ideal, timeline = "", b"", {}, None
        with run.guard():
            self._recorder.close()
            trace = Trace.read(self._place / "trace.json").within(steps)
            data, kinds = trace.pack(), json.dumps(time_of_kinds(trace, steps))
            if communicator.rank == 0:
                timeline = read_timeline(self._place / "timeline.json").within(steps)
        times = communicator.allgather(kinds.encode())
        with run.guard():  # on all ranks at once, as they share the machine in a step
            ideal = dict(self._ideal())
        traces = communicator.allgather(data)
        self.close()
        if communicator.rank == 0 and all(times) and not run.trouble:
            with run.guard():
                values = summary([json.loads(t) for t in times], steps, ideal)
                text = json.dumps(values, indent=1) + "\n"
                (self._folder / SUMMARY).write_text(text, encoding="utf-8")
                ranks = [Trace.unpack(part) for part in traces]
                one_trace(self._label, ranks, steps, timeline).write(self._folder / TRACE)
