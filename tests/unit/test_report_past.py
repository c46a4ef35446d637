"""`horovod-lm report`: past runs side by side, finished or not."""

import json
import shutil

import pytest
from click.testing import CliRunner

from horovod_lm.cli.report import command
from horovod_lm.config import load_config, to_toml
from horovod_lm.errors import UserError
from horovod_lm.report.page import render_page
from horovod_lm.report.past import open_runs
from tests.unit.report_runs import make_comparison


@pytest.fixture
def runs(tmp_path):
    """Two folders of runs that train the same, in torch and in tensorflow."""
    make_comparison(tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def other(runs):
    """A run of another training, in the folder `runs/other`."""
    shutil.copytree(runs / "torch", runs / "other")
    config = load_config(runs / "torch" / "config.toml", ["train.seed=7", "model.layers=2"])
    (runs / "other" / "config.toml").write_text(to_toml(config))
    return runs / "other"


def unfinished(folder, steps):
    """Leave of a run what a kill after `steps` steps leaves."""
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:steps]
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"kind": "st')
    record = json.loads((folder / "run.json").read_text())
    record |= {
        "state": "running", "steps": 0, "updates": 0, "loss": None, "validation_loss": None,
        "memory_mib": None, "sample": None, "first_step_seconds": None, "ended": None,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))


def test_runs_of_the_same_training_are_compared_but_not_in_speed(runs):
    comparison = open_runs([runs / "torch", runs / "tensorflow"])
    assert comparison.names == ["torch", "tensorflow"]
    assert comparison.same is True
    assert "train the same model" in comparison.verdict[0]
    assert comparison.verdict[-1].startswith("Speeds were not compared")
    assert comparison.faster is None and comparison.ratio(1) is None
    median, interval = comparison.speed(1)
    assert median == pytest.approx(2048 / 0.2)  # the made-up steps of TensorFlow take 0.2 s
    assert interval.low == pytest.approx(interval.high)
    quantities = {line.quantity: line.values for line in comparison.table}
    assert quantities["tokens/s, each in its own time"][1] == pytest.approx(median)


def test_another_training_is_overlaid_and_its_keys_are_named(runs, other):
    comparison = open_runs([runs / "torch", other, runs / "tensorflow"])
    assert comparison.curves(1) is None and comparison.curves(2) is not None
    assert comparison.same is True
    said = " ".join(comparison.verdict)
    assert "other is to train otherwise than torch (model.layers and train.seed)" in said
    page = render_page(comparison)
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert list(data["charts"]["losses"]["series"]) == ["torch", "other", "tensorflow"]
    assert list(data["charts"]["apart"]["series"]) == ["tensorflow"]
    assert "ratios" not in data["charts"] and "speeds" in data["charts"]
    for key in ("train.seed", "model.layers", "launch.backend"):
        assert f'<th scope="row">{key}</th>' in page
    assert '<th scope="row">train.steps</th>' not in page  # all have the same


def test_a_run_is_shown_as_far_as_it_came(runs):
    unfinished(runs / "tensorflow", 47)
    comparison = open_runs([runs / "torch", runs / "tensorflow"])
    assert comparison.warnings == ["tensorflow has not ended in order: 47 of its 120 steps."]
    assert comparison.curves(1).steps == list(range(1, 48))
    assert comparison.runs[1].final_loss == comparison.runs[1].steps[-1]["loss"]
    assert "47 of its 120 steps" in render_page(comparison)


def test_a_run_without_a_step_is_shown_too(runs):
    unfinished(runs / "torch", 0)
    for paths in ([runs / "torch"], [runs / "torch", runs / "tensorflow"]):
        comparison = open_runs(paths)
        assert "0 of its 120 steps" in comparison.warnings[0]
        render_page(comparison)


def test_one_run_alone_makes_a_page(runs):
    comparison = open_runs([runs / "torch"])
    assert comparison.names == ["torch"] and comparison.same is None
    assert "torch trained 120 steps, to a loss of 4.6000 nats." in render_page(comparison)


def test_a_finished_comparison_is_that_comparison_again(tmp_path):
    made = make_comparison(tmp_path, ratios=(1.1,) * 7)
    (tmp_path / "report.json").write_text(json.dumps(made.as_json()))
    again = open_runs([tmp_path])
    assert again.as_json() == made.as_json()
    assert render_page(again) == render_page(made)


def test_runs_of_a_comparison_are_taken_apart_with_their_times(tmp_path, runs):
    folder = tmp_path / "compared"
    made = make_comparison(folder, ratios=(1.1,) * 7)
    (folder / "report.json").write_text(json.dumps(made.as_json()))
    # A step that slept while the other run was awake must not count.
    lines = [json.loads(line) for line in (folder / "torch/metrics.jsonl").read_text().splitlines()]
    lines[50]["seconds"] += 1000
    (folder / "torch/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    comparison = open_runs([folder, runs / "torch"])
    assert comparison.names == ["compared/torch", "compared/tensorflow", "runs/torch"]
    assert all(row["seconds"] < 1 for row in comparison.counted[0])
    assert not comparison.rounds


def test_a_comparison_that_failed_is_the_runs_in_it(runs):
    (runs / "report.json").write_text('{"schema": 2, "state": "failed", "message": "no"}')
    assert sorted(open_runs([runs]).names) == ["tensorflow", "torch"]
    assert open_runs([runs, runs / "torch"]).names == ["tensorflow", "torch"]  # each of them once


def test_all_bad_folders_are_told_at_once(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    damaged = runs / "damaged"
    shutil.copytree(runs / "torch", damaged)
    (damaged / "run.json").write_text("{")
    keyless = runs / "keyless"
    shutil.copytree(runs / "torch", keyless)
    (keyless / "config.toml").write_text("[model]\nwidht = 3\n")
    bad = [tmp_path / "nothing", tmp_path / "empty", damaged, keyless]
    with pytest.raises(UserError) as error:
        open_runs([runs / "torch", *bad])
    for path in bad:
        assert str(path) in str(error.value)
    assert "did you mean model.width" in str(error.value)


def test_the_command_writes_the_page_and_prints_the_figures(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(command, ["runs/torch", "runs/tensorflow"])
    assert found.exit_code == 0, found.output
    assert "train the same model" in found.output and "report: report.html" in found.output
    assert "<svg" in (tmp_path / "report.html").read_text()
    found = CliRunner().invoke(command, ["runs/torch", "--json", "--output", "other.html"])
    report = json.loads(found.stdout)
    assert report["schema"] == 2 and report["variants"][0]["tokens_per_second"]["median"] > 0
    assert (tmp_path / "other.html").exists()


def test_a_page_that_can_not_be_written_is_a_users_mistake(runs):
    with pytest.raises(UserError, match="can't be written"):
        CliRunner().invoke(
            command,
            [str(runs / "torch"), "--output", str(runs / "no/such/page.html")],
            catch_exceptions=False,
        )
