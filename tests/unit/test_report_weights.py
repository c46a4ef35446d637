"""The drift of two runs' weights, from the sketches in their metrics."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from horovod_lm.config import make_config
from horovod_lm.console import TrainingConsole
from horovod_lm.randomness import initial_weights
from horovod_lm.report.runs import Run
from horovod_lm.report.weights import WHOLE, weight_drift
from horovod_lm.sketch import ERROR, layer_of, sketch
from horovod_lm.tensorboard_log import TensorBoardLog

MODEL = {"width": 32, "layers": 2, "heads": 2, "feed_forward": 64, "context": 16}
CONFIG = make_config({"model": MODEL, "data": {"vocabulary": 400}}, "test")


def run_of(weights_by_step, config=CONFIG):
    rows = [
        {"kind": "weights", "step": step, "time": 0.0,
         "sketch": {name: found.tolist() for name, found in sketch(weights).items()}}
        for step, weights in weights_by_step.items()
    ]  # fmt: skip
    run = Run(Path("nowhere"), {"backend": "torch"}, [], weights=rows)
    run.config = config
    return run


@pytest.fixture(scope="module")
def histories():
    """Two runs from one start: the second strays by a hundredth of the way in block 1, a tenth in
    block 2 and not at all in the embeddings."""
    generator = np.random.default_rng(3)
    start = initial_weights(CONFIG.model, 1)
    moves = {n: 0.1 * generator.standard_normal(a.shape) for n, a in start.items()}
    strays = {n: 0.1 * generator.standard_normal(a.shape) for n, a in start.items()}
    share = {"embeddings": 0.0, "decoder.0": 0.01, "decoder.1": 0.1, "decoder.norm": 1.0}
    first = {s: {n: a + s * moves[n] for n, a in start.items()} for s in (0, 1, 2)}
    second = {
        s: {n: a + s * share[layer_of(n)] * strays[n] for n, a in weights.items()}
        for s, weights in first.items()
    }
    return first, second


def test_drift_is_the_difference_by_the_way_that_was_made(histories):
    first, second = histories
    drift = weight_drift(run_of(second), run_of(first))
    assert drift.steps == [1, 2]  # at the start nothing has moved
    assert list(drift.layers) == ["embeddings", "block 1", "block 2", "final norm", WHOLE]
    norm = lambda values: np.sqrt(sum((v**2).sum() for v in values))  # noqa: E731
    for layer, name in (("block 1", "decoder.0"), ("block 2", "decoder.1")):
        names = [n for n in first[0] if layer_of(n) == name]
        true = norm(second[2][n] - first[2][n] for n in names) / norm(
            first[2][n] - first[0][n] for n in names
        )
        # two estimated norms, so twice the variance of one
        assert drift.layers[layer][1] == pytest.approx(true, rel=4 * 2**0.5 * ERROR)
    assert drift.layers["embeddings"] == [0.0, 0.0]
    assert drift.layers["block 1"][0] < drift.layers[WHOLE][0] < drift.layers["block 2"][0]


def test_steps_that_only_one_has_are_left_out(histories):
    first, second = histories
    some = {step: weights for step, weights in second.items() if step != 1}
    assert weight_drift(run_of(some), run_of(first)).steps == [2]


def test_no_drift_is_made_up(histories):
    first, second = histories
    without_start = {step: weights for step, weights in first.items() if step}
    assert weight_drift(run_of(second), run_of(without_start)) is None
    assert weight_drift(run_of({}), run_of(first)) is None
    wider = make_config({"model": MODEL | {"width": 64}, "data": {"vocabulary": 400}}, "test")
    assert weight_drift(run_of(second, wider), run_of(first)) is None


def test_neither_the_log_nor_tensorboard_shows_sketches(tmp_path, capsys, histories):
    row = replace(run_of(histories[0])).weights[0]
    with TrainingConsole(10, 0, 1) as console:
        console(row)
    assert capsys.readouterr().out == ""
    board = TensorBoardLog(tmp_path)
    (file,) = tmp_path.iterdir()
    size = file.stat().st_size
    board(row)
    board.close()
    assert file.stat().st_size == size
