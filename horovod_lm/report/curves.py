"""How far apart losses may be, and two curves are."""

from __future__ import annotations

from dataclasses import dataclass

MARGIN = 1e-4  # nats; what rounding may do to two fp32 loss curves
# Training amplifies rounding differences step by step, so the margin is for the first steps only.
MARGIN_STEPS = 200
# Nats of the final loss over several seeds: a hundredth of the perplexity.
SEED_MARGIN = 0.01


@dataclass(frozen=True)
class Curves:
    """The absolute difference of two loss curves at the steps that both have; nats."""

    steps: list[int]
    differences: list[float]

    @property
    def largest(self) -> float:
        return max(self.differences)

    @property
    def at(self) -> int:
        """The step of the largest difference."""
        return self.steps[self.differences.index(self.largest)]

    @property
    def early(self) -> float:
        """The largest difference of the first `MARGIN_STEPS` steps."""
        pairs = zip(self.steps, self.differences, strict=True)
        return max((d for s, d in pairs if s <= MARGIN_STEPS), default=self.largest)

    @property
    def leaves_at(self) -> int | None:
        """The first step whose difference is beyond the margin."""
        pairs = zip(self.steps, self.differences, strict=True)
        return next((step for step, difference in pairs if difference > MARGIN), None)
