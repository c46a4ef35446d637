"""Operations sorted into kinds, time that adds up, and traces in one file, without a framework."""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from horovod_lm.backend import Loss, MicroBatch
from horovod_lm.bench.tools import products_of
from horovod_lm.ceilings import (
    Sizes,
    bytes_per_token,
    ideal_times,
    optimizer_bytes,
)
from horovod_lm.config import make_config
from horovod_lm.errors import UserError
from horovod_lm.hooks import Metrics
from horovod_lm.loop import train_steps
from horovod_lm.profiler import Profile
from horovod_lm.profiles import (
    KINDS,
    MAIN,
    OVERHEAD,
    Event,
    Step,
    Trace,
    kind_of,
    kinds_of,
    merge_traces,
    one_trace,
    read_timeline,
    summary,
    time_of_kinds,
    trace_of,
)
from horovod_lm.spec import ModelSpec
from tests.helpers import on_ranks
from tests.unit.test_loop import make_run

DAY = 1_700_000_000_000_000_000  # any time since the epoch, in ns


def event(name, begin, end, thread=MAIN, **options):
    return Event(name, thread, DAY + begin, DAY + end, **options)


def scope(name, begin, end, thread=MAIN, **options):
    return event(name, begin, end, thread, operation=False, **options)


def time_of(events, begin, end):
    """The kinds of a step that take time, in ns."""
    (times,) = time_of_kinds(trace_of(events), [Step(7, DAY + begin, DAY + end)])
    assert list(times) == list(KINDS)
    assert math.fsum(times.values()) == pytest.approx((end - begin) / 1e6)
    return {kind: round(1e6 * ms) for kind, ms in times.items() if ms}


def test_a_moment_belongs_to_the_innermost_operation_and_what_is_left_is_overhead():
    events = [
        scope("_HeadLoss", 0, 1000),
        event("aten::mm", 100, 400),
        event("aten::exp_", 500, 700),
        event("aten::fill_", 600, 650),
        event("aten::view", 800, 900),
    ]
    assert time_of(events, 0, 1000) == {"matrix products": 300, "loss": 200, OVERHEAD: 500}


def test_what_a_framework_calls_inside_of_an_operation_takes_nothing_from_it():
    events = [
        scope("communication", 0, 900),
        event("HorovodAllreduce", 100, 800),
        scope("KernelAndDeviceFunc::Run", 150, 750),
        event("aten::empty", 810, 820),
    ]
    assert time_of(events, 0, 1000) == {"communication": 900, OVERHEAD: 100}


def test_threads_that_compute_at_once_share_the_moment():
    events = [
        event("MatMul", 0, 600, "XLA 0"),
        event("Exp", 300, 900, "XLA 1"),
        scope("EagerExecute", 0, 1000),
    ]
    assert time_of(events, 0, 1000) == {
        "matrix products": 300 + 150,
        "activations": 300 + 150,
        OVERHEAD: 100,
    }


def test_only_the_time_inside_of_the_step_counts():
    events = [event("aten::mm", 0, 100), event("aten::mm", 190, 400)]
    assert time_of(events, 50, 300) == {"matrix products": 50 + 110, OVERHEAD: 90}


def test_an_operation_may_reach_over_several_steps():
    trace = trace_of([event("aten::mm", 0, 250), event("aten::copy_", 320, 330)])
    steps = [Step(n, DAY + 100 * n, DAY + 100 * n + 90) for n in range(5)]
    times = time_of_kinds(trace, steps)
    assert [round(1e6 * t["matrix products"]) for t in times] == [90, 90, 50, 0, 0]
    assert [round(1e6 * t["copies"]) for t in times] == [0, 0, 0, 10, 0]
    assert [round(1e6 * sum(t.values())) for t in times] == [90] * 5


def test_waiting_for_other_ranks_is_communication():
    events = [scope("optimizer", 0, 900), scope("communication", 100, 600)]
    events += [event("aten::mul_", 700, 800), event("aten::dot", 800, 850)]
    assert time_of(events, 0, 1000) == {"communication": 500, "optimizer": 150, OVERHEAD: 350}


def test_with_a_device_the_host_launches_and_does_not_compute():
    launch = event("aten::mm", 0, 100)
    inside = scope("_Attention", 100, 300)
    softmax = event("aten::_softmax", 120, 180)
    events = [
        launch,
        inside,
        softmax,
        event("gemm_kernel", 150, 550, "stream 7", device=True, launcher=launch),
        event("any_kernel", 600, 800, "stream 7", device=True, launcher=softmax),
        scope("communication", 700, 900),
    ]
    assert time_of(events, 0, 1000) == {
        "matrix products": 400,
        "attention": 100 + 50,
        "communication": 50 + 100,
        OVERHEAD: 300,
    }


# As PyTorch 2.13 and TensorFlow 2.21 call them.
@pytest.mark.parametrize(
    ("name", "inside", "kind"),
    [
        ("aten::mm", None, "matrix products"),
        ("aten::addmm_", "loss", "matrix products"),
        ("mkldnn::_linear_pointwise", "loss", "matrix products"),
        ("_MklNativeFusedMatMul", "attention", "matrix products"),
        ("MatMul", None, "matrix products"),
        ("aten::bmm", None, "attention"),
        ("_MklBatchMatMulV2", None, "attention"),
        ("aten::copy_", "attention", "attention"),
        ("aten::copy_", None, "copies"),
        ("ConcatV2", None, "copies"),
        ("aten::native_layer_norm_backward", None, "norms"),
        ("aten::gelu_backward", None, "activations"),
        ("aten::silu", None, "activations"),
        ("Sigmoid", None, "activations"),
        ("Erf", None, "activations"),
        ("aten::add", None, "activations"),
        ("aten::_fused_adamw_", None, "optimizer"),
        ("L2Loss", None, "optimizer"),
        ("UnsortedSegmentSum", None, "embedding"),
        ("HorovodAllreduce", None, "communication"),
        ("aten::dot", "optimizer", "optimizer"),
        ("aten::view", "attention", None),
        ("aten::select", None, None),
        ("NoSuchThing", None, None),
    ],
)
def test_the_kind_of_an_operation(name, inside, kind):
    assert kind_of(name, inside) == kind


@pytest.mark.parametrize(
    ("path", "name", "kind"),
    [
        ("transformer_1/decoder.0_1/attention_1/linear", "_MklMatMul", "matrix products"),
        ("gradient_tape/transformer_1/decoder.0_1/attention_1/linear", "Cast", "matrix products"),
        ("transformer_1/decoder.0_1/attention_1", "Softmax", "attention"),
        ("transformer_1/decoder.0_1/attention_1/dropout", "Mul", "attention"),
        ("transformer_1/decoder.3_1/attention_norm_1", "Mean", "norms"),
        ("transformer_1/decoder_1/3_1/cross_attention_norm_1", "Mean", "norms"),
        ("transformer_1/decoder_1/3_1/cross_attention_1", "Softmax", "attention"),
        ("transformer_1/decoder_1/3_1/feed_forward_1/gate_1", "BiasAdd", "matrix products"),
        ("transformer_1/decoder.3_1/dropout_1", "Mul", "dropout"),
        ("transformer_1/decoder.3_1", "AddV2", "activations"),
        ("transformer_1/embeddings_1", "AddV2", "embedding"),
        ("transformer_1/embeddings_1/norm_1", "Mean", "norms"),
        ("loss_1", "Exp", "loss"),
        ("activation_2", "Mul", "activations"),
    ],
)
def test_the_kind_of_an_operation_from_its_layers(path, name, kind):
    assert kinds_of([event(name, 0, 1, scopes=tuple(path.split("/")))]) == [kind]


def test_another_thread_works_for_what_the_main_thread_is_in():
    events = [
        scope("optimizer", 0, 100),
        scope("communication", 40, 60),
        event("Mul", 10, 20, "worker"),
        event("Mul", 45, 50, "worker"),
        event("Mul", 70, 80, "worker"),
        event("Mul", 200, 210, "worker"),
    ]
    found = kinds_of(events)[2:]
    assert found == ["optimizer", "communication", "optimizer", "activations"]


def test_a_summary_is_the_mean_over_ranks_and_steps():
    empty = dict.fromkeys(KINDS, 0.0)
    ranks = [
        [{**empty, "matrix products": 6.0, OVERHEAD: 2.0}],
        [{**empty, "matrix products": 8.0, "norms": 4.0}],
    ]
    values = summary(ranks, [Step(5, 0, 1), Step(6, 1, 2)], {"matrix products": 3.5, "norms": 1.0})
    assert (values["steps"], values["ranks"], values["step_ms"]) == ([5, 6], 2, 10.0)
    assert list(values["kinds"]) == list(KINDS)
    assert values["kinds"]["matrix products"] == {"ms": 7.0, "share": 0.7, "ceiling_share": 0.5}
    assert values["kinds"]["norms"]["ceiling_share"] == 0.5
    assert values["kinds"]["copies"] == {"ms": 0.0, "share": 0.0, "ceiling_share": None}
    assert sum(kind["share"] for kind in values["kinds"].values()) == pytest.approx(1)


TIMELINE = """[
{"name": "process_name", "ph": "M", "pid": 0,
 "args": {"start_time_since_epoch_in_micros": 1700000000000000}},
{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "allreduce.gradients"}},
{"ph": "B", "name": "ALLREDUCE", "ts": 3, "pid": 1},{"ph": "E", "ts": 5, "pid": 1}
"""


def test_ranks_and_timeline_stand_in_one_trace_on_one_clock(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (tmp_path / "timeline.json").write_text(TIMELINE + ",")  # as one that was cut off
    steps = [Step(4, DAY + 2000, DAY + 9000)]
    ranks = [trace_of([event("aten::mm", begin, begin + 1000)]) for begin in (2500, 4000)]
    trace = one_trace("PyTorch", ranks, steps, read_timeline(tmp_path / "timeline.json"))
    assert trace.base == steps[0].begin
    named = [row for row in trace.rows if row.get("name") == "process_name"]
    names = {row["pid"]: row["args"]["name"] for row in named}
    assert names == {
        0: "PyTorch steps",
        1: "rank 0 PyTorch",
        2: "rank 1 PyTorch",
        3: "Horovod under PyTorch",
    }
    times = {(row["pid"], row["ph"]): row["ts"] for row in trace.rows if "ts" in row}
    assert times == {(0, "X"): 0, (1, "X"): 0.5, (2, "X"): 2, (3, "B"): 1, (3, "E"): 3}
    trace.write(tmp_path / "trace.json.gz")
    assert Trace.read(tmp_path / "trace.json.gz") == trace


def test_runs_are_merged_with_their_first_steps_at_zero(tmp_path):
    paths = [tmp_path / f"{name}.json.gz" for name in ("one", "two")]
    for path, late in zip(paths, (0, 5_000_000), strict=True):
        steps = [Step(4, DAY + late, DAY + late + 9000)]
        ranks = [trace_of([event("aten::mm", late + 1000, late + 2000)])] * 2
        one_trace("PyTorch", ranks, steps, None).write(path)
    merge_traces(paths, ["fp32", "bf16"], tmp_path / "both.json.gz")
    rows = Trace.read(tmp_path / "both.json.gz").rows
    assert [row["ts"] for row in rows if row.get("name") == "step 4"] == [0, 0]
    assert [row["ts"] for row in rows if row.get("name") == "aten::mm"] == [1] * 4
    names = {row["pid"]: row["args"]["name"] for row in rows if row["name"] == "process_name"}
    assert names[1] == "fp32: rank 0 PyTorch" and names[5] == "bf16: rank 1 PyTorch"
    assert len(names) == 6


class Recorder:
    """A backend whose profiler sees one product a step."""

    def __init__(self, communicator):
        self.communicator = communicator
        self.open = 0

    @contextmanager
    def profile(self, path):
        self.open += 1
        yield
        self.open -= 1
        trace_of([event("aten::mm", 0, 1000)]).write(path)


def profiled(tmp_path, steps, wanted, ranks=2, start=0, stop_at=None):
    """Train with a profile; the rows of rank 0 and the recorders of all."""
    rows = []

    def work(communicator):
        communicator.start_timeline = lambda path: Path(path).write_text(TIMELINE + "]")
        communicator.stop_timeline = lambda: None
        run = make_run(communicator, steps=steps)
        run.step = start
        recorder = Recorder(communicator)
        hook = Profile(wanted, tmp_path, recorder, "NumPy", lambda: {"matrix products": 1e-3})

        class Stop:
            every = 1

            def __call__(self, run, reduced):
                if run.step == stop_at:
                    run.signal = 1

        metrics = Metrics([rows.append] if communicator.rank == 0 else [])
        train_steps(run, [metrics, Stop(), hook])
        hook.close()
        return recorder, run

    return rows, on_ranks(ranks, work)


def test_profiled_steps_are_marked_and_written(tmp_path):
    rows, ranks = profiled(tmp_path, 12, range(4, 7))
    assert [row["step"] for row in rows if row.get("profiled")] == [4, 5, 6]
    assert all(recorder.open == 0 for recorder, _ in ranks)
    values = json.loads((tmp_path / "profile.json").read_text())
    assert (values["steps"], values["ranks"]) == ([4, 6], 2)
    rows = Trace.read(tmp_path / "trace.json.gz").rows
    assert [row["name"] for row in rows if row.get("cat") == "step"] == [
        "step 4", "step 5", "step 6",
    ]  # fmt: skip


def test_a_profile_may_end_with_the_run(tmp_path):
    profiled(tmp_path, 6, range(5, 7))
    assert json.loads((tmp_path / "profile.json").read_text())["steps"] == [5, 6]


def test_a_run_that_is_stopped_does_not_wait_for_a_profile(tmp_path):
    _, ranks = profiled(tmp_path, 12, range(4, 9), stop_at=5)
    assert all(recorder.open == 0 and run.stopped for recorder, run in ranks)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_after_the_steps_has_no_profile(tmp_path):
    rows, _ = profiled(tmp_path, 12, range(4, 7), start=5)
    assert not any("profiled" in row for row in rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["1:3", "5:4", "199:201", "2:60"])
def test_steps_that_cannot_be_profiled_are_refused_with_the_mend(value):
    with pytest.raises(UserError, match=f"output.profile = {value} must be FIRST:LAST of at most"):
        make_config({"output": {"profile": value}}, "here")


@pytest.mark.parametrize("value", ["3", "3:", "a:b", "3-5", ""])
def test_a_profile_that_is_no_range_is_refused(value):
    with pytest.raises(UserError, match="it must be a string, FIRST:LAST"):
        make_config({"output": {"profile": value}}, "here")


def test_a_range_of_steps_and_none():
    assert make_config({"output": {"profile": "20:22"}}, "").output.profiled == range(20, 23)
    assert not make_config({}, "").output.profiled


def test_bytes_by_hand():
    spec = ModelSpec(width=8, layers=1, heads=2, feed_forward=16, vocabulary=10, context=4)
    assert bytes_per_token(spec, 4) == {
        "norms": 3 * (2 + 3) * 8 * 4,
        "activations": (2 + 3) * 16 * 4 + 2 * (3 + 3) * 8 * 4,
        "embedding": (3 + 2 + 4) * 8 * 4,
        "dropout": 3 * 2 * (2 * 8 * 4 + 8),
    }
    assert "dropout" not in bytes_per_token(spec.model_copy(update={"dropout": 0.0}), 4)
    both = spec.model_copy(
        update={"kind": "encoder-decoder", "encoder_layers": 2, "gated": True, "segments": 2}
    )
    branches = 2 * 2 + 3
    assert bytes_per_token(both, 4) == {
        "norms": (branches + 2) * (2 + 3) * 8 * 4,
        "activations": 3 * (3 + 5) * 16 * 4 + branches * (3 + 3) * 8 * 4,
        "embedding": 2 * (4 + 3 + 2 * 3) * 8 * 4,
        "dropout": (branches + 2) * 2 * (2 * 8 * 4 + 8),
    }
    bert = spec.model_copy(
        update={"norm_placement": "post", "positions": "rotary", "head_transform": True}
    )
    assert bytes_per_token(bert, 2)["norms"] == 4 * (2 + 3) * 8 * 4
    assert bytes_per_token(bert, 2)["activations"] == (2 + 3) * (16 + 8) * 2 + 2 * 6 * 8 * 4
    assert bytes_per_token(bert, 4)["embedding"] == (2 + 1 + 2) * 8 * 4
    assert optimizer_bytes(spec, "adamw") == 4 * spec.size * (1 + 1 + 2 + 2 * 2)
    assert optimizer_bytes(spec, "sgd") == 4 * spec.size * (1 + 1 + 2 + 2 * 1)


def micro_batch(spec, rows, length, source=None, places=None):
    shape = (rows, length if places is None else places)
    loss = Loss("lm", "lm", np.zeros(shape, np.int32), np.ones(shape, np.float32), 1.0)
    inputs = {"tokens": np.zeros((rows, length), np.int32)}
    if source is not None:
        inputs["source"] = np.zeros((rows, source), np.int32)
    return MicroBatch(inputs, np.arange(rows), (loss,))


@pytest.mark.parametrize("rows", [(2, 2), (3, 3), (3, 2)])
def test_ideal_times_follow_the_rates(monkeypatch, rows):
    monkeypatch.setattr("horovod_lm.ceilings._seconds", lambda work: work())

    class Tools:
        def product_libraries(self, precision):
            return ["slower", "faster"]

        def products(self, library, products, precision):
            rate = {"slower": 1e8, "faster": 1e9}[library]
            return lambda: sum(p.flops for p in products) / rate

        def copy(self, elements):
            return lambda: 8 * elements / 1e9

    class Backend:
        def bench(self):
            return Tools()

    config = make_config({}, "here")
    tokens, spec = sum(rows) * config.model.context, config.model
    micros = [micro_batch(spec, count, spec.context) for count in rows]
    times = ideal_times(config, Backend(), micros)
    attention = spec.attention_flops_per_token()
    products = spec.flops_per_token() - attention
    assert times["matrix products"] == pytest.approx(1e3 * tokens * products / 1e9, rel=1e-6)
    assert times["attention"] == pytest.approx(1e3 * tokens * attention / 1e9)
    norms = bytes_per_token(spec, 4)["norms"]
    assert times["norms"] == pytest.approx(1e3 * tokens * norms / 1e9)
    assert times["optimizer"] == pytest.approx(1e3 * optimizer_bytes(spec, "adamw") / 1e9)
    exact = ideal_times(make_config({"train": {"precision": "fp64"}}, "here"), Backend(), micros)
    for kind in ("norms", "activations", "embedding", "optimizer"):
        assert exact[kind] == pytest.approx(2 * times[kind])
    assert set(times) <= set(KINDS) - {"loss", "communication", "copies", OVERHEAD}


def test_ideal_times_are_those_of_what_is_computed():
    """A source and a target of other lengths, and few places of which the words are predicted."""
    both = make_config({"model": {"kind": "encoder-decoder", "context": 64}}, "here").model
    sizes = Sizes.of(both, micro_batch(both, 3, 10, source=40))
    assert sizes == Sizes(3, (("encoder", 40), ("decoder", 10)), 30)
    assert sizes.tokens == 75
    full = {"encoder": 64, "decoder": 64}
    assert both.attention_flops(full) == pytest.approx(64 * both.attention_flops_per_token())
    pairs = 40 * 40 + 10 * 5.5 + 10 * 40
    wanted = 12 * both.attention_width * both.layers * pairs
    assert both.attention_flops(dict(sizes.lengths)) == pytest.approx(wanted)
    encoder = make_config({"model": {"kind": "encoder"}}, "here").model
    masked = Sizes.of(encoder, micro_batch(encoder, 2, 64, places=9))
    assert masked.places == 18
    flops = {
        places: sum(p.flops for p in products_of(encoder, 2, {"encoder": 64}, places))
        for places in (18, 128)
    }
    assert flops[128] - flops[18] == 6 * 110 * encoder.width * encoder.vocabulary
