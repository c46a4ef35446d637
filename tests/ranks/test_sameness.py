"""The same run whatever it runs on: any number of ranks and micro-batches, either framework, any
optimizer, and a framework and number of ranks that change on the way. Real jobs, with dropout."""

from __future__ import annotations

import numpy as np
import pytest

from tests.parity.compare import within
from tests.ranks.jobs import (
    BACKENDS,
    TRAIN,
    losses,
    needs_horovod,
    rows,
    run_job,
    run_plan,
    write_tiny,
)

pytestmark = needs_horovod

# A text of few windows, the last one short, in batches of 7 of them: the number of targets changes
# from step to step and from rank to rank.
UNEVEN = [
    'data.text=["short.txt"]', "data.vocabulary=257", "train.global_batch_size=7", "train.steps=12",
]  # fmt: skip
WHOLE = {"name": "whole", "set": UNEVEN}
CUT_1 = {"name": "cut-1", "set": [*UNEVEN, "train.micro_batch_size=1"]}

# Runs that change framework and number of ranks at every quarter of their steps: from one rank of
# torch to two of TensorFlow, four of torch, two of TensorFlow.
STEPS = 32
VARIANTS = {
    "adamw": [],
    "adamw-fp64": ["train.precision=fp64"],
    "adafactor": ["optimizer.name=adafactor", "optimizer.learning_rate=0.02"],
    "sgd-fp16": [
        "optimizer.name=sgd", "optimizer.learning_rate=0.02", "train.precision=fp16",
        "loss_scale.initial=1024", "loss_scale.growth_interval=5",
    ],
}  # fmt: skip
OVERFLOWS = {"kind": "overflow", "rank": 0, "steps": [3, 9, 18, 19]}

# The optimizers that no variant has.
RATES = {"adam": 1e-3, "lamb": 1e-2}
OPTIMIZERS = [
    {"name": name, "set": [f"optimizer.name={name}", f"optimizer.learning_rate={rate}"]}
    for name, rate in RATES.items()
]


def crossing(name, quarters, variants=VARIANTS):
    """Trainings of all variants up to the end of a quarter, from where the last one left them."""
    return [
        {
            "name": f"{name}-{variant}",
            "set": [*VARIANTS[variant], f"schedule.updates={STEPS}",
                    f"train.steps={quarters * STEPS // 4}"],
            "faults": [OVERFLOWS] if variant == "sgd-fp16" else [],
            "resume": quarters > 1 and name != "unchanged",
        }
        for variant in variants
    ]  # fmt: skip


# The same folder for all jobs of the crossing.
CROSSED = "../crossed"
PLANS = {
    ("torch", 1): [WHOLE, *crossing("unchanged", 4), *crossing(CROSSED, 1)],
    ("tensorflow", 2): [*crossing(CROSSED, 2), *OPTIMIZERS],
    ("torch", 4): [WHOLE, *crossing(CROSSED, 3)],
    ("torch", 2): OPTIMIZERS,
    ("torch", 3): [WHOLE, CUT_1],
    ("tensorflow", 3): [WHOLE, CUT_1],
    ("tensorflow", 4): [WHOLE],
}
BEFORE = {("tensorflow", 2): ("torch", 1), ("torch", 4): ("tensorflow", 2)}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = write_tiny(tmp_path_factory.mktemp("sameness"))
    paragraphs = (config.parent / "text.txt").read_text().split("\n\n")
    (config.parent / "short.txt").write_text("\n\n".join(paragraphs[:4]))
    return config


def run(config, folder, plan, backend, ranks):
    for answers in run_plan(folder, config, plan, backend, ranks, limit=240.0):
        assert [answer["error"] for answer in answers] == [None] * ranks


@pytest.fixture(scope="module")
def done(config):
    """The folder of the job of a backend on a number of ranks, run when first asked for."""
    folders = {}

    def job(backend, ranks):
        if (backend, ranks) not in folders:
            if (backend, ranks) in BEFORE:
                job(*BEFORE[backend, ranks])
            folder = folders[backend, ranks] = config.parent / f"{backend}-{ranks}"
            run(config, folder, PLANS[backend, ranks], backend, ranks)
        return folders[backend, ranks]

    return job


def difference(a, b):
    """The largest difference of two curves."""
    return float(np.abs(np.array(a) - np.array(b)).max())


@pytest.mark.parametrize("optimizer", RATES)
def test_every_optimizer_trains_alike_in_both_frameworks(optimizer, done):
    curves = [losses(done(backend, 2) / optimizer) for backend in BACKENDS]
    assert len(curves[0]) == 25 and curves[0][-1] < curves[0][0] - 0.1
    within(f"loss curve of {optimizer}, tensorflow to torch", difference(*curves), 1e-4)


@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_curve_does_not_depend_on_the_layout(backend, ranks, done):
    """test_train.py has even batches on 1, 2 and 4 ranks."""
    expected = rows(done("torch", 1) / "whole")
    targets = [row["tokens"] for row in expected]
    assert len(targets) == 12 and len(set(targets)) > 1
    for name in [entry["name"] for entry in (WHOLE, CUT_1) if entry in PLANS[backend, ranks]]:
        found = rows(done(backend, ranks) / name)
        assert [row["tokens"] for row in found] == targets
        apart = difference(*([row["loss"] for row in r] for r in (found, expected)))
        within(f"loss curve, {backend} on {ranks} ranks to torch on 1", apart, 1e-5)
        norms = [np.array([row["norm"] for row in r]) for r in (found, expected)]
        apart = float(np.abs(norms[0] / norms[1] - 1).max())
        within(f"norm of the gradient, {backend} on {ranks} ranks to torch on 1", apart, 1e-4)


def test_a_run_that_changes_framework_at_every_quarter_follows_the_unchanged_one(config, done):
    """The scales and skipped steps of fp16 too. The last quarter of one of them goes by the
    command line."""
    unchanged, crossed = done("torch", 1), config.parent
    assert done("torch", 4)
    last = crossing(CROSSED, 4, ["adamw-fp64", "adafactor", "sgd-fp16"])
    run(config, crossed / "last", last, "tensorflow", 2)
    (entry,) = crossing("crossed", 4, ["adamw"])
    overrides = [part for pair in entry["set"] for part in ("--set", pair)]
    arguments = [*TRAIN, str(config), "--backend", "tensorflow", *overrides]
    arguments += ["--resume", "--output", str(crossed / "crossed-adamw")]
    result = run_job(crossed / "cli.log", arguments, 2)
    assert result.code == 0, result.text
    assert "resuming from step-00000024" in result.text
    limits = {"adamw": 1e-5, "adamw-fp64": 1e-13, "adafactor": 1e-5, "sgd-fp16": 5e-4}
    for variant, limit in limits.items():
        expected = rows(unchanged / f"unchanged-{variant}")
        found = rows(crossed / f"crossed-{variant}")
        assert [row["step"] for row in found] == list(range(1, STEPS + 1))
        for key in ("updates", "loss_scale", "skipped", "learning_rate", "tokens"):
            assert [row[key] for row in found] == [row[key] for row in expected], key
        apart = difference(*([row["loss"] or 0 for row in r] for r in (found, expected)))
        within(f"loss curve of {variant}, changed at every quarter to unchanged", apart, limit)
    assert found[-1]["loss"] < found[0]["loss"] - 0.1
    assert rows(crossed / "crossed-sgd-fp16")[-1]["skipped"] == 4
