"""What the neutral side knows of optimizers: their keys and the shapes of their moments."""

import pytest

from horovod_lm.config import Optimizer
from horovod_lm.optimizers import KEYS, moment_shapes, moment_size
from horovod_lm.spec import ModelSpec

SHAPES = {"kernel": (4, 6), "bias": (6,)}


def test_the_keys_are_those_of_the_config():
    known = set(Optimizer.model_fields) - {"name", "learning_rate"}
    assert {key for keys in KEYS.values() for key in keys} == known
    for name in KEYS:
        Optimizer(name=name)


@pytest.mark.parametrize(
    ("name", "moments"),
    [
        ("adamw", {"first": SHAPES, "second": SHAPES}),
        ("adam", {"first": SHAPES, "second": SHAPES}),
        ("lamb", {"first": SHAPES, "second": SHAPES}),
        ("sgd", {"first": SHAPES}),
        (
            "adafactor",
            {"row": {"kernel": (4,)}, "column": {"kernel": (6,)}, "second": {"bias": (6,)}},
        ),
    ],
)
def test_the_shapes_of_moments(name, moments):
    assert moment_shapes(name, SHAPES) == moments
    sizes = {"first": 30, "second": 30, "row": 4, "column": 6}
    if name == "adafactor":
        sizes["second"] = 6
    assert moment_size(name, SHAPES) == sum(sizes[moment] for moment in moments)


def test_an_estimate_of_memory_counts_the_moments_of_the_optimizer():
    spec = ModelSpec()
    moments = {name: spec.memory(1, "fp32", name)["moments"] for name in KEYS}
    assert moments["adamw"] == moments["adam"] == moments["lamb"] == 8 * spec.size
    assert moments["sgd"] == 4 * spec.size
    assert moments["adafactor"] < 0.05 * spec.size
