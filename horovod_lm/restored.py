"""From a run back to a model that can be used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horovod_lm import checkpoint, environment
from horovod_lm.agreement import agreed
from horovod_lm.backend import Communicator, Engine, EngineState, load_backend
from horovod_lm.config import Config, load_config
from horovod_lm.convert.folder import TOKENIZER
from horovod_lm.convert.run import read_imported
from horovod_lm.data.prepare import Prepared, prepare
from horovod_lm.data.tokenizer import Tokenizer
from horovod_lm.errors import UserError
from horovod_lm.hooks import evaluated, local_evaluation, no_sums
from horovod_lm.objectives.registry import factors, loss_kinds
from horovod_lm.run_folder import IMPORTED
from horovod_lm.train import make_engine, rank_validation, split_feeds


@dataclass
class Restored:
    """A run's model, ready to be used. `prepared` is None where only the tokenizer was asked for
    and an imported model has its own; `start` is the token with which such a model's decoder
    begins, if it says so."""

    config: Config
    prepared: Prepared | None
    tokenizer: Tokenizer
    engine: Engine
    communicator: Communicator
    step: int
    start: int | None = None


def restore(run: Path, backend: str | None, data: bool = True) -> Restored:
    """Load the newest valid checkpoint of a run's folder into `backend` (default: the one it was
    trained with), with its data unless an imported model can do without. Without data it is there
    to generate text. Raises `UserError` if there is none, or its model can't do that."""
    if not (run / "config.toml").exists():
        raise UserError(f"{run} is not the folder of a run: it has no config.toml")
    overrides = [f"launch.backend={json.dumps(backend)}"] if backend else []
    config = load_config(run / "config.toml", overrides)
    if not data and "decoder" not in config.model.stacks:
        raise UserError(
            f'{run} is a model of kind "{config.model.kind}", which has no decoder to generate with'
        )
    path = checkpoint.newest(run / "checkpoints", log=print)
    if path is None:
        raise UserError(f"{run} has no checkpoint yet; let it train to its first one")
    checkpoint.check_model(path, config.model)
    threads = environment.apply(config)
    own = None if data else read_imported(run)
    tokenizer = None
    if own is not None and TOKENIZER in own.companions:
        tokenizer = Tokenizer.load(run / IMPORTED / TOKENIZER)
    prepared = None if tokenizer is not None else prepare(config)
    if prepared is not None:
        tokenizer = prepared.tokenizer
    loaded = load_backend(config.launch.backend, threads)
    communicator = loaded.communicator()
    state = checkpoint.load(path)
    engine = make_engine(config, loaded, communicator)
    engine.load_state(EngineState(state.engine.weights))
    assert tokenizer is not None
    start = None if own is None else own.decoder_start
    return Restored(config, prepared, tokenizer, engine, communicator, state.step, start)


def evaluate(restored: Restored) -> dict[str, Any]:
    """Collective: what `hooks.evaluated` says of the validation documents, in sum with the weights
    of the step; the step, and the unigram entropy."""
    config, communicator, prepared = restored.config, restored.communicator, restored.prepared
    assert prepared is not None
    kinds = loss_kinds(config)
    local = no_sums(kinds)
    with agreed(communicator):
        feeds = split_feeds(config, prepared, "validation")
        batches = rank_validation(config, feeds, communicator)
        local = local_evaluation(restored.engine, batches, kinds)
    sums = communicator.allreduce(local)
    return {
        "step": restored.step,
        **evaluated(kinds, sums, factors(config, max(0, restored.step - 1))),
        "unigram_entropy": prepared.unigram_entropy,
    }
