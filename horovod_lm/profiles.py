"""Where the time of a step goes: operations of any framework sorted into the same few kinds, and
the traces of all ranks with Horovod's timeline in one file.

How time is counted. Every moment of a step belongs to the operations that run in it on this rank,
in equal parts where several threads compute at once; of operations inside each other to the
innermost. A moment in which none runs is framework overhead and waiting. So the kinds add up to the
step, and nothing is counted twice. With a device, its streams alone are looked at, and the
communication that no kernel covers.

How operations are sorted: by what they lie inside of, then by their name. All that happens inside
the attention is attention; but products of two matrices are matrix products wherever they are:
those of the linear layers, the attention's four and the output layer's. So "attention" has the
batched products, and "loss" is what the output layer and its loss do beside the products.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OVERHEAD = "framework overhead and waiting"
KINDS = (
    "matrix products",
    "attention",
    "norms",
    "activations",
    "loss",
    "embedding",
    "dropout",
    "optimizer",
    "communication",
    "copies",
    OVERHEAD,
)
MAIN = "main"  # the thread that drives the step
TRACE, SUMMARY = "trace.json.gz", "profile.json"  # in a run's folder

# Layers and functions by the words that the backends' scopes and the frameworks' own wrappers use.
_SCOPES = {
    "matrix products": ("linear", "up", "gate", "down", "output", "addmm", "mm"),
    "attention": ("attention", "cross_attention", "rotate", "bydistance"),
    "norms": (
        *("norm", "attention_norm", "cross_attention_norm", "feed_forward_norm"),
        *("nativelayernorm", "rmsnorm"),
    ),
    "activations": ("activation", "gelu", "relu", "silu"),
    "loss": ("loss", "headloss"),
    "embedding": ("embeddings", "embedding"),
    "dropout": ("dropout",),
    "optimizer": ("optimizer",),
    "communication": ("communication",),
    "copies": ("accumulategrad",),
}
_OF_SCOPE = {word: kind for kind, words in _SCOPES.items() for word in words}

# Names of operations in lower case, torch's without "aten::".
_PRODUCT = re.compile(r"mm|addmm_?|mkldnn::_linear_pointwise|_?(mkl)?(native)?_?(fused)?matmul")
_NAMES = [
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"bmm|batchmatmul|softmax|attention", "attention"),
        (r"allreduce|horovod|nccl", "communication"),
        (r"adamw?_|l2loss", "optimizer"),
        (r"layer_?norm", "norms"),
        (r"gelu|erf|relu|threshold_backward|silu|sigmoid", "activations"),
        (r"embedding|gatherv2|index_add|segmentsum", "embedding"),
        (r"dropout|xor|greaterequal|^ge$", "dropout"),
        (r"nll|cross_?entropy|^log$|gathernd|scatter", "loss"),
        (
            r"copy|clone|transpose|cat(v2)?$|concat|pack|stack|slice|cast|fill|zero|memset|memcpy|"
            r"identity|const|^pad",
            "copies",
        ),
        (
            r"add|mul|sub|div|neg|^exp|sqrt|square|pow|sum|mean|max|min|select|where|reduce|tanh|"
            r"fusion|elementwise",
            "activations",
        ),
    )
]
# What torch does without touching an element.
_VIEW = re.compile(
    r"aten::(_?reshape(_alias)?|view|_unsafe_view|as_strided|expand|select|slice|split|chunk|unbind"
    r"|transpose|permute|t|narrow|alias|detach_?|(un)?squeeze|empty\w*|resolve_\w+|to|item"
    r"|_local_scalar_dense|result_type|matmul|set_|lift_fresh)"
)


@dataclass(frozen=True, eq=False)
class Event:
    """What a framework's profiler saw: `begin` and `end` in ns since the Unix epoch, on a `thread`
    (MAIN, or any label; of a device a stream's), of an `operation`, or else of something that
    encloses operations. `scopes`, outermost first, are the layers and functions that the framework
    itself ascribes it to; `launcher` is the event that a device's operation came from."""

    name: str
    thread: str
    begin: int
    end: int
    operation: bool = True
    scopes: tuple[str, ...] = ()
    device: bool = False
    launcher: Event | None = None


def _scope_kind(name: str) -> str | None:
    """The kind of a scope, without what frameworks put around its word: "_GeluBackward0" is gelu,
    "attention_2" is attention."""
    word = re.split(r"::|: ", name)[-1].lower().lstrip("_")
    return _OF_SCOPE.get(re.sub(r"(backward)?(_?\d+)?$", "", word))


def _inside(kind: str | None, name: str) -> str | None:
    """The kind of what lies in the scope `name`, itself inside of `kind`."""
    own = _scope_kind(name)
    if own is None or (kind == "attention" and own != "matrix products"):
        return kind
    return own


def kind_of(name: str, inside: str | None = None) -> str | None:
    """The kind of an operation from its name and the kind of what it lies in; None if it is mere
    bookkeeping, such as a view."""
    if _VIEW.fullmatch(name):
        return None
    name = name.removeprefix("aten::").lower()
    if _PRODUCT.fullmatch(name):
        return "matrix products"
    if inside is not None:
        return inside
    return next((kind for pattern, kind in _NAMES if pattern.search(name)), None)


def kinds_of(events: Sequence[Event]) -> list[str | None]:
    """Each event's kind. None for bookkeeping, and for all that only encloses operations, but for
    communication, to which its waiting belongs.

    An event with no other around it on its own thread lies in what the main thread is in then.
    """
    threads: dict[str, list[int]] = defaultdict(list)
    for index, event in enumerate(events):
        threads[event.thread].append(index)
    kinds: list[str | None] = [None] * len(events)
    within: dict[int, str | None] = {}  # by id of the event
    around: list[tuple[int, int, str]] = []  # of the main thread, by begin
    for thread in sorted(threads, key=lambda name: name != MAIN):
        stack: list[Event] = []
        for index in sorted(threads[thread], key=lambda i: (events[i].begin, -events[i].end)):
            event = events[index]
            while stack and stack[-1].end <= event.begin:
                stack.pop()
            if event.launcher is not None:
                inside = within[id(event.launcher)]
            else:
                inside = within[id(stack[-1])] if stack else _at(around, event.begin)
            for scope in event.scopes:
                inside = _inside(inside, scope)
            if event.operation:
                kinds[index] = kind_of(event.name, inside)
                inside = kinds[index] or inside
            else:
                inside = _inside(inside, event.name)
                if _scope_kind(event.name) == "communication":
                    kinds[index] = "communication"
            within[id(event)] = inside
            if thread == MAIN and inside is not None and not event.operation:
                around.append((event.begin, event.end, inside))
            stack.append(event)
    return kinds


def _at(around: list[tuple[int, int, str]], moment: int) -> str | None:
    """The kind of the innermost of these spans at a moment."""
    index = bisect_right(around, moment, key=lambda span: span[0])
    return next((kind for _, end, kind in reversed(around[:index]) if end > moment), None)


@dataclass(frozen=True)
class Step:
    """A profiled step: its number, begin and end in ns since the Unix epoch."""

    number: int
    begin: int
    end: int


@dataclass(frozen=True)
class Trace:
    """One process's trace: rows as Chrome's trace event format has them, with times in µs after
    `base`, which is in ns since the Unix epoch."""

    base: int
    rows: list[dict[str, Any]]

    def pack(self) -> bytes:
        """It as a file that viewers open: JSON, compressed by gzip."""
        values = {
            "displayTimeUnit": "ms",
            "baseTimeNanoseconds": self.base,
            "traceEvents": self.rows,
        }
        return gzip.compress(json.dumps(values, separators=(",", ":")).encode(), 6, mtime=0)

    @classmethod
    def unpack(cls, data: bytes) -> Trace:
        """From what `pack` gave."""
        values = json.loads(gzip.decompress(data))
        return cls(values["baseTimeNanoseconds"], values["traceEvents"])

    def write(self, path: Path) -> None:
        """Write it to a file, compressed."""
        path.write_bytes(self.pack())

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read what `write` wrote."""
        return cls.unpack(path.read_bytes())

    def within(self, steps: Sequence[Step]) -> Trace:
        """Only what happened from the first step's begin to the last one's end."""
        begin, end = ((moment - self.base) / 1e3 for moment in (steps[0].begin, steps[-1].end))
        rows = [
            row
            for row in self.rows
            if "ts" not in row or (row["ts"] <= end and row["ts"] + row.get("dur", 0) >= begin)
        ]
        return Trace(self.base, rows)


def trace_of(events: Sequence[Event]) -> Trace:
    """The trace of one process's events, each with its kind as its category."""
    base = min((event.begin for event in events), default=0)
    threads = {name: i for i, name in enumerate(dict.fromkeys(e.thread for e in events))}
    rows = [_named("thread_name", 0, i, name) for name, i in threads.items()]
    for event, kind in zip(events, kinds_of(events), strict=True):
        row: dict[str, Any] = {
            "ph": "X",
            "name": event.name,
            "cat": kind or ("bookkeeping" if event.operation else "scope"),
            "pid": 0,
            "tid": threads[event.thread],
            "ts": (event.begin - base) / 1e3,
            "dur": (event.end - event.begin) / 1e3,
            "args": {"scope": "/".join(event.scopes)} if event.scopes else {},
        }
        if event.device:
            row["args"]["device"] = True
        rows.append(row)
    return Trace(base, rows)


def time_of_kinds(trace: Trace, steps: Sequence[Step]) -> list[dict[str, float]]:
    """For each step the ms of each kind, which add up to the step; see the top of this file."""
    rows = [row for row in trace.rows if row["ph"] == "X"]
    device = any(row["args"].get("device") for row in rows)
    threads: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for row in rows:
        kind = row["cat"]
        if kind in KINDS and (row["args"].get("device") or not device or kind == "communication"):
            begin = trace.base + round(row["ts"] * 1e3)
            threads[row["tid"]].append((begin, begin + round(row["dur"] * 1e3), kind))
    changes: list[tuple[int, int, str]] = []
    for spans in threads.values():
        for begin, end, present in _innermost(spans):
            changes += [(begin, 1, present), (end, -1, present)]
    changes.sort()
    return list(_shares(changes, steps))


def _innermost(spans: list[tuple[int, int, str]]) -> Iterable[tuple[int, int, str]]:
    """The spans of one thread's operations, each without those inside of it."""
    stack: list[tuple[int, str]] = []
    cursor = 0
    for begin, end, kind in [*sorted(spans, key=lambda s: (s[0], -s[1])), (2**63, 2**63, "")]:
        while stack and stack[-1][0] <= begin:
            last, present = stack.pop()
            if last > cursor:
                yield cursor, last, present
            cursor = max(cursor, last)
        if stack and begin > cursor:
            yield cursor, begin, stack[-1][1]
        cursor = max(cursor, begin)
        stack.append((end, kind))


def _shares(
    changes: list[tuple[int, int, str]], steps: Sequence[Step]
) -> Iterator[dict[str, float]]:
    """The ms of each kind within each step; `changes` say when one more or one less runs."""
    running: Counter[str] = Counter()
    index = 0
    for step in steps:
        spent = dict.fromkeys(KINDS, 0.0)
        cursor = step.begin
        while cursor < step.end:
            moment = changes[index][0] if index < len(changes) else step.end
            until = min(moment, step.end)
            if until > cursor:
                count = running.total()
                for present, number in running.items():
                    spent[present] += (until - cursor) * number / count
                if not count:
                    spent[OVERHEAD] += until - cursor
                cursor = until
            if moment < step.end:
                _, change, kind = changes[index]
                running[kind] += change
                if not running[kind]:
                    del running[kind]
                index += 1
        yield {kind: ns / 1e6 for kind, ns in spent.items()}


def summary(
    ranks: Sequence[Sequence[Mapping[str, float]]],
    steps: Sequence[Step],
    ideal: Mapping[str, float],
) -> dict[str, Any]:
    """`profile.json`: the mean over ranks and steps of each kind's ms, its share of the step, and
    `ideal` ms over its own, where there are any."""
    rows = list(itertools.chain(*ranks))
    mean = {kind: sum(row[kind] for row in rows) / len(rows) for kind in KINDS}
    whole = sum(mean.values())
    kinds = {
        kind: {
            "ms": round(ms, 3),
            "share": round(ms / whole, 4),
            "ceiling_share": round(ideal[kind] / ms, 4) if ms and ideal.get(kind) else None,
        }
        for kind, ms in mean.items()
    }
    return {
        "schema": 1,
        "steps": [steps[0].number, steps[-1].number],
        "ranks": len(ranks),
        "step_ms": round(whole, 3),
        "kinds": kinds,
    }


def read_timeline(path: Path) -> Trace:
    """Horovod's timeline, which a thread of its own writes to the end. Its clock starts at a time
    that it names."""
    for _ in range(200):
        text = path.read_text(encoding="utf-8").rstrip()
        if text.endswith("]"):
            break
        time.sleep(0.01)
    rows = json.loads(text if text.endswith("]") else text.rstrip(",") + "]")
    starts = [row["args"].pop("start_time_since_epoch_in_micros", 0) for row in rows[:1]]
    return Trace(1000 * sum(starts), rows)


def one_trace(
    label: str, ranks: Sequence[Trace], steps: Sequence[Step], timeline: Trace | None
) -> Trace:
    """A run's trace: a process for each rank, named as "rank 1 PyTorch" where `label` is PyTorch;
    one for Horovod's timeline, in which each tensor is a thread; and a row of the steps."""
    base = steps[0].begin
    rows = [_named("process_name", 0, 0, f"{label} steps"), _order(0)]
    for step in steps:
        length = (step.end - step.begin) / 1e3
        rows.append(
            {"ph": "X", "name": f"step {step.number}", "cat": "step", "pid": 0, "tid": 0}
            | {"ts": (step.begin - base) / 1e3, "dur": length, "args": {}}
        )
    for rank, trace in enumerate(ranks):
        pid = rank + 1
        rows += [_named("process_name", pid, 0, f"rank {rank} {label}"), _order(pid)]
        rows += [_moved(row, trace.base - base, pid, row["tid"]) for row in trace.rows]
    if timeline is not None:
        pid = len(ranks) + 1
        rows += [_named("process_name", pid, 0, f"Horovod under {label}"), _order(pid)]
        for row in timeline.rows:
            if row["ph"] == "M":
                name = row["args"].get("name")
                if name:
                    rows.append(_named("thread_name", pid, row["pid"], name))
            else:
                rows.append(_moved(row, timeline.base - base, pid, row["pid"]))
    return Trace(base, rows)


def merge_traces(paths: Sequence[Path], labels: Sequence[str], output: Path) -> None:
    """Write the traces of several runs into one file, their first profiled steps aligned at zero,
    so that they are seen side by side. `labels` are put before the names of their processes."""
    rows: list[dict[str, Any]] = []
    first = 0
    for path, label in zip(paths, labels, strict=True):
        pids = {0}
        for row in Trace.read(path).rows:
            moved = {**row, "pid": first + row["pid"]}
            pids.add(row["pid"])
            if row.get("name") == "process_name":
                moved["args"] = {"name": f"{label}: {row['args']['name']}"}
            if row.get("name") == "process_sort_index":
                moved["args"] = {"sort_index": moved["pid"]}
            rows.append(moved)
        first += max(pids) + 1
    Trace(0, rows).write(output)


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _order(pid: int) -> dict[str, Any]:
    return {
        "ph": "M",
        "name": "process_sort_index",
        "pid": pid,
        "tid": 0,
        "args": {"sort_index": pid},
    }


def _moved(row: dict[str, Any], later: int, pid: int, tid: int) -> dict[str, Any]:
    """A row in another process, `later` ns later."""
    moved = {**row, "pid": pid, "tid": tid}
    if "ts" in row:
        moved["ts"] = round(row["ts"] + later / 1e3, 3)
    return moved
