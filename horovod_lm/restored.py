"""From a run back to a model that can be used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from horovod_lm import checkpoint, environment
from horovod_lm.agreement import agreed
from horovod_lm.backend import Communicator, Engine, EngineState, load_backend
from horovod_lm.config import Config
from horovod_lm.convert.run import Imported, has_imported_tokenizer, read_imported
from horovod_lm.data.prepare import Prepared, prepare
from horovod_lm.data.tokenizer import Tokenizer
from horovod_lm.errors import UserError
from horovod_lm.hooks import evaluated, local_evaluation, no_sums
from horovod_lm.objectives.registry import (
    check_kind,
    factors,
    loss_kinds,
    prompt_begin,
    prompt_is_prefix,
)
from horovod_lm.objectives.words import decoder_start
from horovod_lm.run_folder import TOKENIZER, tokenizer_file
from horovod_lm.train import make_engine, rank_validation, split_feeds


@dataclass
class Restored:
    """A run's model, ready to be used. `prepared` is None where only the tokenizer was asked for
    and the run has kept it. `imported` is what the run keeps of the model that it was imported
    from, if it reads text as that did."""

    config: Config
    prepared: Prepared | None
    tokenizer: Tokenizer
    engine: Engine
    communicator: Communicator
    step: int
    imported: Imported | None = None

    def prompt(self, text: str) -> tuple[np.ndarray, np.ndarray | None]:
        """What a decoder begins with to go on from `text`, (1, L), or to answer it, with the source
        (1, S) that it answers."""
        ids, imported = self.tokenizer.encode(text, special=True), self.imported
        if self.config.model.kind == "encoder-decoder":
            start = imported.decoder_start if imported else None
            start = decoder_start(self.tokenizer) if start is None else start
            return np.array([[start]], np.int32), np.append(ids, np.int32(self.tokenizer.end))[None]
        if imported:
            opening = self.tokenizer.opening
        else:
            begin = prompt_begin(self.config, self.tokenizer)
            opening = [] if begin is None else [begin]
        return np.concatenate([np.array(opening, np.int32), ids])[None], None

    @property
    def sees_all_of_a_prompt(self) -> bool:
        """Whether the tokens of a prompt all see each other."""
        return prompt_is_prefix(self.config)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return (imported.ends if (imported := self.imported) else ()) or (self.tokenizer.end,)


def restore(run: Path, backend: str | None, data: bool = True) -> Restored:
    """Load the newest valid checkpoint of a run's folder into `backend` (default: the one it was
    trained with), with its data where it is asked for, or the tokenizer can't be had without.
    Raises `UserError` if there is none."""
    overrides = [f"launch.backend={json.dumps(backend)}"] if backend else []
    config = checkpoint.config_of_run(run, overrides)
    if data:
        check_kind(config)
    path = checkpoint.newest_of_run(run, config)
    threads = environment.apply(config)
    own, prepared = None if data else tokenizer_file(run, config), None
    if own is None:
        prepared = prepare(config)
        tokenizer = prepared.tokenizer
    else:
        tokenizer = _load_tokenizer(own, run, config)
    imported = read_imported(run)
    if imported is not None and not has_imported_tokenizer(run, imported, config):
        imported = None
    loaded = load_backend(config.launch.backend, threads)
    communicator = loaded.communicator()
    state = checkpoint.load(path)
    engine = make_engine(config, loaded, communicator)
    engine.load_state(EngineState(state.engine.weights))
    return Restored(config, prepared, tokenizer, engine, communicator, state.step, imported)


def restore_to_generate(run: Path, backend: str | None) -> Restored:
    """`restore` without data. Raises `UserError` for a model that can't generate, at once."""
    spec = checkpoint.config_of_run(run).model
    if "decoder" not in spec.stacks:
        raise UserError(
            f'{run} is a model of kind "{spec.kind}", which has no decoder to generate with'
        )
    return restore(run, backend, data=False)


def _load_tokenizer(path: Path, run: Path, config: Config) -> Tokenizer:
    data, mend = config.data, "put there the one that the run was trained with"
    if path == run / TOKENIZER:
        again = "made of its text" if data.is_trained else f"taken from {data.tokenizer}"
        mend += f", or delete it, and it is {again}"
    tokenizer, most = Tokenizer.load(path, mend), config.model.vocabulary
    if tokenizer.vocabulary > most:
        raise UserError(f"{path} has {tokenizer.vocabulary:,} ids, and the model {most:,}; {mend}")
    return tokenizer


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
