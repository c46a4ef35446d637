"""The loss scaler against traces written out by hand, and properties of every trace."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horovod_lm.config import LossScale
from horovod_lm.errors import RunFailed, UserError
from horovod_lm.loss_scale import LossScaler

# Each row: settings, steps (. finite, x overflow), and the scale after each step, by hand.
# Unless a row says otherwise: initial 8, growth x 2 after 3, back-off x 0.5, hysteresis 1, 1 to 32.
TRACES = [
    ("grows after every third finite step", {}, "......", [8, 8, 16, 16, 16, 32]),
    ("backs off at once", {}, "x.x", [4, 4, 2]),
    ("an overflow starts the count again", {}, "..x...", [8, 8, 4, 4, 4, 8]),
    ("overflows in a row", {}, "xxx", [4, 2, 1]),
    ("stays at the maximum", {"initial": 32}, "......", [32] * 6),
    ("growth stops at the maximum", {"initial": 20}, "......", [20, 20, 32, 32, 32, 32]),
    ("backs off to the minimum only", {"minimum": 6}, "x", [6]),
    ("grows again from the minimum", {"minimum": 6}, "x...", [6, 6, 6, 12]),
    ("interval 1", {"growth_interval": 1}, "..x.", [16, 32, 16, 32]),
    ("other factors", {"growth_factor": 3, "backoff_factor": 0.25}, "...x", [8, 8, 24, 6]),
    ("factors off the powers of 2", {"backoff_factor": 0.75}, "xx", [6, 4.5]),
    ("hysteresis 2: the second overflow", {"hysteresis": 2}, "xx", [8, 4]),
    ("hysteresis 2: then every further one", {"hysteresis": 2}, "xxxx", [8, 4, 2, 1]),
    ("hysteresis 2: not only in a row", {"hysteresis": 2}, "x..x", [8, 8, 8, 4]),
    ("hysteresis 2: growth refills it", {"hysteresis": 2}, "xx...xx", [8, 4, 4, 4, 8, 8, 4]),
    ("hysteresis 2: growth refills a part", {"hysteresis": 2}, "x...xx", [8, 8, 8, 16, 16, 8]),
    (
        "hysteresis 2: refilled at the maximum too",
        {"hysteresis": 2, "initial": 32},
        "x...xx",
        [32, 32, 32, 32, 32, 16],
    ),
    ("hysteresis 3", {"hysteresis": 3}, "xxx.x", [8, 8, 4, 4, 2]),
    (
        "hysteresis 2: the minimum is borne once",
        {"hysteresis": 2, "initial": 1},
        "x...",
        [1, 1, 1, 2],
    ),
    ("static", {"mode": "static"}, ".x....x.", [8] * 8),
    (
        "static at the minimum",
        {"mode": "static", "minimum": 8},
        "xxxx",
        [8] * 4,
    ),
]


def settings(**changes):
    small = {"initial": 8, "growth_interval": 3, "minimum": 1, "maximum": 32}
    return LossScale(**{**small, **changes})


@pytest.mark.parametrize(
    ("changes", "steps", "scales"), [row[1:] for row in TRACES], ids=[row[0] for row in TRACES]
)
def test_trace(changes, steps, scales):
    scaler = LossScaler(settings(**changes), enabled=True)
    assert scaler.scale == settings(**changes).initial
    applied, seen = [], []
    for step in steps:
        applied.append(scaler.update(step == "."))
        seen.append(scaler.scale)
    assert seen == scales
    assert applied == [step == "." for step in steps]
    assert scaler.skipped == steps.count("x")


def test_the_fields_defaults():
    scaler = LossScaler(LossScale(), enabled=True)
    assert scaler.scale == 65536
    for _ in range(2000):
        assert scaler.scale == 65536
        scaler.update(True)
    assert scaler.scale == 131072
    scaler.update(False)
    assert scaler.scale == 65536


@pytest.mark.parametrize(
    ("changes", "steps", "skipped"),
    [
        ({}, "xxxx", 4),
        ({"initial": 1}, "..x", 1),
        ({"initial": 1, "hysteresis": 2}, "xx", 2),
        ({"minimum": 6}, "x..x", 2),
    ],
)
def test_an_overflow_at_the_minimum_ends_the_run(changes, steps, skipped):
    scaler = LossScaler(settings(**changes), enabled=True)
    for step in steps[:-1]:
        scaler.update(step == ".")
    with pytest.raises(RunFailed) as caught:
        scaler.update(False)
    message = str(caught.value)
    minimum = settings(**changes).minimum
    assert f"loss_scale.minimum = {minimum:g}, after {skipped} skipped steps" in message
    assert "learning_rate" in message and "bf16" in message


def test_without_a_scaler_the_scale_is_1_and_an_overflow_ends_the_run():
    scaler = LossScaler(settings(), enabled=False)
    for _ in range(10):
        assert scaler.update(True)
        assert scaler.scale == 1.0
    with pytest.raises(RunFailed, match=r"not finite.*no loss scale to lower"):
        scaler.update(False)


def test_a_state_with_other_keys_is_refused():
    scaler = LossScaler(settings(), enabled=True)
    with pytest.raises(UserError, match=r"scale, skipped, finite_steps, allowance, not scale$"):
        scaler.load_state({"scale": 4.0})


@st.composite
def all_settings(draw):
    minimum = draw(st.floats(2.0**-10, 2.0**10))
    initial = minimum * draw(st.floats(1, 2.0**10))
    return LossScale(
        minimum=minimum,
        initial=initial,
        maximum=initial * draw(st.floats(1, 2.0**10)),
        growth_factor=draw(st.floats(1.001, 1024)),
        backoff_factor=draw(st.floats(0.001, 0.999)),
        growth_interval=draw(st.integers(1, 6)),
        hysteresis=draw(st.integers(1, 4)),
        mode=draw(st.sampled_from(["dynamic", "static"])),
    )


def run(scaler, steps):
    """The scale after each step; None in place of it where the run ends."""
    scales = []
    for finite in steps:
        try:
            assert scaler.update(finite) == finite
        except RunFailed:
            return [*scales, None]
        scales.append(scaler.scale)
    return scales


@given(all_settings(), st.lists(st.booleans(), max_size=60))
def test_bounds_and_counts_hold_in_every_trace(settings, steps):
    scaler = LossScaler(settings, enabled=True)
    scales = run(scaler, steps)
    ended = bool(scales) and scales[-1] is None
    kept = scales[:-1] if ended else scales
    assert all(settings.minimum <= scale <= settings.maximum for scale in kept)
    assert scaler.skipped == steps[: len(scales)].count(False)
    if ended:
        assert settings.mode == "dynamic"
        assert ([settings.initial, *kept])[-1] == settings.minimum
    before = settings.initial
    for finite, scale in zip(steps, kept, strict=False):
        assert scale >= before if finite else scale <= before
        before = scale


@given(all_settings(), st.lists(st.booleans(), max_size=60), st.integers(0, 60))
def test_a_resumed_scaler_goes_on_identically(settings, steps, cut):
    whole = LossScaler(settings, enabled=True)
    expected = run(whole, steps)
    first = LossScaler(settings, enabled=True)
    begun = run(first, steps[:cut])
    if None in begun:
        return
    second = LossScaler(settings, enabled=True)
    second.load_state(json.loads(json.dumps(first.state())))
    assert begun + run(second, steps[cut:]) == expected
    assert second.state() == whole.state()
