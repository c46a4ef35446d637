"""The ground of the benchmarks: rounds, figures, and the processes of contestants."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from horovod_lm.bench.processes import Stage
from horovod_lm.bench.result import BenchResult, Column, Ratio, significant
from horovod_lm.bench.rounds import Repeated, Sample, interleave
from horovod_lm.bench.throughput import check_peers
from horovod_lm.bench.tools import PEERS, products_of
from horovod_lm.bench.training import SeededTokens, stream
from horovod_lm.cli.bench import command, settings
from horovod_lm.config import make_config, with_keys
from horovod_lm.errors import RunFailed, UserError
from horovod_lm.statistics import Interval
from tests.helpers import processes_of

ROOT = Path(__file__).parents[2]
SLEEPING = "tests.unit.bench_work:Sleeping"


class Scripted:
    """A contestant whose turns are written down."""

    def __init__(self, label, rates, order):
        self.label, self._rates, self._order = label, iter(rates), order

    def run(self, seconds):
        self._order.append(self.label)
        return Sample(2.0, 2.0 * next(self._rates))


# ---- rounds


def test_rounds_alternate_and_ratios_are_paired():
    order: list[str] = []
    # The machine is twice as fast in the second round and four times in the third.
    result = interleave([Scripted("a", [3, 6, 12], order), Scripted("b", [2, 4, 8], order)], 3, 0.1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert result.rate("a") == 6 and result.rates("b") == [2, 4, 8]
    value, interval = result.ratio("a", "b")
    assert value == pytest.approx(1.5) and interval.low == pytest.approx(interval.high)
    assert result.ratio("a", "b", 10.0)[0] == pytest.approx(15)
    assert result.fastest(["b", "a"]) == "a"


def test_progress_is_told_after_each_turn():
    seen = []
    interleave(
        [Scripted("a", [1, 2], [])], 2, 0.1, lambda label, sample: seen.append((label, sample.rate))
    )
    assert seen == [("a", 1), ("a", 2)]


def test_a_repeated_function_is_called_until_the_time_is_up():
    calls = []
    sample = Repeated("a", lambda: calls.append(time.sleep(0.01)), units=5).run(0.05)
    assert sample.seconds >= 0.05 and 2 <= len(calls) <= 5
    assert sample.units == 5 * len(calls)
    assert Repeated("a", lambda: None).run(0.0).units == 1


# ---- figures


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1.23456, 3, "1.23"),
        (0.0123456, 3, "0.0123"),
        (999.6, 3, "1,000"),
        (123456.0, 4, "123,500"),
        (0.0, 3, "0"),
        (float("inf"), 3, "inf"),
    ],
)
def test_significant_digits(value, digits, text):
    assert significant(value, digits) == text


def result():
    rows = [
        {"threads": 1, "who": "one", "rate": 1234.5, "share": 0.876, "many": [1.0]},
        {"threads": 2, "who": "two", "rate": 12.0, "interval": Interval(1.0, 2.0, 0.95)},
    ]
    ratios = [
        Ratio("two / one", 1.1, Interval(1.0, 1.2, 0.95), 1.2, where={"threads": 2}),
        Ratio("cost", 1.01, None, 1.02, at_most=True, where={"threads": 2, "kind": "dynamic"}),
    ]
    columns = [
        Column("threads", "threads"),
        Column("who", "who"),
        Column("rate", "tokens/s", digits=4),
        Column("interval", "95% interval"),
        Column("share", "share", share=True),
    ]
    return BenchResult("test", "A test", columns, {"rounds": 3}, rows, ratios, ["A note."])


def test_json_has_the_schema_and_every_figure():
    found = json.loads(result().text)
    assert found["schema"] == 1 and found["bench"] == "test" and found["notes"] == ["A note."]
    assert found["settings"] == {"rounds": 3}
    assert {"cpu", "cores", "usable_cores"} <= found["machine"].keys()
    assert {"python", "numpy", "horovod_lm"} <= found["versions"].keys()
    assert found["rows"][0]["many"] == [1.0]
    assert found["rows"][1]["interval"] == {"low": 1.0, "high": 2.0, "level": 0.95}
    first, second = found["ratios"]
    assert first["reached"] is False and first["interval"]["high"] == 1.2 and first["threads"] == 2
    assert second["reached"] is True and second["interval"] is None and second["kind"] == "dynamic"


def test_tables_show_what_there_is_and_a_dash_for_what_there_is_not():
    rows, ratios = result().tables
    assert rows.title == "A test" and rows.numbers == "rlrrr"
    assert rows.rows == [
        ["1", "one", "1,234", "–", "88%"],
        ["2", "two", "12.00", "1.00 – 2.00", "–"],
    ]
    assert ratios.columns == [
        "threads",
        "kind",
        "figure",
        "value",
        "95% interval",
        "aim",
        "reached",
    ]
    assert ratios.rows[0] == ["2", "–", "two / one", "1.10", "1.00 – 1.20", "≥ 1.2", "no"]
    assert ratios.rows[1][-2:] == ["≤ 1.02", "yes"]


def test_groups_have_tables_of_their_own():
    grouped = result()
    grouped.group_by = ("threads",)
    first, second, ratios = grouped.tables
    assert first.title == "A test: threads 1" and len(first.rows) == 1
    assert second.columns == ["who", "tokens/s", "95% interval", "share"]
    assert ratios.title == "Ratios of paired rounds: threads 2" and "threads" not in ratios.columns


def test_a_file_that_cannot_be_written_is_no_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match="the figures can't be written"):
        result().write(tmp_path / "file" / "below.json")


# ---- what is measured


@pytest.mark.parametrize(
    "changes",
    [
        {"tied": True},
        {"tied": False},
        {"kind": "encoder", "head_transform": True, "gated": True},
        {"kind": "encoder-decoder", "encoder_layers": 2, "key_value_heads": 2},
        {"kind": "encoder-decoder", "head_size": 5, "pooler": False},
    ],
)
def test_products_are_those_of_a_step(changes):
    overrides = {"width": 64, "context": 512, **changes}
    spec = make_config({"model": overrides}, "test").model
    products = products_of(spec, 4)
    flops = sum(product.flops for product in products)
    attention = spec.attention_flops_per_token()
    assert flops == pytest.approx(4 * spec.context * (spec.flops_per_token() - attention))
    outputs = [p.outputs for p in products if p.inputs == 64]
    width = spec.attention_width
    fused = "key_value_heads" not in changes
    assert (3 * width in outputs) == fused


def test_tokens_come_from_the_seed_alone():
    config = settings(None, (), quick=True)
    tokens = stream(config)
    assert len(tokens) % config.model.context == 1
    assert tokens.read(0, 1000).min() >= 0 and tokens.read(0, 1000).max() < 300
    again = SeededTokens(300, len(tokens), config.train.seed)
    assert (again.read(5, 50) == tokens.read(5, 50)).all()


def test_the_config_that_comes_with_it_is_valid():
    model = settings(None, (), quick=False).model
    assert (model.width, model.layers, model.context, model.vocabulary) == (256, 4, 256, 8192)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("model", "norm_placement", "post"), ("model", "tied", False), ("optimizer", "name", "sgd")],
)
def test_what_no_peer_can_be_is_refused(section, key, value):
    config = with_keys(settings(None, (), quick=True), **{section: {key: value}})
    with pytest.raises(UserError, match=rf"{section}.{key} = {value}.*--peers none"):
        check_peers(config, PEERS[2:3])
    check_peers(config, [])


def test_a_missing_package_is_named_with_its_mend(monkeypatch):
    monkeypatch.setattr("horovod_lm.bench.throughput.find_spec", lambda name: None)
    config = settings(None, (), quick=True)
    with pytest.raises(UserError, match=r"needs the package transformers.*horovod_lm\[bench\]"):
        check_peers(config, PEERS[:1])
    with pytest.raises(UserError, match="--no-deps keras-hub"):
        check_peers(config, [peer for peer in PEERS if peer.name == "kerashub"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("throughput", "--peers", "nobody"), "nobody is not one of huggingface"),
        (("throughput", "--precision", "fp8"), "fp8 is not one of fp32, bf16, fp16"),
        (("throughput", "--threads", "0"), "0 is not a list like 1,2"),
        (("scaling", "--ranks", "one"), "one is not a list like 1,2"),
        (("scaling", "--launcher", "ssh"), "ssh is not one of mpirun"),
        (("scaling", "--rounds", "0"), "x>=1"),
    ],
)
def test_faulty_options_are_refused(arguments, words):
    ended = CliRunner().invoke(command, [*arguments, "--quick"])
    assert ended.exit_code == 2 and words in ended.output


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    ended = CliRunner().invoke(
        command, ["scaling", "--quick", "--ranks", "1,8", "--launcher", "mpirun"]
    )
    assert isinstance(ended.exception, UserError)
    assert re.search("= 4 can't be shared by 8 ranks", str(ended.exception))


# ---- processes


@pytest.fixture
def stage(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with Stage() as found:
        yield found
    assert processes_of(os.getpid()) == []


def workers() -> list[psutil.Process]:
    return [p for p in processes_of(os.getpid()) if "horovod_lm.bench.worker" in p.cmdline()]


def sleeps(process: psutil.Process) -> bool:
    """Whether it is stopped, or soon is: on a busy machine the signal reaches it a little later."""
    end = time.monotonic() + 10
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < end:
        time.sleep(0.01)
    return process.status() == psutil.STATUS_STOPPED


def test_a_process_takes_turns_and_sleeps_between_them(stage):
    process = stage.start("a", SLEEPING, {})
    assert process.parts == ["one", "two"]
    (worker,) = workers()
    assert sleeps(worker)
    one = process.contestant("one", "one")
    two = process.contestant("two", "two", factor=10)
    assert 0.01 <= one.step_seconds < 1 and one.memory_mib > 1
    sample = one.run(0.1)
    assert 0.01 * sample.units <= sample.seconds and 1 <= sample.units <= 10
    assert two.run(0.05).units % 20 == 0
    assert sleeps(worker)


def test_a_mistake_in_the_work_is_the_users(stage):
    with pytest.raises(UserError, match="give another"):
        stage.start("a", SLEEPING, {"mistake": "give another"})


def test_a_step_that_fails_is_told_in_one_line(stage):
    turns = stage.start("the slow one", SLEEPING, {"fails_at": 6}).contestant("one", "one")
    with pytest.raises(RunFailed, match=r"^the slow one failed: ValueError: step \d fails$"):
        for _ in range(3):
            turns.run(0.01)


def test_a_process_that_cannot_start_shows_its_log(stage):
    with pytest.raises(RunFailed, match=r"(?s)a failed: .*No module named 'nothing'"):
        stage.start("a", "nothing:Work", {})


def test_a_process_that_is_killed_is_told(stage):
    turns = stage.start("a", SLEEPING, {}).contestant("one", "one")
    workers()[0].send_signal(signal.SIGKILL)
    with pytest.raises(RunFailed, match=r"a failed: a rank was ended by signal 9|exit code -9"):
        turns.run(0.01)


def test_ours_starts_as_our_launcher_starts_it_and_a_peer_does_not(stage, monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    work = "tests.unit.bench_work:Environment"
    config = settings(None, (), quick=True)

    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the benchmark's own number counts

    def units(name: str, **options) -> float:
        process = stage.start("a", work, {"name": name}, threads=2, **options)
        process.contestant("a")
        answer = process.ask({"part": "", "seconds": 0.0})  # one step
        return answer["units"]

    assert units("OMP_NUM_THREADS") == 2 and units("OMP_NUM_THREADS", config=config) == 2
    assert units("MALLOC_MMAP_THRESHOLD_") == -1
    assert units("MALLOC_MMAP_THRESHOLD_", config=config) == 4294967296


def test_clearing_a_stage_ends_its_processes(stage):
    for name in ("a", "b"):
        stage.start(name, SLEEPING, {})
    assert len(workers()) == 2
    stage.clear()
    assert workers() == []
    stage.start("c", SLEEPING, {})  # takes the place of the first
    assert len(workers()) == 1
