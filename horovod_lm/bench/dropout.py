"""`bench dropout`: what masks cost that are the same in every framework."""

from __future__ import annotations

from collections.abc import Sequence

from horovod_lm.bench.result import BenchResult
from horovod_lm.bench.variants import compare_variants
from horovod_lm.config import Config, with_keys
from horovod_lm.errors import UserError

AIM = 1.0  # step time with shared masks / with the framework's own generator


def measure(config: Config, *, backends: Sequence[str], rounds: int, seconds: float) -> BenchResult:
    """Measure steps with shared masks, with the framework's own generator and without dropout.

    Raises `UserError` if the config has no dropout.
    """
    model = config.model
    if not (model.dropout or model.attention_dropout):
        raise UserError(
            "model.dropout and model.attention_dropout are 0, so that no masks are made; "
            "set one of them above 0"
        )
    configs = {
        name: with_keys(config, train={"dropout_generator": name}) for name in ("shared", "native")
    }
    configs["none"] = with_keys(config, model={"dropout": 0.0, "attention_dropout": 0.0})
    result = BenchResult("dropout", "Dropout by shared masks, by the framework's and none", [])
    result.settings |= {
        "dropout": model.dropout,
        "attention_dropout": model.attention_dropout,
    }
    return compare_variants(
        result,
        configs,
        [("shared", "native", AIM), ("shared", "none", None), ("native", "none", None)],
        backends=backends,
        rounds=rounds,
        seconds=seconds,
    )
