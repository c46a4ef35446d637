"""The loss scaler: a state machine in plain Python, so that frameworks cannot differ in it."""

from __future__ import annotations

from collections.abc import Mapping

from horovod_lm.config import LossScale
from horovod_lm.errors import RunFailed, UserError


class LossScaler:
    """Dynamic or static loss scaling (Micikevicius et al., 2018, section 3.2).

    Give it, after every step, whether the reduced gradient was finite; it says whether to apply the
    step. The dynamic rule is the one of Apex and Megatron:

    - a finite step counts; after `growth_interval` of them without an overflow between, the scale
      is multiplied by `growth_factor` (never above `maximum`), the count starts again, and the
      overflow allowance is refilled to `hysteresis`;
    - an overflow skips the step, starts the count again and takes one from the allowance; while
      none is left, it also multiplies the scale by `backoff_factor` (never below `minimum`). So
      the first back-off takes `hysteresis` overflows, in a row or not, and each further overflow
      before the next refill is a back-off of its own.

    A static scale never changes and still skips. Where the precision needs no scaler (`enabled` is
    false) the scale is 1.
    """

    def __init__(self, settings: LossScale, enabled: bool) -> None:
        self._settings = settings
        self._enabled = enabled
        self.scale = settings.initial if enabled else 1.0
        self.skipped = 0
        self._finite_steps = 0
        self._allowance = settings.hysteresis

    def update(self, finite: bool) -> bool:
        """Note whether a step's gradient was finite on every element; True: apply the step.

        Raises `RunFailed` if a back-off is due at the minimum, or, without a scaler, if the
        gradient is not finite.
        """
        if not finite:
            self._overflow()
        elif self._enabled and self._settings.mode == "dynamic":
            self._finite()
        return finite

    def _finite(self) -> None:
        self._finite_steps += 1
        if self._finite_steps == self._settings.growth_interval:
            self.scale = min(self.scale * self._settings.growth_factor, self._settings.maximum)
            self._finite_steps = 0
            self._allowance = self._settings.hysteresis

    def _overflow(self) -> None:
        if not self._enabled:
            raise RunFailed(
                "the gradient is not finite, and this precision has no loss scale to lower; "
                "lower optimizer.learning_rate, lengthen schedule.warmup or set train.max_norm"
            )
        self.skipped += 1
        if self._settings.mode == "static":
            return
        self._finite_steps = 0
        self._allowance = max(self._allowance - 1, 0)
        if self._allowance:
            return
        minimum = self._settings.minimum
        if self.scale <= minimum:
            raise RunFailed(
                f"the gradient overflows although the loss scale is at its minimum, "
                f"loss_scale.minimum = {minimum:g}, after {self.skipped} skipped steps; lower "
                f"optimizer.learning_rate, use train.precision = bf16 or fp32, or allow a lower "
                f"loss_scale.minimum"
            )
        self.scale = max(self.scale * self._settings.backoff_factor, minimum)

    def state(self) -> dict[str, float]:
        """All that a resumed run needs, as JSON can hold it."""
        return {
            "scale": self.scale,
            "skipped": self.skipped,
            "finite_steps": self._finite_steps,
            "allowance": self._allowance,
        }

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from what `state()` gave. Raises `UserError` if it has other keys."""
        if state.keys() != self.state().keys():
            raise UserError(
                f"a loss scaler's state has the keys {', '.join(self.state())}, "
                f"not {', '.join(state) or 'none'}"
            )
        self.scale = float(state["scale"])
        self.skipped = int(state["skipped"])
        self._finite_steps = int(state["finite_steps"])
        self._allowance = int(state["allowance"])
