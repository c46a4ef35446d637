"""The configuration of a run: TOML and `--set key=value`, validated, resolved, and its digest."""

from horovod_lm.config.faults import unknown_key
from horovod_lm.config.loading import (
    load_config,
    make_config,
    preset_config,
    read_value,
    to_toml,
    with_keys,
)
from horovod_lm.config.sections import (
    TOKENIZERS,
    Batching,
    Checkpoints,
    Data,
    Documents,
    Evaluation,
    Format,
    Launch,
    LossScale,
    Objective,
    Optimizer,
    Output,
    Schedule,
    Source,
    Train,
)
from horovod_lm.config.whole import MOST_PROFILED, Config, flatten, known_keys

__all__ = [
    "MOST_PROFILED",
    "TOKENIZERS",
    "Batching",
    "Checkpoints",
    "Config",
    "Data",
    "Documents",
    "Evaluation",
    "Format",
    "Launch",
    "LossScale",
    "Objective",
    "Optimizer",
    "Output",
    "Schedule",
    "Source",
    "Train",
    "flatten",
    "known_keys",
    "load_config",
    "make_config",
    "preset_config",
    "read_value",
    "to_toml",
    "unknown_key",
    "with_keys",
]
