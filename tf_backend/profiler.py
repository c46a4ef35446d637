"""What TensorFlow's own profiler sees, in the words of `horovod_lm.profiles`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tensorflow as tf

from horovod_lm.profiles import MAIN, Event, trace_of

_GRAPH_OPERATION = re.compile(r"(?P<path>[^: ]+):(?P<type>_?[A-Z]\w*)")
_EAGER_OPERATION = re.compile(r"EagerLocalExecute: (?P<type>_?[A-Z]\w*)")


@contextmanager
def scope(name: str) -> Iterator[None]:
    """A layer or part of a step by a word of `horovod_lm.profiles`; also a decorator. In a graph
    it becomes part of the operations' names, which costs nothing."""
    with tf.name_scope(name), tf.profiler.experimental.Trace(name):
        yield


@contextmanager
def profile(path: Path) -> Iterator[None]:
    """Record what happens inside and write it to `path` as a trace of this process."""
    # Imported only here: they are TensorFlow's own copies, of which another version may say where.
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with tempfile.TemporaryDirectory() as folder:
        options = tf.profiler.experimental.ProfilerOptions(python_tracer_level=0)
        tf.profiler.experimental.start(folder, options)
        try:
            yield
        finally:
            tf.profiler.experimental.stop()
        space = xplane_pb2.XSpace()
        space.ParseFromString(next(Path(folder).rglob("*.xplane.pb")).read_bytes())
    trace_of(_events(space)).write(path)


def _events(space) -> list[Event]:
    """TensorFlow's XSpace as events. Operations of graphs and single ones are known by the form of
    their names, XLA's by the module that they are said to belong to; all else encloses them."""
    times = {p.name: _values(p, p.stats) for p in space.planes}
    start = times["Task Environment"]["profile_start_time"]
    layers = _xla_layers(space)
    events, tasks, ends = [], [], {}
    (host,) = (plane for plane in space.planes if plane.name == "/host:CPU")
    names = {key: metadata.name for key, metadata in host.event_metadata.items()}
    main = _main_line(host, names)
    for line in host.lines:
        # Threads of one pool have one name; the number keeps them apart.
        pool = line.name.partition("/")[0] or f"thread {line.id}"
        thread = MAIN if line is main else f"{pool} {len(events)}"
        for row in line.events:
            name = names[row.metadata_id]
            begin = start + line.timestamp_ns + row.offset_ps // 1000
            end = begin + row.duration_ps // 1000
            values = _values(host, row.stats)
            if "hlo_op" in values:
                tasks.append((begin, end, values))
            elif name.startswith("end: "):
                ends[values.get("_c")] = begin
            elif row.duration_ps:
                events.append(_host_event(name, thread, begin, end))
    return events + _xla_events(tasks, ends, layers)


def _values(plane, stats) -> dict:
    """Statistics by name."""
    values = {}
    for stat in stats:
        kind = stat.WhichOneof("value")
        value = getattr(stat, kind)
        if kind == "ref_value":
            value = plane.stat_metadata[value].name
        values[plane.stat_metadata[stat.metadata_id].name] = value
    return values


def _main_line(host, names):
    """The thread that drives the step: the one that calls operations from Python."""
    calls = {key for key, name in names.items() if name == "EagerExecute"}
    return max(host.lines, key=lambda line: sum(e.metadata_id in calls for e in line.events))


def _host_event(name: str, thread: str, begin: int, end: int) -> Event:
    found = _GRAPH_OPERATION.fullmatch(name) or _EAGER_OPERATION.fullmatch(name)
    if found is None:
        return Event(name, thread, begin, end, operation=False)
    scopes = tuple(found.groupdict().get("path", "").split("/")[:-1])
    return Event(found["type"], thread, begin, end, scopes=scopes)


def _xla_layers(space) -> dict[tuple[str, str], tuple[str, tuple[str, ...]]]:
    """By XLA module and instruction: the type of the operation that it was made of, and the layers
    in its name. A fusion is known by its last operation, a part of a sum by who adds it up."""
    from tensorflow.compiler.xla.service import hlo_pb2

    layers = {}
    for plane in space.planes:
        if plane.name != "/host:metadata":
            continue
        for stat in (stat for m in plane.event_metadata.values() for stat in m.stats):
            module = hlo_pb2.HloProto.FromString(stat.bytes_value).hlo_module
            inner = {computation.id: computation for computation in module.computations}
            for computation in module.computations:
                users = {i: user for user in computation.instructions for i in user.operand_ids}
                for instruction in computation.instructions:
                    found = _metadata(instruction, inner) or (
                        instruction.id in users and _metadata(users[instruction.id], inner)
                    )
                    layers[module.name, instruction.name] = (
                        (found.op_type, tuple(found.op_name.split("/")[:-1]))
                        if found
                        else (instruction.opcode, ())
                    )
    return layers


def _metadata(instruction, inner):
    """An instruction's metadata, or else that of the last one with any inside of it, or None."""
    called = (inner[number] for number in instruction.called_computation_ids)
    inside = (other for computation in called for other in reversed(computation.instructions))
    return next((i.metadata for i in (instruction, *inside) if i.metadata.op_name), None)


def _xla_events(tasks, ends, layers) -> list[Event]:
    """XLA's tasks. One may be done long after the call that begins it returns, while its thread
    goes on to others, so they are laid on as many rows as run at once."""
    events, rows = [], []
    for begin, end, values in sorted(tasks, key=lambda task: task[0]):
        end = max(end, ends.get(values.get("_p"), end))
        row = next((i for i, until in enumerate(rows) if until <= begin), len(rows))
        rows[row : row + 1] = [end]
        module, name = values["hlo_module"], values["hlo_op"]
        kind, scopes = layers.get((module, name), (name, ()))
        events.append(Event(kind, f"XLA {row}", begin, end, scopes=scopes))
    return events
