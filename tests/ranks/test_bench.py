"""The benchmarks with real frameworks, at sizes at which their figures mean nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers import processes_of
from tests.ranks.jobs import needs_horovod

pytestmark = needs_horovod

ROOT = Path(__file__).resolve().parents[2]
needs_peers = pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("keras_hub")),
    reason="needs the extra bench and keras-hub",
)


def start(*arguments):
    """The benchmark as a process, with progress and messages in the same pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "horovod_lm", "bench", *arguments, "--quick"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def measured(output, *arguments):
    """What a benchmark wrote to the file `output`, and what it printed."""
    process = start(*arguments, "--output", str(output))
    text, _ = process.communicate(timeout=280)
    assert process.returncode == 0, text
    assert processes_of(process.pid) == []
    return json.loads(output.read_text()), text


def ratios(report):
    return {ratio["name"]: ratio for ratio in report["ratios"]}


@needs_peers
def test_throughput_measures_ours_peers_and_ceilings(tmp_path):
    report, text = measured(
        tmp_path / "out.json",
        "throughput", "--threads", "1", "--peers", "huggingface,plain,kerashub",
    )  # fmt: skip
    names = [row["contestant"] for row in report["rows"]]
    own = ["torch backend", "TensorFlow backend"]
    assert names[:5] == [*own, "Hugging Face", "plain torch", "KerasHub"]
    assert {"products by torch", "products by TensorFlow"} <= set(names[5:])
    for row in report["rows"]:
        assert len(row["rounds"]) == 2 and min(row["rounds"]) > 0
        low_high = row["interval"]
        assert low_high["low"] <= row["tokens_per_second"] <= low_high["high"]
        assert row["contestant"] in text
    found = ratios(report)
    assert {"TensorFlow backend / KerasHub", "TensorFlow / torch backend"} <= found.keys()
    best = max(report["rows"][2:4], key=lambda row: row["tokens_per_second"])["contestant"]
    assert f"torch backend / {best}" in found
    # A share is the rate times the operations of a token over the ceiling's rate.
    ceiling = report["rows"][names.index("products by torch")]
    assert ceiling["share"] == 1.0
    share = found["torch backend / torch's products"]["ratio"]
    assert share == pytest.approx(report["rows"][0]["share"])
    per_round = [a / b for a, b in zip(report["rows"][0]["rounds"], ceiling["rounds"], strict=True)]
    assert min(per_round) <= share <= max(per_round)


def test_throughput_compares_halves_with_our_own_fp32(tmp_path):
    report, _ = measured(
        tmp_path / "out.json",
        "throughput", "--threads", "1", "--precision", "fp16", "--peers", "none",
    )  # fmt: skip
    found = ratios(report)
    for name in ("torch", "TensorFlow"):
        assert found[f"{name} backend / its own fp32"]["aim"] == 0.9
    assert {row["precision"] for row in report["rows"]} == {"fp16"}


def test_scaling_measures_ranks_against_one_and_against_ddp(tmp_path):
    report, _ = measured(
        tmp_path / "out.json",
        "scaling", "--ranks", "2", "--launcher", "mpirun", "--peers", "ddp",
    )  # fmt: skip
    rows = {
        (r["contestant"], r["ranks"], "apart" if r["launcher"] == "apart" else r["mode"]): r
        for r in report["rows"]
    }
    for name in ("torch backend", "TensorFlow backend", "plain torch in DDP"):
        assert rows[name, 1, "one"]["efficiency"] == 1.0
        assert rows[name, 2, "weak"]["batch"] == "8 (weak)"
        assert rows[name, 2, "strong"]["batch"] == "4 (strong)"
    weak = [r for r in report["ratios"] if r["scaling"] == "weak" and r["launcher"] == "mpirun"]
    aims = {ratio["name"]: ratio["aim"] for ratio in weak}
    assert aims["torch backend / 2 x one rank"] == 0.98
    assert aims["TensorFlow backend / plain torch in DDP"] == 1.05
    assert aims["torch backend / 2 runs apart"] is None
    apart = rows["torch backend", 2, "apart"]
    assert apart["batch"] == "8 (weak)" and 0 < apart["efficiency"] < 2


def test_scaling_over_gloo(tmp_path):
    report, _ = measured(
        tmp_path / "out.json",
        "scaling", "--ranks", "2", "--launcher", "gloo", "--peers", "none", "--backends", "torch",
        "--modes", "weak",
    )  # fmt: skip
    started = [(row["launcher"], row["ranks"]) for row in report["rows"]]
    assert started == [("mpirun", 1), ("gloo", 2), ("apart", 2)]


def test_ctrl_c_leaves_nothing_behind():
    driver = start("throughput", "--threads", "1", "--peers", "none", "--rounds", "100000")
    seen = []
    for line in driver.stdout:
        seen.append(line)
        if "measuring" in line:
            break
    assert processes_of(driver.pid), "".join(seen)
    time.sleep(0.5)
    driver.send_signal(signal.SIGINT)
    text, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "Traceback" not in text
    assert processes_of(driver.pid) == []


# ---- peers are what they are said to be

LOSSES = """
import atexit, json, pathlib, sys
from horovod_lm.backend import load_backend
from horovod_lm.cli.bench import settings
from horovod_lm.bench.training import stream
from horovod_lm.data.batches import share
import numpy as np

name, backend, precision, *out = sys.argv[1:]

@atexit.register  # so early that it runs after what is registered later
def threads():
    names = [file.read_text().strip() for file in pathlib.Path("/proc/self/task").glob("*/comm")]
    print("threads at the end:", *names, file=sys.stderr)

dropout = 0.1 if name == "ddp-own" else 0.0
overrides = (f"train.precision={precision}", f"model.dropout={dropout}",
             f"model.attention_dropout={dropout}", "optimizer.learning_rate=0.01")
config = settings(None, overrides, quick=True)
peer = load_backend(backend, 1).bench().peer(name, config, 1)
context, tokens = config.model.context, stream(config)
mine = share(config.train.global_batch_size, peer.rank, peer.size)
batch = np.stack([tokens.read(row * context, context + 1) for row in mine])
losses = [peer.step(batch) for _ in range(12)]
if out:
    open(f"{out[0]}/{peer.rank}-{peer.size}.json", "w").write(json.dumps(losses))
print(json.dumps(losses))
"""


def run_script(folder, arguments, launcher=()):
    (folder / "losses.py").write_text(LOSSES)
    ended = subprocess.run(
        [sys.executable, *launcher, str(folder / "losses.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    # Gloo's threads may abort a process whose interpreter is gone.
    assert "threads at the end" in ended.stderr
    assert "gloo" not in ended.stderr
    return ended.stdout


@needs_peers
@pytest.mark.parametrize(
    ("name", "backend"),
    [("huggingface", "torch"), ("plain", "torch"), ("kerashub", "tensorflow")],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_peer_learns_a_batch_by_heart(name, backend, precision, tmp_path):
    text = run_script(tmp_path, [name, backend, precision])
    losses = json.loads(text.splitlines()[-1])
    # It begins without a preference among 300 tokens.
    assert losses[0] == pytest.approx(math.log(300), abs=0.15)
    assert losses[-1] < losses[0] - 0.3


def test_ddp_of_our_model_does_not_depend_on_the_number_of_ranks(tmp_path):
    for ranks in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        run_script(tmp_path, ["ddp-own", "torch", "fp32", str(tmp_path)], launcher)

    def losses(rank, ranks):
        return json.loads((tmp_path / f"{rank}-{ranks}.json").read_text())

    halves = zip(losses(0, 2), losses(1, 2), strict=True)
    assert [sum(pair) / 2 for pair in halves] == pytest.approx(losses(0, 1), rel=1e-4)
