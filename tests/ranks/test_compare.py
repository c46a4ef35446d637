"""`horovod-lm compare` on two real ranks of each backend, and its ways to end early."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import matplotlib
import psutil
import pytest

from horovod_lm.report.schema import Report
from tests.helpers import processes_of
from tests.ranks.jobs import losses, needs_horovod, rows

pytestmark = needs_horovod

CONFIG = """
[model]
width = 64
layers = 1
heads = 2
feed_forward = 256
context = 32
dropout = 0.1
[data]
text = ["text.txt"]
vocabulary = 300
[train]
steps = 240
global_batch_size = 6
[evaluation]
windows = 8
[launch]
ranks = 2
threads = 1
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    source = random.Random(1)
    words = ["a", "rank", "waits", "for", "the", "other", "one", "and", "then", "they", "add"]
    text = "\n\n".join(" ".join(source.choices(words, k=30)) + "." for _ in range(400))
    (folder / "text.txt").write_text(text)
    (folder / "tiny.toml").write_text(CONFIG)
    return folder / "tiny.toml"


def start(config, output, *arguments, stderr=subprocess.STDOUT, after=()):
    return subprocess.Popen(
        [*after, sys.executable, "-m", "horovod_lm", "compare", str(config),
         "--output", str(output), *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        # a cache of its own, but not of matplotlib's list of fonts, which takes seconds
        env={
            **os.environ,
            "XDG_CACHE_HOME": str(config.parent / "cache"),
            "MPLCONFIGDIR": matplotlib.get_configdir(),
        },
    )  # fmt: skip


def compared(config, output, *arguments):
    """Run a comparison to its end; returns its exit code, its figures and what it said."""
    driver = start(config, output, "--json", *arguments, stderr=subprocess.PIPE)
    printed, said = driver.communicate(timeout=280)
    assert processes_of(driver.pid) == []
    report = Report.model_validate_json(printed) if printed else None
    return driver.returncode, report, said


def awake_ranks(driver, rank):
    found = []
    for process in processes_of(driver.pid):
        try:
            if process.environ().get("OMPI_COMM_WORLD_RANK") == rank:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.status() != psutil.STATUS_STOPPED]


def read_until(driver, text):
    seen = []
    for line in driver.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError("".join(seen))


def test_both_backends_train_the_same_model_and_the_report_says_so(config, tmp_path):
    output = tmp_path / "out"
    # As the quickstart does: a script that has waited becomes the command, in the same process.
    waits = ["sh", "-c", f'sleep 1; date +%s.%N > {tmp_path}/began; exec "$@"', "sh"]
    driver = start(config, output, after=waits)
    text, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, text
    assert processes_of(driver.pid) == []
    assert "The two backends train the same model" in text
    assert text.rstrip().endswith(f"report: {output / 'report.html'}")
    report = json.loads((output / "report.json").read_text())
    assert report["state"] == "finished" and report["same"] is True
    Report.model_validate(report)
    assert len(report["rounds"]) >= 6 and report["seeds"] == 1
    assert [variant["label"] for variant in report["variants"]] == ["torch", "tensorflow"]
    for variant in report["variants"]:
        assert variant["run"]["state"] == "finished" and variant["run"]["ranks"] == 2
        assert variant["backend"] == variant["label"]
        assert 0 < variant["first_step_seconds"] < variant["seconds_to_first_step"]
        kinds = variant["profile"]["kinds"]
        assert kinds["matrix products"]["ms"] > 0 and variant["profile"]["steps"] == [238, 240]
    started = [variant["seconds_to_first_step"] for variant in report["variants"]]
    counted = rows(output / "torch")
    first_job = counted[0]["time"] - started[0]
    before = report["seconds_to_first_steps"] - sum(started)
    assert 0 < before < first_job - float((tmp_path / "began").read_text())
    assert [row["step"] for row in counted if row.get("profiled")] == [238, 239, 240]
    assert (output / "trace.json.gz").exists()
    turns = sorted((s["begin"], s["end"]) for s in report["slices"])
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(turns)), "turns overlap"
    again = start(config, output)
    text, _ = again.communicate(timeout=60)
    assert again.returncode == 2 and "in use" in text


def test_ranks_are_compared_over_seeds_and_the_figures_are_printed(config, tmp_path):
    output = tmp_path / "out"
    code, report, said = compared(
        config, output, "--vary", "ranks=1,2", "--seeds", "2", "--rounds", "3", "--no-profile",
        "--set", "train.steps=60", "--set", "launch.backend=tensorflow",
    )  # fmt: skip
    assert code == 0, said
    assert report == Report.model_validate_json((output / "report.json").read_text())
    assert report.same is True and report.seeds == 2
    assert [variant.name for variant in report.variants] == ["1 rank", "2 ranks"]
    assert [variant.run["ranks"] for variant in report.variants] == [1, 2]
    one, two = report.variants
    assert two.curves.same and two.equivalence.same and two.profile is None
    assert one.final_losses[0] != one.final_losses[1], "both seeds are the same"
    assert one.final_losses == pytest.approx(two.final_losses, abs=1e-4)
    assert {s.round for s in report.slices} == set(range(6)), "three rounds of either seed"
    assert sorted(path.name for path in output.iterdir()) == [
        "config.toml", "ranks-1", "ranks-1.log", "ranks-2", "ranks-2.log", "report.html",
        "report.json", "seed-2",
    ]  # fmt: skip
    assert losses(output / "seed-2" / "ranks-1") != losses(output / "ranks-1")
    assert "seed 2 of 2" in said and "1 rank and 2 ranks train the same model" in said


def test_precisions_are_compared_by_their_ends_alone(config, tmp_path):
    arguments = ("--vary", "precision=fp32,bf16", "--set", "train.steps=30", "-np", "1")
    code, report, said = compared(config, tmp_path / "one", *arguments)
    assert code == 0, said
    assert report.same is None and report.variants[1].curves.same is None
    assert report.variants[1].changed == ["train.precision"]
    assert 0 < report.variants[1].curves.largest < 0.1
    code, report, said = compared(
        config, tmp_path / "two", *arguments, "--seeds", "2", "--margin", "1e-12"
    )
    assert code == 3, said
    assert report.same is False and not report.variants[1].equivalence.same
    assert "the final loss of bf16 against fp32" in said


def test_as_few_steps_as_the_warm_up_are_compared_without_their_speed(config, tmp_path):
    code, report, said = compared(config, tmp_path / "out", "-np", "1", "--set", "train.steps=4")
    assert code == 0 and report.same is True and report.rounds == [], said
    assert [variant.run["state"] for variant in report.variants] == ["finished", "finished"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary", "precision=fp32,fp8"], "train.precision = 'fp8' is not allowed"),
        (["--vary", "launcher=mpirun,srun"], "launch.launcher = srun: there is no such program"),
        (["--vary", "backend=torch,jax"], '"jax" is not a backend; installed are: '),
        (["--vary", "ranks=1"], "give at least two"),
        (["--rounds", "99"], "--rounds 99: of train.steps = 240, 10 are warm-up"),
        (["--vary", "vocabulary=300,301", "--set", "model.context=90000"], "context"),
    ],
)
def test_mistakes_end_in_one_message_before_anything_starts(config, tmp_path, arguments, message):
    if "srun" in str(arguments) and shutil.which("srun"):
        pytest.skip("there is an srun here")
    driver = start(config, tmp_path / "out", *arguments)
    text, _ = driver.communicate(timeout=60)
    assert driver.returncode == 2
    lines = [line for line in text.splitlines() if line.startswith("horovod-lm: ")]
    assert len(lines) == 1 and message in lines[0], text
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_the_one_asleep_and_the_one_awake(config, tmp_path):
    driver = start(config, tmp_path / "out")
    read_until(driver, "TensorFlow: starting")
    assert any(process.status() == psutil.STATUS_STOPPED for process in processes_of(driver.pid))
    time.sleep(2)
    begin = time.monotonic()
    driver.send_signal(signal.SIGINT)
    text, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert time.monotonic() - begin < 20
    assert "Traceback" not in text
    assert processes_of(driver.pid) == []
    assert json.loads((tmp_path / "out" / "report.json").read_text())["state"] == "stopped"


def test_a_rank_that_dies_ends_both_runs_and_is_named(config, tmp_path):
    driver = start(config, tmp_path / "out", "--set", "train.steps=100000")
    read_until(driver, "TensorFlow: starting")
    end = time.monotonic() + 20
    while not (awake := awake_ranks(driver, "1")) and time.monotonic() < end:
        time.sleep(0.1)
    awake[0].kill()
    text, _ = driver.communicate(timeout=60)
    assert driver.returncode == 1
    assert "TensorFlow's run failed: rank 1 was ended by signal 9" in text
    assert processes_of(driver.pid) == []
    assert json.loads((tmp_path / "out" / "report.json").read_text())["state"] == "failed"
