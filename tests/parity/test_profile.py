"""The frameworks' own profilers, read into the same kinds."""

from __future__ import annotations

import time

import numpy as np
import pytest

from horovod_lm.backend import EngineSettings, EngineState
from horovod_lm.profiles import KINDS, OVERHEAD, Step, Trace, time_of_kinds, trace_of
from horovod_lm.spec import ModelSpec
from tests.parity.conftest import micro_batch, starting_weights

# Large enough for operations to take longer than the calls around them.
SPEC = ModelSpec(vocabulary=512, context=128, width=64, layers=2, heads=4)
COMPUTED = KINDS[:8]  # what one rank must do: all but communication, copies and overhead
BACKENDS = ("torch", "tensorflow")
BOOKKEEPING = {
    "torch": "_local_scalar_dense _unsafe_view alias as_strided empty empty_like empty_strided "
    "expand item lift_fresh matmul narrow ones_like permute reshape resolve_conj resolve_neg "
    "select slice split t to transpose unbind unsqueeze view",
    "tensorflow": "ReadVariableOp",
}


def steps_of(engine, count, path=None, backend=None):
    """`count` steps after the first two, profiled if there is a path: their times."""
    micro = micro_batch(SPEC)
    engine.load_state(EngineState(starting_weights(SPEC)))

    def run(numbers):
        found = []
        for number in numbers:
            begin = time.time_ns()
            engine.forward_backward(micro, number, 1.0)
            engine.reduce_gradients()
            engine.apply_gradients(1e-3, 1.0)
            found.append(Step(number, begin, time.time_ns()))
        return found

    run(range(2))
    if path is None:
        return run(range(2, 2 + count))
    with backend.profile(path):
        return run(range(2, 2 + count))


@pytest.fixture(scope="module")
def taken(backends, tmp_path_factory):
    """By backend and precision: the engine, the steps and the trace of a profile."""
    done = {}

    def take(name, precision):
        if (name, precision) not in done:
            backend, communicator = backends[BACKENDS.index(name)]
            engine = backend.engine(SPEC, EngineSettings(precision, seed=3), communicator)
            path = tmp_path_factory.mktemp("profile") / "trace.json.gz"
            steps = steps_of(engine, 3, path, backend)
            done[name, precision] = engine, steps, Trace.read(path)
        return done[name, precision]

    return take


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_kinds_add_up_to_the_step_and_none_is_missing(taken, name, precision):
    _, steps, trace = taken(name, precision)
    for step, times in zip(steps, time_of_kinds(trace, steps), strict=True):
        assert sum(times.values()) == pytest.approx((step.end - step.begin) / 1e6)
        assert all(times[kind] > 0 for kind in COMPUTED), times
        assert times[OVERHEAD] < 0.9 * sum(times.values()), times


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BACKENDS)
def test_what_has_no_kind_touches_no_element(taken, name, precision):
    _, _, trace = taken(name, precision)
    names = {row["name"] for row in trace.rows if row.get("cat") == "bookkeeping"}
    assert {n.removeprefix("aten::") for n in names} - set(BOOKKEEPING[name].split()) == set()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_profiled_step_does_what_any_step_does(taken, backends, name):
    engine, _, _ = taken(name, "fp32")
    profiled = engine.state()
    steps_of(engine, 3)
    plain = engine.state()
    for key, weights in plain.weights.items():
        np.testing.assert_array_equal(weights, profiled.weights[key], err_msg=key)


# As Kineto writes it for a step on a GPU, as far as it is read.
def kineto(category, name, begin, length, thread=1, **args):
    times = {"ts": 5e6 + begin, "dur": length}
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 1,
        "tid": thread,
        "args": args,
        **times,
    }


def test_kernels_are_of_the_kind_of_the_operation_that_launched_them():
    from torch_backend.profiler import _events

    rows = [
        kineto("user_annotation", "attention", 0, 40),
        kineto("cpu_op", "aten::matmul", 5, 30, **{"External id": 1}),
        kineto("cpu_op", "aten::bmm", 10, 20, **{"External id": 2, "Sequence number": 9}),
        kineto("cpu_op", "BmmBackward0", 60, 20, 2, **{"Sequence number": 9, "Fwd thread id": 1}),
        kineto("cpu_op", "aten::div", 65, 10, 2, **{"External id": 3, "Sequence number": 9}),
        kineto("cuda_runtime", "cudaLaunchKernel", 12, 2, **{"External id": 2}),
        kineto("kernel", "gemm", 20, 30, 7, **{"External id": 2, "stream": 7}),
        kineto("gpu_memcpy", "Memcpy HtoD", 60, 5, 7, **{"External id": 77, "stream": 7}),
        kineto("kernel", "vectorized", 70, 25, 7, **{"External id": 3, "stream": 7}),
        {"ph": "M", "name": "process_name", "pid": 1, "args": {}},
    ]
    events = _events({"baseTimeNanoseconds": 1_700_000_000_000_000_000, "traceEvents": rows})
    start = 1_700_000_005_000_000_000
    (times,) = time_of_kinds(trace_of(events), [Step(1, start, start + 100_000)])
    assert {kind: round(1e3 * ms) for kind, ms in times.items() if ms} == {
        "attention": 30 + 25,
        "copies": 5,
        OVERHEAD: 40,
    }
