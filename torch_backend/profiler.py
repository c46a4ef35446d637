"""What PyTorch's own profiler sees, in the words of `horovod_lm.profiles`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from horovod_lm.profiles import MAIN, Event, trace_of

_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_recording = False


@contextmanager
def scope(name: str) -> Iterator[None]:
    """A layer or part of a step by a word of `horovod_lm.profiles`, while a profile is recorded;
    also a decorator."""
    if _recording:
        with record_function(name):
            yield
    else:
        yield


@contextmanager
def profile(path: Path) -> Iterator[None]:
    """Record what happens inside and write it to `path` as a trace of this process."""
    global _recording
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    recorder = torch.profiler.profile(activities=activities)
    recorder.start()
    _recording = True
    try:
        yield
    finally:
        _recording = False
        recorder.stop()
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(exported))
        trace_of(_events(json.loads(exported.read_bytes()))).write(path)


def _events(trace: dict) -> list[Event]:
    """Kineto's trace as events. Names with a namespace of operators are operations; nodes of
    autograd, our own functions and records only enclose them. A node of autograd is given the
    scopes that the operation of the forward had which it belongs to, known by its number."""
    base = trace["baseTimeNanoseconds"]
    rows = [row for row in trace["traceEvents"] if row["ph"] == "X"]
    host = [r for r in rows if r["cat"] in ("cpu_op", "user_annotation")]
    host.sort(key=lambda row: (row["ts"], -row["dur"]))
    main = next((row["tid"] for row in host if row["name"].startswith("aten::")), None)
    events, stack, forward, launchers = [], [], {}, {}
    for row in host:
        while stack and stack[-1][0] <= row["ts"]:
            stack.pop()
        args = row.get("args", {})
        number, scopes = args.get("Sequence number"), ()
        if number is not None and not row["name"].startswith("autograd::"):
            if args.get("Fwd thread id"):
                scopes = forward.get(number, ())
            else:
                forward[number] = tuple(name for _, name in stack)
        thread = MAIN if row["tid"] == main else f"thread {row['tid']}"
        event = _event(row, base, thread, _is_operation(row["name"]), scopes)
        stack.append((row["ts"] + row["dur"], row["name"]))
        launchers[args.get("External id")] = event
        events.append(event)
    for row in rows:
        if row["cat"] in _DEVICE:
            launcher = launchers.get(row["args"].get("External id"))
            stream = f"stream {row['args'].get('stream')}"
            events.append(_event(row, base, stream, True, (), launcher))
    return events


def _is_operation(name: str) -> bool:
    return "::" in name and not name.startswith(("autograd::", "torch::autograd::"))


def _event(row, base, thread, operation, scopes, launcher=None) -> Event:
    begin = base + round(row["ts"] * 1e3)
    end = begin + round(row["dur"] * 1e3)
    device = row["cat"] in _DEVICE
    return Event(row["name"], thread, begin, end, operation, scopes, device, launcher)
