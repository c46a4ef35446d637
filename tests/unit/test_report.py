"""The comparison's figures and words, on runs that are made up."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from horovod_lm.report.curves import MARGIN
from horovod_lm.report.results import Comparison
from horovod_lm.report.runs import Follower, Slice, tokens_per_second, whole_steps
from horovod_lm.report.schema import Report, VariantFigures, json_schema
from horovod_lm.report.table import aligned, make_table
from horovod_lm.report.terminal import WIDTH, print_results
from tests.unit.report_runs import BACKENDS, make_comparison, make_profile, make_variants

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
    assert "for the first time at step 7. Whether" in comparison.verdict[0]
    assert comparison.verdict[0].endswith("shows --set train.precision=fp64.")
    assert comparison.verdict[0].startswith("The two backends differ")


def test_the_margin_is_for_the_first_200_steps(tmp_path):
    comparison = make_comparison(tmp_path, steps=600, apart=3e-5)
    late = comparison.runs[0].steps[500]
    late["loss"] += 1e-2
    assert comparison.same is True
    assert "3.0e-05 nats over the first 200 steps and 1.0e-02 over all 600" in comparison.verdict[0]
    assert comparison.verdict[0].endswith("shows --set train.precision=fp64.")


def test_the_margin_is_for_fp64_too(tmp_path):
    comparison = make_comparison(tmp_path, apart=1.2 * MARGIN, precision="fp64")
    assert comparison.same is False
    assert comparison.verdict[0].endswith("for the first time at step 7.")


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


def test_accuracies_stand_in_the_table_where_a_loss_alone_says_little(tmp_path):
    comparison = make_comparison(tmp_path)
    first, second = (run.evaluations[-1] for run in comparison.runs)

    def shown(accuracies, perplexities):
        for row, add in ((first, 0.0), (second, 0.125)):
            row["accuracies"] = {name: value + add for name, value in accuracies.items()}
            row["perplexities"] = perplexities
        lines = [line for line in make_table(comparison) if "accuracy" in line.quantity]
        return {line.quantity.strip(): (line.values, line.compared) for line in lines}

    found = shown({"masked_lm": 0.25, "next_sentence": 0.75}, {"masked_lm": 7.4})
    assert found == {
        "accuracy of masked_lm": ((0.25, 0.375), ("difference 1.2e-01",)),
        "accuracy of next_sentence": ((0.75, 0.875), ("difference 1.2e-01",)),
    }
    assert list(shown({"sentence_order": 0.5}, {})) == ["accuracy of sentence_order"]
    assert shown({"lm": 0.25}, {"lm": 7.4}) == {}


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


def test_the_schema_in_the_documents_is_that_of_the_report():
    path = Path(__file__).parents[2] / "docs" / "report.schema.json"
    assert path.read_text() == json_schema(), (
        f"python -m horovod_lm.report.schema > {path.relative_to(Path.cwd())}"
    )


def test_every_field_of_the_report_is_in_the_documents():
    text = (Path(__file__).parents[2] / "docs" / "report-json.md").read_text()
    for name in {*Report.model_fields, *VariantFigures.model_fields} - {"version"}:
        assert f"`{name}`" in text, name


# Several runs


RANKS = [{"launch.ranks": ranks} for ranks in (1, 2, 4)]
PRECISIONS = [{"train.precision": precision} for precision in ("fp32", "bf16")]
GRID = [
    {"launch.backend": backend, "model.norm_placement": placement}
    for placement in ("pre", "post")
    for backend in ("torch", "tensorflow")
]


def test_each_run_is_compared_with_the_first(tmp_path):
    speeds = [(1.0, 1.8 + 0.01 * i, 1.0 + 0.01 * (i % 3 - 1)) for i in range(7)]
    comparison = make_variants(tmp_path, RANKS, apart=(0, 1e-5, 2e-5), speeds=speeds)
    assert comparison.names == ["1 rank", "2 ranks", "4 ranks"]
    assert comparison.same is True and comparison.faster == 1
    assert [comparison.outpaces(i) for i in (1, 2)] == [True, None]
    assert comparison.curves(2).largest == pytest.approx(2e-5)
    assert comparison.verdict == [
        "All 3 train the same model: their loss curves differ from that of 1 rank by up to 2.0e-05 "
        "nats over 120 steps.",
        "In times the speed of 1 rank, with 95% intervals over 7 rounds: 2 ranks 1.83 (1.80 to "
        "1.86; faster), 4 ranks 1.00 (0.99 to 1.01; no difference shown).",
        "2 ranks are faster than every other.",
    ]


def test_a_grid_compares_curves_of_what_is_meant_to_be_the_same(tmp_path):
    comparison = make_variants(tmp_path, GRID, apart=(0, 1e-5, 0.5, 0.5 + 2e-3))
    assert [comparison.twin(i) for i in range(4)] == [0, 0, 2, 2]
    assert [comparison.same_curve(i) for i in range(4)] == [None, True, None, False]
    assert comparison.same is False
    same, apart, others, *_ = comparison.verdict
    assert same.startswith(
        "PyTorch norm_placement=pre and TensorFlow norm_placement=pre train the same model: their "
        "loss curves differ by up to 1.0e-05 nats"
    )
    assert apart.startswith("PyTorch norm_placement=post and TensorFlow norm_placement=post differ")
    assert "2.0e-03 nats over 120 steps, more than the 1e-04" in apart
    assert others == (
        "PyTorch norm_placement=post is to train otherwise than PyTorch norm_placement=pre "
        "(model.norm_placement); the loss curves differ by up to 5.0e-01 nats over 120 steps. "
        "Whether they end alike takes a test over several seeds: horovod-lm compare --seeds."
    )
    figures = comparison.as_json()["variants"]
    against = [variant["curves"] and variant["curves"]["against"] for variant in figures]
    assert against == [None, "torch-pre", "torch-pre", "torch-post"]


def test_what_differs_in_its_training_has_no_margin_of_curves(tmp_path):
    comparison = make_variants(tmp_path, PRECISIONS, apart=(0, 0.3))
    assert comparison.same is None and not comparison.judged(1)
    assert comparison.changed(1) == ["train.precision"]


def test_the_framework_s_own_dropout_is_no_reason_to_differ(tmp_path):
    common = {"train.dropout_generator": "native", "model.dropout": 0.1}
    comparison = make_variants(tmp_path, RANKS[:2], apart=(0, 0.3), common=common)
    assert comparison.same is None
    assert comparison.verdict[0].startswith("With dropout masks of their own the loss curves of")
    common |= {"model.dropout": 0.0, "model.attention_dropout": 0.0}
    other = make_variants(tmp_path / "no", RANKS[:2], apart=(0, 0.3), common=common)
    assert other.same is False


# Several seeds


def test_final_losses_within_the_margin_are_the_same(tmp_path):
    finals = [(4.600, 4.602), (4.620, 4.621), (4.590, 4.593)]
    comparison = make_variants(tmp_path, PRECISIONS, finals=finals, margin=0.01)
    test = comparison.equivalence(1)
    assert test.mean == pytest.approx(2e-3) and test.same
    assert comparison.same is True
    assert comparison.verdict[1] == (
        "Over 3 seeds the final loss of bf16 against fp32 is +2.0e-03 nats (90% interval +3.1e-04 "
        "to +3.7e-03): the same, within 0.01 nats."
    )
    assert len(comparison.rounds) == 18  # those of every seed


def test_a_difference_that_is_merely_not_found_is_not_the_same(tmp_path):
    finals = [(4.60, 4.64), (4.62, 4.59)]  # mean 0.005, but far from sure
    comparison = make_variants(tmp_path, PRECISIONS, finals=finals, margin=0.01)
    assert abs(comparison.equivalence(1).mean) < 0.01
    assert comparison.same is False
    assert comparison.verdict[1].endswith("not shown to be the same within 0.01 nats.")


def test_a_difference_beyond_the_margin_is_called_one(tmp_path):
    finals = [(4.60, 4.70), (4.62, 4.721), (4.61, 4.711)]
    comparison = make_variants(tmp_path, PRECISIONS, finals=finals, margin=0.01)
    assert comparison.same is False
    assert comparison.verdict[1].endswith("different by more than 0.01 nats.")


def test_one_seed_says_nothing_of_final_losses(tmp_path):
    comparison = make_variants(tmp_path, PRECISIONS, finals=[(4.6, 4.6)])
    assert comparison.equivalence(1) is None and comparison.same is None
    assert not any("seeds the final" in sentence for sentence in comparison.verdict)


def test_equal_ends_do_not_hide_curves_that_differ(tmp_path):
    finals = [(4.6, 4.6), (4.61, 4.61)]
    comparison = make_variants(tmp_path, RANKS[:2], apart=(0, 0.2), finals=finals)
    assert comparison.equivalence(1).same and comparison.same is False


def test_a_seed_without_a_final_loss_is_no_claim(tmp_path):
    finals = [(4.6, 4.6), (4.61, None)]
    comparison = make_variants(tmp_path, PRECISIONS, finals=finals)
    for run in comparison.seeds[1]:
        run.record["loss"] = None
    assert comparison.equivalence(1) is None
    assert any("was not tested for equivalence" in sentence for sentence in comparison.verdict)


# Profiles


def test_the_kinds_that_make_the_difference_are_named(tmp_path):
    profiles = [
        make_profile(matrix_products=200.0, attention=50.0, optimizer=10.0),
        make_profile(matrix_products=208.4, attention=49.6, optimizer=13.2, loss=0.8),
    ]
    comparison = make_variants(tmp_path, BACKENDS, speeds=[(1.1, 1)] * 6, profiles=profiles)
    assert comparison.verdict[-1] == (
        "In the profile a step of TensorFlow takes 12.0 ms longer than one of PyTorch: matrix "
        "products +8.4, optimizer +3.2."
    )
    rows = {line.quantity.strip(): line for line in comparison.table}
    assert rows["matrix products"].compared == ("+8.4 ms",)
    assert rows["share of the ceiling"].values == ("80%", "80%")
    assert rows["loss"].values == (None, 0.8)
    figures = comparison.as_json()["variants"][1]["profile"]
    assert figures["kinds"]["optimizer"]["ms"] == 13.2 and figures["steps"] == [118, 120]


def test_a_profile_that_says_the_contrary_explains_nothing(tmp_path):
    profiles = [make_profile(optimizer=12.0), make_profile(optimizer=10.0)]
    comparison = make_variants(tmp_path, BACKENDS, speeds=[(1.1, 1)] * 6, profiles=profiles)
    assert comparison.verdict[-1] == (
        "The profile does not say why: its steps took 10.0 ms in TensorFlow and 12.0 ms in PyTorch."
    )


def test_a_profile_in_whose_steps_the_run_slept_is_left_out(tmp_path):
    profiles = [make_profile(optimizer=10.0), make_profile(optimizer=12_000.0)]
    comparison = make_variants(tmp_path, BACKENDS, speeds=[(1.1, 1)] * 6, profiles=profiles)
    for run in comparison.runs:
        for row in run.steps[-3:]:
            row["profiled"] = True
    assert comparison.profiles == profiles  # they lie wholly in the last turn
    slept = Comparison(comparison.config, comparison.runs, comparison.slices)
    slept.runs[1].steps[-2]["seconds"] += 36.0  # from before the last turn until in it
    assert slept.profiles == [profiles[0], None]
    assert slept.verdict[-1] == (
        "The profile of TensorFlow says nothing: the run slept within its steps."
    )
    assert slept.as_json()["variants"][1]["profile"] is None
    rows = {line.quantity: line for line in slept.table}
    assert rows["step in the profile, ms"].values == (10.0, None)


def test_without_a_difference_no_kind_is_named(tmp_path):
    profiles = [make_profile(optimizer=10.0), make_profile(optimizer=12.0)]
    comparison = make_variants(tmp_path, BACKENDS, profiles=profiles)
    assert comparison.verdict[-1].startswith("No speed difference shown")


# What is shown


VARIANTS = {
    2: BACKENDS,
    3: RANKS,
    4: GRID,
    8: [{**variant, "launch.ranks": ranks} for variant in GRID for ranks in (1, 2)],
}


@pytest.mark.parametrize("count", VARIANTS)
def test_a_table_of_any_number_of_runs_fits_100_columns(tmp_path, count):
    profiles = [make_profile(matrix_products=1234.5, attention=0.1)] * count
    comparison = make_variants(
        tmp_path,
        VARIANTS[count],
        apart=[1e-3 * i for i in range(count)],
        finals=[[4.6 + 0.001 * i * seed for i in range(count)] for seed in (1, 2, 3)],
        speeds=[[1 + 0.1 * i for i in range(count)]] * 6,
        profiles=profiles,
    )
    file = io.StringIO()
    print_results(comparison, Console(file=file, width=WIDTH))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" not in text  # nothing was cut
    assert ("ratio to the first" in text) == (count in (3, 4))
    for name in comparison.names:
        assert name.split()[0] in text
    assert " ".join(comparison.verdict) in " ".join(text.split())
    Report.model_validate(json.loads(json.dumps(comparison.as_json(), allow_nan=False)))


def test_one_run_alone_can_be_shown(tmp_path):
    comparison = make_variants(tmp_path, RANKS[:1])
    assert comparison.verdict == ["PyTorch trained 120 steps, to a loss of 4.6000 nats."]
    assert comparison.same is None and comparison.faster is None
    Report.model_validate(comparison.as_json())


def test_runs_of_other_days_have_no_speeds_to_compare(tmp_path):
    made = make_variants(tmp_path, BACKENDS)
    comparison = Comparison(made.config, made.runs)
    assert comparison.labels == ["torch", "tensorflow"]
    assert comparison.faster is None and comparison.rounds == []
    assert comparison.verdict[-1] == ("Speeds were not compared: these runs did not take turns.")
    Report.model_validate(comparison.as_json())


def test_runs_that_differ_in_nothing_are_told_apart_by_their_folders(tmp_path):
    first = make_variants(tmp_path / "a", RANKS[:1])
    second = make_variants(tmp_path / "b", RANKS[:1])
    comparison = Comparison(first.config, [*first.runs, *second.runs], labels=["a", "b"])
    assert comparison.names == ["PyTorch (a)", "PyTorch (b)"]
