"""`bench loss-scaling`: what the dynamic loss scaler costs in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from horovod_lm.bench.result import BenchResult
from horovod_lm.bench.training import OwnTraining
from horovod_lm.bench.variants import Variants, compare_variants
from horovod_lm.config import Config, with_keys
from horovod_lm.loss_scale import LossScaler

AIM = 1.02  # step time with the scaler / without
SCALE = 2.0**10  # low enough that no step overflows: a skipped one would be a short one


class _Unscaled(OwnTraining):
    """fp16 without a scaler: scale 1, gradients neither checked on this rank nor unscaled."""

    def __init__(self, config: Mapping[str, Any], threads: int) -> None:
        super().__init__(config, threads)
        self._scaler = LossScaler(self._config.loss_scale, enabled=False)
        engine: Any = self._engine
        # The model is made; from here on the engine asks its precision for the check alone.
        engine.settings = replace(engine.settings, precision="fp32")


class Scalings(Variants):
    """The training with and without a loss scaler."""

    def training(self, name: str, config: Mapping[str, Any], threads: int) -> OwnTraining:
        """The training `dynamic` or `none`."""
        return (_Unscaled if name == "none" else OwnTraining)(config, threads)


def measure(config: Config, *, backends: Sequence[str], rounds: int, seconds: float) -> BenchResult:
    """Measure fp16 steps with the dynamic scaler (check of this rank's gradients, unscaling, the
    scaler itself) against fp16 steps without."""
    scaling = {"mode": "dynamic", "initial": SCALE}
    config = with_keys(config, train={"precision": "fp16"}, loss_scale=scaling)
    result = BenchResult("loss-scaling", "fp16 with a dynamic loss scaler and without", [])
    result.notes.append(
        "none: loss scale 1, no check of this rank's gradients, no unscaling. Whether the reduced "
        "gradient is finite both know from its norm."
    )
    return compare_variants(
        result,
        {"dynamic": config, "none": config},
        [("dynamic", "none", AIM)],
        backends=backends,
        work=f"{__name__}:Scalings",
        rounds=rounds,
        seconds=seconds,
    )
