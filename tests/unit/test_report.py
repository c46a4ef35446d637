"""The comparison's figures and words, on runs that are made up."""

import io
import json

import pytest
from rich.console import Console

from horovod_lm.report.curves import MARGIN
from horovod_lm.report.runs import Follower, Slice, tokens_per_second, whole_steps
from horovod_lm.report.schema import Report
from horovod_lm.report.table import aligned
from horovod_lm.report.terminal import WIDTH, print_results
from tests.unit.report_runs import make_comparison

RATIOS = (1.08, 1.13, 1.1, 1.1, 1.12, 1.09)


def test_faster_is_said_where_the_interval_of_the_ratio_excludes_1(tmp_path):
    comparison = make_comparison(tmp_path, ratios=RATIOS)
    speeds = [r.speeds for r in comparison.rounds]
    assert [round(a / b, 6) for a, b in speeds] == list(RATIOS)
    assert comparison.faster == 0
    assert comparison.verdict[-1] == (
        "PyTorch is faster: 1.10 times the speed of TensorFlow (95% interval 1.08 to 1.13, "
        "6 rounds)."
    )
    median, interval = comparison.ratio(1)  # against the first
    assert median == pytest.approx(1 / 1.1, rel=1e-3)
    assert (interval.low, interval.high) == pytest.approx((1 / 1.13, 1 / 1.08))
    assert comparison.outpaces(1) is False and comparison.outpaces(0, 1) is True


def test_the_other_one_may_be_faster(tmp_path):
    comparison = make_comparison(tmp_path, ratios=(0.5, 0.8, 0.8, 0.8, 0.8, 0.8, 0.75))
    assert comparison.faster == 1
    assert comparison.verdict[-1] == (
        "TensorFlow is faster: 1.25 times the speed of PyTorch (95% interval 1.25 to 2.00, "
        "7 rounds)."
    )


def test_no_difference_is_said_where_the_interval_holds_1(tmp_path):
    comparison = make_comparison(tmp_path, ratios=(0.97, 1.04, 1.01, 1.02, 1.03, 1.01))
    assert comparison.faster is None
    assert comparison.verdict[-1] == (
        "No speed difference shown: TensorFlow ran at 0.99 times the speed of PyTorch (95% "
        "interval 0.96 to 1.03, 6 rounds)."
    )


def test_an_interval_that_almost_holds_1_is_not_rounded_to_it(tmp_path):
    comparison = make_comparison(tmp_path, ratios=(1.002, 1.0041, 1.0032, 1.0051, 1.0042, 1.003))
    assert comparison.faster == 0
    assert "95% interval 1.002 to 1.005" in comparison.verdict[-1]


def test_five_rounds_are_too_few(tmp_path):
    comparison = make_comparison(tmp_path, ratios=(2.0,) * 5)
    assert comparison.faster is None and comparison.outpaces(1) is None
    assert "takes 6 rounds in alternation, and there were 5" in comparison.verdict[-1]


def test_profiled_steps_enter_no_speed(tmp_path):
    comparison = make_comparison(tmp_path, ratios=(2.0,) * 6)
    for row in comparison.runs[0].steps[-3:]:
        row["profiled"] = True
    kept = {row["step"] for row in comparison.counted[0]}
    assert not kept & {118, 119, 120} and 117 in kept


def test_curves_within_the_margin_are_the_same_model(tmp_path):
    comparison = make_comparison(tmp_path, apart=3e-5)
    assert comparison.same is True
    assert comparison.verdict[0] == (
        "The two backends train the same model: their loss curves differ by up to 3.0e-05 nats "
        "over 120 steps."
    )


def test_curves_beyond_the_margin_differ_and_the_step_is_named(tmp_path):
    comparison = make_comparison(tmp_path, apart=1.2 * MARGIN)
    assert comparison.same is False
    # the generator's curves are a whole `apart` from each other where (step - 1) % 7 is 6
    assert comparison.verdict[0].endswith("for the first time at step 7.")
    assert comparison.verdict[0].startswith("The two backends differ")


def test_the_margin_is_for_the_first_200_steps(tmp_path):
    comparison = make_comparison(tmp_path, steps=600, apart=3e-5)
    late = comparison.runs[0].steps[500]
    late["loss"] += 1e-2
    assert comparison.same is True
    assert "3.0e-05 nats over the first 200 steps and 1.0e-02 over all 600" in comparison.verdict[0]


def test_no_margin_in_half_precision(tmp_path):
    comparison = make_comparison(tmp_path, apart=0.5, precision="bf16")
    assert comparison.same is None
    assert comparison.verdict[0].startswith("In bf16 the loss curves of the two backends differ")


def test_fp16_says_whether_the_same_steps_were_skipped(tmp_path):
    comparison = make_comparison(tmp_path, precision="fp16")
    for run in comparison.runs:
        run.steps[4]["overflow"] = {"rank": 1, "tensor": "embedding"}
    assert comparison.verdict[1] == "Both skipped the same 1 step for overflows."
    comparison.runs[0].steps[7]["overflow"] = {"rank": 0, "tensor": "embedding"}
    assert comparison.verdict[1].startswith(
        "PyTorch and TensorFlow did not skip the same steps: step 8"
    )


def test_only_steps_that_lie_wholly_in_a_turn_count(tmp_path):
    run = make_comparison(tmp_path).runs[0]
    rows = {row["step"]: row for row in run.steps}
    first, last = rows[20], rows[25]
    turn = Slice(0, "torch", first["time"] - 0.01, last["time"] - 0.01)
    # 20 began before the turn and 25 ended after it; 21 is the first whole one, left out
    assert [row["step"] for row in whole_steps(run, turn)] == [22, 23, 24]
    warm = Slice(0, "torch", 0.0, rows[13]["time"])
    assert [row["step"] for row in whole_steps(run, warm)] == [11, 12, 13]


def test_synchronised_steps_do_not_enter_the_speed(tmp_path):
    rows = [dict(row) for row in make_comparison(tmp_path).runs[1].steps[18:21]]
    assert rows[1]["parts"] is not None
    rows[1]["seconds"] = 100.0
    assert tokens_per_second(rows) == pytest.approx(2048 / 0.2)
    assert tokens_per_second([]) is None


def test_a_line_that_is_not_whole_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.poll() == [] and follower.step == 0
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    assert [row["step"] for row in follower.poll()] == [1]
    with path.open("a") as file:
        file.write('ep", "step": 2}\n{"kind": "evaluation", "step": 2}\n')
    assert len(follower.poll()) == 2
    assert (follower.step, len(follower.evaluations)) == (2, 1)


def test_decimal_points_stand_below_each_other():
    assert aligned(["1,234", "5.25", "0.5", "–", ""]) == ["1,234   ", "5.25", "0.5 ", "–   ", "   "]


def test_the_table_fits_100_columns_and_says_what_the_page_says(tmp_path):
    comparison = make_comparison(tmp_path, ratios=(1.1,) * 7)
    file = io.StringIO()
    print_results(comparison, Console(file=file, width=WIDTH))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= WIDTH
    for line in comparison.table:
        assert line.quantity in text  # on one line: nothing was wrapped
    assert " ".join(comparison.verdict) in " ".join(text.split())


def test_report_json_can_be_read_back(tmp_path):
    comparison = make_comparison(tmp_path)
    values = json.loads(json.dumps(comparison.as_json(), allow_nan=False))
    Report.model_validate(values)
    assert (values["schema"], values["state"], values["faster"]) == (2, "finished", "torch")
    assert values["rounds"][0]["tokens_per_second"]["tensorflow"] == pytest.approx(10240)
    first, second = values["variants"]
    assert first["validation_loss"] == 4.6 and first["ratio"] is None
    assert second["ratio"]["median"] == pytest.approx(1 / 1.1)
    assert second["values"] == {"launch.backend": "tensorflow"} and second["changed"] == []
