"""From a config to a trained run."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from horovod_lm import checkpoint, environment
from horovod_lm.agreement import agreed, explain, together
from horovod_lm.backend import (
    INTERRUPT,
    STOP,
    Backend,
    Communicator,
    Engine,
    EngineSettings,
    EngineState,
    MicroBatch,
    Precision,
    load_backend,
)
from horovod_lm.config import Config
from horovod_lm.console import TrainingConsole
from horovod_lm.data.batches import Batches, validation_batches
from horovod_lm.data.feeds import Feed
from horovod_lm.data.prepare import Prepared, prepare
from horovod_lm.decode import generate
from horovod_lm.drift import compare_replicas
from horovod_lm.errors import CollectiveFailed, HorovodLmError, Stopped, UserError
from horovod_lm.hooks import (
    Checkpoint,
    Evaluation,
    Metrics,
    MetricsFile,
    ReplicaCheck,
    WeightSketches,
    peak_memory,
)
from horovod_lm.loop import Hook, Run, train_steps
from horovod_lm.loss_scale import LossScaler
from horovod_lm.objectives import Corpus
from horovod_lm.objectives.registry import (
    Split,
    check_kind,
    factors,
    loss_kinds,
    loss_names,
    make_feeds,
    prompt_begin,
    prompt_is_prefix,
)
from horovod_lm.randomness import initial_weights
from horovod_lm.run_folder import (
    STATE,
    TOKENIZER,
    RunRecord,
    carry_over,
    claim,
    default_folder,
    keep_tokenizer,
)
from horovod_lm.schedule import learning_rate
from horovod_lm.topology import place
from horovod_lm.variants import display_name
from horovod_lm.watchdog import Watchdog

EVALUATION_ROWS = 16  # most rows of one forward in an evaluation
HANDSHAKE_SECONDS = 60  # for the first collective, when all ranks have come
SAMPLE_TOKENS = 32  # of the prompt, and of its continuation, in a finished run's sample


def train(config: Config, *, output: Path | None, resume: bool, dry_run: bool = False) -> None:
    """Train the run of `config` on this rank of the job that the launcher started.

    `output` is the run's folder; None: `runs/NAME-TIME`. Raises `UserError`, `RunFailed` or
    `Stopped`; in a job of several ranks on all of them alike, with `shown_by_me` on one.
    """
    if resume and output is None:
        raise UserError("--resume needs the folder of the run: give --output")
    check_kind(config)
    if output is not None:
        claim_check(output, resume)
    if config.train.start_from is not None and not resume:
        checkpoint.check_start(Path(config.train.start_from), config.model)
    threads = environment.apply(config)
    prepared = prepare(config)
    splits = all_feeds(config, prepared)  # what they lack is said before the work begins
    backend = load_backend(config.launch.backend, threads)
    watchdog = Watchdog(2 * config.launch.stall_seconds)
    communicator = watchdog.communicator(backend.communicator())
    try:
        # Frameworks name their collectives in different ways, so ranks of two would wait for good.
        with watchdog.limit(
            HANDSHAKE_SECONDS,
            "the ranks do not understand each other; start all of them with the same --backend",
            UserError.exit_code,
        ):
            same_config(communicator, config, prepared)
        if dry_run:
            with agreed(communicator):
                make_engine(config, backend, communicator)
            return
        Training(config, prepared, backend, communicator, threads, output, resume, splits).run()
    except HorovodLmError as error:
        if error.shown_by_me is not None:
            _leave(communicator, error.shown_by_me)
        raise
    communicator.shutdown()


def _leave(communicator: Communicator, printing: bool) -> None:
    """Before all ranks end with the same error: launchers end a job as soon as one rank has failed,
    so wait until rank 0 has written its record, and let the rank that prints be the first."""
    with suppress(CollectiveFailed):
        communicator.barrier()
    if not printing:
        time.sleep(1)


def claim_check(output: Path, resume: bool) -> None:
    """Refuse, before any work, a folder that `claim` would refuse."""
    if os.path.exists(output / STATE):
        claim(output, resume)


def same_config(communicator: Communicator, config: Config, prepared: Prepared) -> None:
    """Collective: raise `UserError`, naming the keys, unless all ranks have the same run."""
    mine = config.flat
    mine["launch.backend"] = config.launch.backend
    mine["digest of the prepared data"] = prepared.manifest["digest"]
    ranks = [json.loads(text) for text in communicator.allgather(json.dumps(mine).encode())]
    for rank, other in enumerate(ranks):
        keys = [key for key in ranks[0] if ranks[0][key] != other.get(key)]
        if keys:
            differences = ", ".join(f"{k}: {ranks[0][k]} and {other.get(k)}" for k in keys)
            raise together(
                UserError(
                    f"ranks 0 and {rank} were started with different configs ({differences}); "
                    f"start all ranks with the same file and flags"
                ),
                communicator,
            )


def make_engine(
    config: Config,
    backend: Backend,
    communicator: Communicator,
    precision: Precision | None = None,
) -> Engine:
    """The engine of a config, with zero weights, in `precision` (default: the config's)."""
    optimizer = config.optimizer
    settings = EngineSettings(
        precision=precision or config.train.precision,
        seed=config.train.seed,
        loss_names=loss_names(config),
        optimizer=optimizer.name,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay,
        dropout_generator=config.train.dropout_generator,
        recompute=config.train.recompute,
    )
    return backend.engine(config.model, settings, communicator)


@dataclass
class Training:
    """One call of `train`, once the ranks can talk to each other."""

    config: Config
    prepared: Prepared
    backend: Backend
    communicator: Communicator
    threads: int
    output: Path | None
    resume: bool
    splits: Mapping[Split, list[Feed]] | None = None

    def run(self) -> None:
        config, communicator = self.config, self.communicator
        with agreed(communicator):
            self.feeds = self.splits or all_feeds(config, self.prepared)
        self.folder = self._claim()
        self.scaler = LossScaler(config.loss_scale, config.train.precision == "fp16")
        with agreed(communicator):
            self.engine = make_engine(config, self.backend, communicator)
        step = self._start()
        with agreed(communicator):
            state = self.engine.state()
        with agreed(communicator):
            compare_replicas(communicator, state, self.scaler.state(), step)
        run = Run(
            config,
            self.engine,
            communicator,
            self._batches(),
            self.scaler,
            partial(
                learning_rate,
                optimizer=config.optimizer,
                schedule=config.schedule,
                steps=config.train.steps,
            ),
            step=step,
            updates=state.updates,
        )
        with ExitStack() as stack:
            self._train(run, stack)

    def _claim(self) -> Path:
        """Rank 0 makes the folder; the others learn its name."""
        folder = Path()
        with agreed(self.communicator):
            if self.communicator.rank == 0:
                folder = (self.output or default_folder(self.config)).absolute()
                claim(folder, self.resume)
        return Path(self.communicator.broadcast(str(folder).encode()).decode())

    def _start(self) -> int:
        """Give the engine and the scaler their state; returns the step to go on from."""
        folder = self.folder / "checkpoints"
        name, step = "", 0
        with agreed(self.communicator):
            if self.resume and self.communicator.rank == 0:
                name = _newest_name(folder)
        name = self.communicator.broadcast(name.encode()).decode()
        with agreed(self.communicator):
            if name:
                step = self._load(folder / name)
            else:
                self._say("no checkpoint to resume from; starting at step 0" * self.resume)
                weights = initial_weights(self.config.model, self.config.train.seed)
                if self.config.train.start_from is not None:
                    source = Path(self.config.train.start_from)
                    weights = checkpoint.start_weights(source, self.config.model, weights)
                    self._say(f"starting with the weights of {source}")
                self.engine.load_state(EngineState(weights))
        return step

    def _load(self, path: Path) -> int:
        checkpoint.check_model(path, self.config.model)
        checkpoint.check_same_run(path, self.config, self.prepared.manifest["digest"])
        state = checkpoint.load(path)
        self.engine.load_state(state.engine)
        self.scaler.load_state(state.scaler)
        self._say(f"resuming from {path.name}")
        return state.step

    def _batches(self) -> Batches:
        config, communicator = self.config, self.communicator
        if config.train.global_batch_size < communicator.size:
            self._say(
                f"warning: train.global_batch_size = {config.train.global_batch_size} is smaller "
                f"than the {communicator.size} ranks; some have no work"
            )
        return Batches(
            self.feeds["train"],
            micro_batch_size=config.train.micro_batch_size,
            rank=communicator.rank,
            ranks=communicator.size,
            factors=partial(factors, config),
        )

    def _train(self, run: Run, stack: ExitStack) -> None:
        config = self.config
        sinks: list[Any] = []
        record = None
        with agreed(self.communicator):
            if self.communicator.rank == 0:
                record = self._record()
                sinks = self._sinks(run, stack)
        metrics = Metrics(sinks)
        evaluation = Evaluation(
            config.evaluation.every,
            partial(rank_validation, config, self.feeds["validation"], self.communicator),
            loss_kinds(config),
            sinks,
        )
        extra = {"data_digest": self.prepared.manifest["digest"]}
        saving = Checkpoint(
            config.checkpoint.every, self.folder / "checkpoints", extra, start=run.step
        )
        hooks: list[Hook] = [metrics, ReplicaCheck(config.train.check_every), evaluation, saving]
        try:
            if config.output.weights_every:
                hooks.append(sketches := WeightSketches(config.output.weights_every, sinks))
                with run.guard():
                    sketches.start(run)
            if config.output.profiled:
                hooks.append(self._profile(run, stack))
            with listening(run):
                train_steps(run, hooks)
                memory = self._memory()
                if run.stopped:
                    raise self._stopped(run)
                with agreed(self.communicator):
                    sample = self._sample()
                    if record:
                        record.update(memory_mib=memory, sample=sample)
                        record.update(**progress(run, metrics, evaluation, saving))
                        record.end("finished")
        except Exception as error:
            shown = explain(error)
            if record:
                with suppress(OSError):  # a full disk is known by now
                    record.update(**progress(run, metrics, evaluation, saving))
                    record.end("stopped" if isinstance(shown, Stopped) else "failed", str(shown))
            if shown is error:
                raise
            raise shown from error
        self._say(f"finished: {self.folder}")

    def _record(self) -> RunRecord:
        where = place()
        if self.config.train.start_from is not None:
            carry_over(Path(self.config.train.start_from), self.folder)
        keep_tokenizer(self.folder, self.prepared.folder / TOKENIZER)
        return RunRecord(
            self.folder,
            self.config,
            backend=self.backend.name,
            ranks=self.communicator.size,
            threads=self.threads,
            launcher=where.launcher,
            controller=where.controller,
            versions=self.backend.versions(),
            unigram_entropy=self.prepared.unigram_entropy,
            parameters=self.config.model.size,
        )

    def _sinks(self, run: Run, stack: ExitStack) -> list[Any]:
        output = self.config.output
        file = MetricsFile(self.folder / "metrics.jsonl", run.step)
        stack.callback(file.close)
        sinks: list[Any] = [file.write]
        if output.tensorboard:
            from horovod_lm.tensorboard_log import TensorBoardLog

            board = TensorBoardLog(self.folder / "tensorboard")
            stack.callback(board.close)
            sinks.append(board)
        console = TrainingConsole(self.config.train.steps, run.step, output.log_every)
        sinks.append(stack.enter_context(console))
        return sinks

    def _profile(self, run: Run, stack: ExitStack) -> Hook:
        from horovod_lm.ceilings import ideal_times
        from horovod_lm.profiler import Profile

        steps = self.config.output.profiled
        if not hasattr(self.backend, "profile"):
            raise together(
                UserError(f"backend {self.backend.name} can't be profiled; leave out --profile"),
                self.communicator,
            )
        if run.step + 1 >= steps.start:
            self._say(f"no profile of steps {self.config.output.profile}: step {run.step} is done")

        def ideal() -> dict[str, float]:
            return ideal_times(self.config, self.backend, run.batches[steps.start - 1].micros)

        hook = Profile(steps, self.folder, self.backend, display_name(self.backend.name), ideal)
        stack.callback(hook.close)
        return hook

    def _memory(self) -> dict[str, float]:
        peaks = [float(p) for p in self.communicator.allgather(repr(peak_memory()).encode())]
        return {"largest": round(max(peaks), 1), "sum": round(sum(peaks), 1)}

    def _stopped(self, run: Run) -> HorovodLmError:
        error = Stopped(
            f"stopped by a signal after step {run.step}; the checkpoint is in {self.folder}; "
            f"go on with --resume --output {self.folder}",
            exit_code=130 if run.stopped & INTERRUPT else 75,
        )
        return together(error, self.communicator)

    def _sample(self) -> dict[str, str] | None:
        """Rank 0 lets the model go on from the beginning of the validation text."""
        context, tokenizer = self.config.model.context, self.prepared.tokenizer
        begin = prompt_begin(self.config, tokenizer)
        room = context - (begin is not None)
        count = min(SAMPLE_TOKENS, room // 2, len(self.prepared.validation) // 2)
        if self.communicator.rank or count < 1 or self.config.model.kind != "decoder":
            return None
        text = self.prepared.validation.read(0, 2 * count)
        prompt = text[:count] if begin is None else np.append(np.int32(begin), text[:count])
        prefix = prompt_is_prefix(self.config)
        out = generate(
            self.engine, prompt[None], count, context=context, end=tokenizer.end, prefix=prefix
        )
        return {
            "prompt": tokenizer.decode(text[:count]),
            "truth": tokenizer.decode(text[count:]),
            "continuation": tokenizer.decode(out[0]),
        }

    def _say(self, text: str) -> None:
        if text and self.communicator.rank == 0:
            print(text, flush=True)


def _newest_name(folder: Path) -> str:
    """The newest valid checkpoint, "" if there is none at all. Raises `UserError` if there are
    only damaged ones: to start anew in silence would lose them."""
    found = checkpoint.newest(folder, log=print)
    if found is None and any(folder.glob("step-*")):
        raise UserError(
            f"no checkpoint in {folder} is valid; restore one, or start a new run in another folder"
        )
    return found.name if found else ""


def progress(
    run: Run, metrics: Metrics, evaluation: Evaluation, saving: Checkpoint
) -> dict[str, Any]:
    """What `run.json` says of how far a run came; without what it has not reached since it
    started or was resumed."""
    reached = {
        "first_step_seconds": metrics.first_step_seconds,
        "loss": metrics.loss,
        "validation_loss": evaluation.loss,
        "checkpoint": saving.path.name if saving.path else None,
    }
    known = {key: value for key, value in reached.items() if value is not None}
    return {"steps": run.step, "updates": run.updates, **known}


@contextmanager
def listening(run: Run) -> Iterator[None]:
    """SIGTERM (and Slurm's SIGUSR1) and Ctrl-C ask all ranks to stop after the step they are in; a
    second Ctrl-C ends this process at once."""

    def stop(number: int, frame: object) -> None:
        run.signal |= STOP

    def interrupt(number: int, frame: object) -> None:
        if run.signal & INTERRUPT:
            raise KeyboardInterrupt
        run.signal |= INTERRUPT

    handlers = {signal.SIGTERM: stop, signal.SIGUSR1: stop, signal.SIGINT: interrupt}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def split_feeds(config: Config, prepared: Prepared, split: Split) -> list[Feed]:
    """What the objectives of `config` read of one split of the prepared data. Raises `UserError`
    for what they need and is not there."""
    return make_feeds(config, _corpora(prepared, split), prepared.tokenizer, split)


def _corpora(prepared: Prepared, split: Split) -> list[Corpus]:
    found = []
    for source in prepared.sources.values():
        streams = source.train if split == "train" else source.validation
        tokens = streams["target"] if "target" in streams else streams["text"]
        found.append(Corpus(source.name, tokens, streams.get("source")))
    return found


def all_feeds(config: Config, prepared: Prepared) -> dict[Split, list[Feed]]:
    """`split_feeds` of both splits."""
    splits: tuple[Split, ...] = ("train", "validation")
    return {split: split_feeds(config, prepared, split) for split in splits}


def rank_validation(
    config: Config, feeds: list[Feed], communicator: Communicator
) -> Iterator[MicroBatch]:
    """This rank's share of the validation windows."""
    return validation_batches(
        feeds,
        rows=min(EVALUATION_ROWS, -(-config.train.global_batch_size // communicator.size)),
        windows=config.evaluation.windows,
        rank=communicator.rank,
        ranks=communicator.size,
    )
