"""Learning rates against values worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horovod_lm.config import Optimizer, Schedule
from horovod_lm.schedule import learning_rate


def rate(update, steps=100, peak=0.8, **schedule):
    return learning_rate(update, Optimizer(learning_rate=peak), Schedule(**schedule), steps)


# peak 0.8, warm-up 4, end 100 or 20, final fraction 0.1: by hand.
@pytest.mark.parametrize(
    ("name", "updates", "expected"),
    [
        *[(name, 0, 0.2) for name in ("cosine", "linear", "inverse_sqrt", "constant")],
        *[(name, 1, 0.4) for name in ("cosine", "linear", "inverse_sqrt", "constant")],
        *[(name, 3, 0.8) for name in ("cosine", "linear", "inverse_sqrt", "constant")],
        *[(name, 4, 0.8) for name in ("cosine", "linear", "inverse_sqrt", "constant")],
        ("cosine", 8, 0.08 + 0.72 * (1 + math.sqrt(0.5)) / 2),  # a quarter: cos(pi/4)
        ("cosine", 12, 0.44),  # half-way
        ("cosine", 16, 0.08 + 0.72 * (1 - math.sqrt(0.5)) / 2),
        ("cosine", 20, 0.08),
        ("cosine", 21, 0.08),
        ("cosine", 10**9, 0.08),
        ("linear", 8, 0.62),
        ("linear", 12, 0.44),
        ("linear", 19, 0.08 + 0.72 / 16),
        ("linear", 20, 0.08),
        ("linear", 10**9, 0.08),
        ("inverse_sqrt", 16, 0.4),
        ("inverse_sqrt", 100, 0.16),
        ("inverse_sqrt", 400, 0.08),
        ("constant", 10**9, 0.8),
    ],
)
def test_golden(name, updates, expected):
    schedule = {"name": name, "warmup": 4, "updates": 20, "final_fraction": 0.1}
    assert rate(updates, **schedule) == pytest.approx(expected, rel=1e-14)


def test_the_end_is_train_steps_unless_set():
    assert rate(100, name="linear", warmup=0, final_fraction=0.5) == 0.4
    assert rate(50, name="linear", warmup=0, final_fraction=0.5) == pytest.approx(0.6)
    assert rate(50, name="linear", warmup=0, final_fraction=0.5, updates=50) == 0.4


def test_without_warm_up_the_first_update_has_the_peak():
    for name in ("cosine", "linear", "inverse_sqrt", "constant"):
        assert rate(0, name=name, warmup=0) == 0.8
    assert rate(4, name="inverse_sqrt", warmup=0) == 0.4


def test_a_warm_up_longer_than_the_run():
    assert rate(1, steps=2, name="cosine", warmup=8) == 0.2
    assert rate(7, steps=2, name="cosine", warmup=8) == 0.8
    assert rate(8, steps=2, name="cosine", warmup=8, final_fraction=0.25) == 0.2


schedules = st.builds(
    Schedule,
    name=st.sampled_from(["cosine", "linear", "inverse_sqrt", "constant"]),
    warmup=st.integers(0, 50),
    updates=st.none() | st.integers(1, 100),
    final_fraction=st.floats(0, 1),
)


@given(schedules, st.integers(1, 100))
def test_every_schedule_rises_to_the_peak_and_then_never_rises(schedule, steps):
    rates = [learning_rate(u, Optimizer(), schedule, steps) for u in range(160)]
    assert all(0 <= r <= Optimizer().learning_rate * (1 + 1e-15) for r in rates)
    rising, falling = rates[: schedule.warmup], rates[schedule.warmup :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if schedule.name in ("cosine", "linear"):
        final = Optimizer().learning_rate * schedule.final_fraction
        assert rates[max(schedule.warmup, schedule.updates or steps)] == final
