"""What happens beside the steps, over the NumPy engine."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from horovod_lm import checkpoint
from horovod_lm.backend import EngineState, Reduced
from horovod_lm.config import make_config
from horovod_lm.data.batches import RankBatch, validation_batches
from horovod_lm.errors import RunFailed
from horovod_lm.hooks import (
    Checkpoint,
    Evaluation,
    Metrics,
    MetricsFile,
    ReplicaCheck,
    WeightSketches,
)
from horovod_lm.loop import train_steps
from horovod_lm.objectives import LossKind
from horovod_lm.objectives.registry import causal_windows
from horovod_lm.run_folder import RunRecord
from horovod_lm.sketch import distance, sketch
from tests.helpers import on_ranks
from tests.numpy_backend import TABLE
from tests.unit.test_loop import CONTEXT, VOCABULARY, Stream, make_run


def validation(communicator, rows=4):
    return validation_batches(
        causal_windows(Stream(101), CONTEXT, 1, seed=1),
        rows=rows,
        windows=0,
        rank=communicator.rank,
        ranks=communicator.size,
    )


def trained(hooks, ranks=1, **options):
    """Train with `hooks(run)`; for each rank its run, or its error."""

    def work(communicator):
        run = make_run(communicator, **options)
        train_steps(run, hooks(run))
        return run

    return on_ranks(ranks, work)


def test_a_row_of_metrics_for_every_step():
    rows = []
    trained(lambda run: [Metrics([rows.append])], steps=20)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["updates"] for row in rows] == list(range(1, 21))
    first = rows[0]
    assert first["loss"] == pytest.approx(math.log(VOCABULARY))
    assert first["tokens"] == 6 * CONTEXT
    assert first["learning_rate"] == 5.0 and first["loss_scale"] is None
    assert (first["skipped"], first["overflow"], first["parts"]) == (0, None, None)
    timed = [row for row in rows if row["parts"]]
    assert [row["step"] for row in timed] == [10, 20]
    for row in timed:
        assert sum(row["parts"].values()) == pytest.approx(1e3 * row["seconds"], abs=0.01)
        assert row["memory_mib"] > 10
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    json.dumps(rows, allow_nan=False)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_skipped_step_is_a_row_of_plain_json_that_names_tensor_and_rank():
    rows = []

    def hooks(run):
        if run.communicator.rank == 1:
            plain = run.engine.forward_backward
            run.engine.forward_backward = lambda micro, step, scale: plain(
                micro, step, math.inf if step == 1 else scale
            )
            return [Metrics([])]
        return [Metrics([rows.append])]

    trained(hooks, ranks=2, steps=3, precision="fp16")
    assert [row["overflow"] for row in rows] == [None, {"rank": 1, "tensor": TABLE}, None]
    assert [row["norm"] is None for row in rows] == [False, True, False]
    assert [row["skipped"] for row in rows] == [0, 1, 1]
    assert [row["loss_scale"] for row in rows] == [65536, 65536, 32768]
    json.dumps(rows, allow_nan=False)


def test_a_resumed_run_drops_later_lines_and_a_cut_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "step", "step": step}) for step in range(1, 6)]
    path.write_text("\n".join(lines) + '\n{"kind": "st')
    file = MetricsFile(path, 3)
    file.write({"kind": "step", "step": 4, "again": True})
    assert path.read_text().splitlines() == [
        *lines[:3],
        '{"kind": "step", "step": 4, "again": true}',
    ]
    file.close()


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml"])
def test_a_resumed_run_that_is_cut_off_keeps_its_files(name, tmp_path, monkeypatch):
    config, path = make_config({}, "the test"), tmp_path / name

    def start(step):
        MetricsFile(tmp_path / "metrics.jsonl", step).close()
        RunRecord(tmp_path, config)

    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 5}\n')
    start(5)
    before = path.read_text()
    write = Path.open

    def fill(self, mode="r", *arguments, **options):
        file = write(self, mode, *arguments, **options)
        if self.name.startswith(name) and "w" in mode:
            raise OSError(28, "No space left on device")
        return file

    monkeypatch.setattr(Path, "open", fill)
    with pytest.raises(OSError, match="No space left"):
        start(4)
    assert path.read_text() == before != ""
    assert not [path for path in tmp_path.iterdir() if path.suffix[1:].isdigit()]


def test_a_full_disk_is_reported_once(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file._file = open("/dev/full", "w")  # noqa: SIM115 - closed by the file under test
    with pytest.raises(OSError, match="No space left"):
        file.write({"kind": "step", "step": 1})
    file.close()


def test_the_record_of_a_run_is_plain_json(tmp_path):
    record = RunRecord(tmp_path, make_config({}, "the test"))
    largest = {"largest": math.nan, "all": [1.0, math.inf]}
    record.update(loss=math.nan, validation_loss=math.inf, memory_mib=largest)
    found = json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
    assert (found["loss"], found["validation_loss"]) == (None, None)
    assert found["memory_mib"] == {"largest": None, "all": [1.0, None]}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_is_the_same_on_any_number_of_ranks(ranks):
    rows = []

    def hooks(run):
        sinks = [rows.append] if run.communicator.rank == 0 else []
        evaluation = Evaluation(5, partial(validation, run.communicator), [LossKind("lm")], sinks)
        run.evaluation = evaluation
        return [evaluation]

    runs = trained(hooks, ranks=ranks)
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert {row["tokens"] for row in rows} == {100}
    assert rows[-1]["perplexity"] == pytest.approx(math.exp(rows[-1]["loss"]))
    table = runs[0].engine.table
    tokens = Stream(101).read(0, 101)
    logits = table[tokens[:-1]]
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(100), tokens[1:]]
    assert rows[-1]["loss"] == pytest.approx(nll.mean(), rel=1e-9)
    right = logits.argmax(-1) == tokens[1:]
    assert 0 < right.sum() < 100
    assert rows[-1]["accuracies"] == {"lm": pytest.approx(right.mean(), rel=1e-9)}
    assert {run.evaluation.loss for run in runs} == {rows[-1]["loss"]}


def test_an_evaluation_that_fails_on_one_rank_ends_all():
    def hooks(run):
        def batches():
            if run.communicator.rank == 1:
                raise OSError(5, "Input/output error", "validation")
            return validation(run.communicator)

        return [Evaluation(4, batches, [LossKind("lm")], [])]

    errors = trained(hooks, ranks=2)
    assert [str(error) for error in errors] == ["rank 1: validation: input/output error"] * 2


def test_a_stopped_run_saves_and_does_not_evaluate(tmp_path):
    def hooks(run):
        run.signal = 1
        run.hooks = [
            Evaluation(1, partial(validation, run.communicator), [LossKind("lm")], []),
            Checkpoint(0, tmp_path, {}, start=0),
        ]
        return run.hooks

    (run,) = trained(hooks)
    assert run.step == 1 and run.hooks[0].loss is None
    assert run.hooks[1].path == tmp_path / "step-00000001"


def test_sketches_of_the_weights_come_from_the_start_on_and_from_rank_0():
    rows = []

    def hooks(run):
        hook = WeightSketches(5, [rows.append] if run.communicator.rank == 0 else [])
        hook.start(run)
        return [hook]

    run, _ = trained(hooks, ranks=2)
    assert [(row["kind"], row["step"]) for row in rows] == [("weights", s) for s in (0, 5, 10, 12)]
    assert set(rows[0]["sketch"]["embeddings"]) == {0.0}
    (true,) = sketch(run.engine.state().weights).values()
    assert distance(rows[-1]["sketch"]["embeddings"], true) < 1e-9 * np.linalg.norm(true)
    json.dumps(rows, allow_nan=False)


def test_a_resumed_run_does_not_sketch_its_start_again_and_a_stopped_one_hurries():
    rows = []

    def hooks(run):
        run.step, run.signal = 4, 1
        hook = WeightSketches(1, [rows.append])
        hook.start(run)
        return [hook]

    trained(hooks)
    assert rows == []


def test_checkpoints_come_in_time_from_rank_0_and_once(tmp_path):
    def hooks(run):
        folder = tmp_path / str(run.communicator.rank)
        return [Checkpoint(4, folder, {"mine": 1}, start=0)]

    trained(hooks, ranks=2)
    assert not (tmp_path / "1").exists()
    names = sorted(path.name for path in (tmp_path / "0").iterdir())
    assert names == ["step-00000008", "step-00000012"]  # checkpoint.keep is 2
    state = checkpoint.load(tmp_path / "0" / "step-00000012")
    assert (state.step, state.updates, state.extra) == (12, 12, {"mine": 1})


def test_nothing_is_saved_where_the_run_resumed_or_after_an_error(tmp_path):
    (run,) = on_ranks(1, make_run)
    run.step = 4
    Checkpoint(4, tmp_path, {}, start=4)(run, None)
    run.trouble = RunFailed("drifted")
    Checkpoint(4, tmp_path, {}, start=0)(run, None)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_written_ends_all(tmp_path):
    (tmp_path / "file").write_text("")

    def hooks(run):
        return [Checkpoint(4, tmp_path / "file" / "checkpoints", {}, start=0)]

    errors = trained(hooks, ranks=2)
    for error in errors:
        assert "rank 0: the checkpoint of step 4 can't be written" in str(error)
    assert [error.shown_by_me for error in errors] == [True, False]


@pytest.mark.parametrize(
    ("check_every", "drift", "found"), [(4, 1, 4), (4, 9, 12), (0, 0, 1), (0, 1, None)]
)
def test_replicas_are_compared_at_the_first_update_then_in_time_and_last(check_every, drift, found):
    def work(communicator):
        run = make_run(communicator)
        train = {**run.config.train.model_dump(), "check_every": check_every}
        run.config = make_config({**run.config.model_dump(), "train": train}, "the test")
        plain = run.engine.apply_gradients

        def apply(*arguments):
            plain(*arguments)
            if communicator.rank == 1 and run.step == drift:
                run.engine.table[2, 3] += 1e-3

        run.engine.apply_gradients = apply
        train_steps(run, [ReplicaCheck(check_every)])

    results = on_ranks(2, work)
    if found is None:
        assert results == [None, None]
        return
    for error in results:
        assert f"drifted apart at step {found}: weight {TABLE} on rank 1" in str(error)


def test_a_rank_that_has_no_state_to_compare_ends_all():
    def hooks(run):
        def state():
            raise MemoryError

        if run.communicator.rank == 1:
            run.engine.state = state
        return [ReplicaCheck(4)]

    errors = trained(hooks, ranks=2)
    assert [str(error) for error in errors] == ["rank 1: MemoryError: "] * 2


def test_comparing_replicas_takes_two_small_allgathers(tmp_path):
    def work(communicator):
        run = make_run(communicator, steps=1)
        run.engine.load_state(EngineState({TABLE: np.ones((VOCABULARY, VOCABULARY), np.float32)}))
        train_steps(run, [ReplicaCheck(1)])
        return [size for name, size in communicator.calls if name == "allgather"]

    sizes, _ = on_ranks(2, work)
    # That every rank has its state, the digests, and the loop's own, that no rank has an error.
    assert sizes == [0, 32, 0]


def test_a_loss_without_a_target_is_null():
    rows = []
    runs = trained(lambda run: [Metrics([rows.append])], steps=1)
    run = runs[0]
    run.batch = RankBatch([], 3, factors={"lm": 1.0, "other": 1.0}, sums={"lm": 3.0, "other": 0.0})
    reduced = Reduced({"lm": 2.0, "other": 0.0}, True, 1.0, np.zeros(1, dtype=np.int64))
    Metrics([rows.append])(run, reduced)
    assert rows[-1]["losses"] == {"lm": 2.0, "other": None}
    assert rows[-1]["loss"] == 2.0
