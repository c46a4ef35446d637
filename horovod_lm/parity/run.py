"""One batch through both backends and, as referees, through both in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from horovod_lm import environment
from horovod_lm.backend import (
    Backend,
    Communicator,
    Engine,
    EngineState,
    MicroBatch,
    Precision,
    Reduced,
    load_backends,
    require_backend,
)
from horovod_lm.config import Config, with_keys
from horovod_lm.data.batches import Batches
from horovod_lm.data.prepare import Log, Prepared, check_windows, prepare
from horovod_lm.errors import UserError
from horovod_lm.objectives.registry import causal_windows
from horovod_lm.parity.measure import TOLERANCES, UNIT_ROUNDOFF, Squares
from horovod_lm.parity.places import backward_order
from horovod_lm.parity.result import Kind, Place, Result
from horovod_lm.randomness import initial_weights, normals, philox, uniforms
from horovod_lm.spec import ModelSpec
from horovod_lm.topology import place
from horovod_lm.train import make_engine, split_feeds

Tensors = Mapping[str, np.ndarray]

STEP = 3  # of the dropout masks: at step 0 an engine that ignores the step would pass
# Learning rates of the first and the second update. Not 1, which would hide an optimizer that
# forgets it somewhere; not small, since the rounding of weights would hide what the update does to
# them; not equal, since a momentum may hold the rate.
RATES = (0.3, 0.2)
TINY_NORM = 1e-3  # of a gradient whose elements come near an optimizer's epsilon


def check(names: Sequence[str]) -> tuple[str, str]:
    """The two backends to compare. Raises `UserError` unless both are installed, with a Horovod
    that fits, and this process is the only rank. No framework is imported."""
    if len(names) != 2 or names[0] == names[1]:
        raise UserError(
            f'--backends "{",".join(names)}" does not name two different backends; give two, as '
            "in --backends torch,tensorflow"
        )
    for name in names:
        require_backend(name)
    where = place()
    if where.size > 1:
        raise UserError(
            f"parity runs on one rank and was started on {where.size}; start it without "
            f"{where.launcher}"
        )
    return names[0], names[1]


def parity(
    config: Config, names: Sequence[str], precision: Precision | None, rows: int, log: Log
) -> Result:
    """Compare the backends `names` on the model and data of `config`, in `precision` (default: the
    config's) and in fp64, with `rows` (at least 2) sequences. Raises `UserError`."""
    pair = check(names)
    threads = environment.apply(config)
    prepared = prepare(config, log)
    if not config.objective:
        check_windows(prepared, config)  # `batch` makes some, whatever the config trains on
    precision = precision or config.train.precision
    left_out: list[str] = []
    config = without_native_dropout(config, left_out)
    log(f"loading {' and '.join(pair)}")
    loaded = load_backends(pair, threads)
    # Both Horovods share one MPI, which ends with the one that started first, at exit the last to
    # go.
    backends = {name: (backend, backend.communicator()) for name, backend in loaded.items()}
    engines = make_engines(config, {name: backends[name] for name in pair}, precision, left_out)
    comparison = Comparison(config, pair, engines, precision, left_out)
    micros = batch(config, prepared, rows)
    places = comparison.run(micros, log)
    setting = {
        "config": config.name,
        "versions": {name: backends[name][0].versions() for name in pair},
        "threads": threads,
        "seed": config.train.seed,
        "rows": rows,
        "length": config.model.context,
        "target_weights": [
            float(sum(loss.weights.sum() for loss in micro.losses)) for micro in micros
        ],
        "dropout_step": STEP,
        "loss_scale": comparison.loss_scale,
        "optimizer": config.optimizer.name,
        "learning_rates": list(RATES),
        "clip": config.train.max_norm is not None,
    }
    return Result(pair, precision, places, comparison.referee, setting, left_out)


def without_native_dropout(config: Config, left_out: list[str]) -> Config:
    """Masks of the frameworks' own generators differ by design, so they are taken out."""
    dropout = config.model.dropout or config.model.attention_dropout
    if config.train.dropout_generator == "shared" or not dropout:
        return config
    left_out.append(
        'dropout, which is off here: with train.dropout_generator = "native" each framework draws '
        "masks of its own"
    )
    return with_keys(config, model={"dropout": 0.0, "attention_dropout": 0.0})


def make_engines(
    config: Config,
    backends: Mapping[str, tuple[Backend, Communicator]],
    precision: Precision,
    left_out: list[str],
) -> list[Engine | None]:
    """The engines of both backends in `precision`, which must be there; then, unless that is fp64,
    both in fp64, or None where a backend refuses it."""
    engines: list[Engine | None] = [
        make_engine(config, backend, communicator, precision)
        for backend, communicator in backends.values()
    ]
    if precision == "fp64":
        return engines
    for name, (backend, communicator) in backends.items():
        try:
            engines.append(make_engine(config, backend, communicator, "fp64"))
        except UserError as error:
            engines.append(None)
            left_out.append(f"{name} in fp64: {error}")
    return engines


def batch(config: Config, prepared: Prepared, rows: int) -> list[MicroBatch]:
    """`rows` rows of the training text in two micro-batches. Targets weigh 0, 1/2 or 1, by
    chance, and less in the first micro-batch: who ignores weights, or takes a mean over a
    micro-batch, gets another loss and other gradients. Without an objective any model is compared,
    also one that could not be trained so: what it takes beside tokens is made of the same windows
    (`more_inputs`)."""
    config = with_keys(config, train={"global_batch_size": rows})
    seed, context = config.train.seed, config.model.context
    if config.objective:
        feeds = split_feeds(config, prepared, "train")
    else:
        feeds = causal_windows(prepared.train, context, rows, seed)
    batches = Batches(feeds, micro_batch_size=-(-rows // 2), rank=0, ranks=1)
    micros = batches[0].micros
    weights: list[list[np.ndarray]] = []
    for index, micro in enumerate(micros):
        weights.append([])
        for loss in micro.losses:
            name = f"parity.weights.{index}" + (f".{loss.name}" if weights[-1] else "")
            drawn = uniforms(philox(config.train.seed, name), loss.weights.size)
            light = 0.5 if index == 0 else 0.2
            new = np.where(drawn < light, 0.0, np.where(drawn < light + 0.2, 0.5, 1.0))
            weights[-1].append(loss.weights * new.reshape(loss.weights.shape).astype(np.float32))
    sums = [
        float(sum(array.sum(dtype=np.float64) for array in arrays)) or 1.0
        for arrays in zip(*weights, strict=True)
    ]
    return [
        replace(
            micro,
            inputs=micro.inputs if config.objective else more_inputs(config.model, micro.inputs),
            losses=tuple(
                replace(loss, weights=array, normaliser=normaliser)
                for loss, array, normaliser in zip(micro.losses, arrays, sums, strict=True)
            ),
        )
        for micro, arrays in zip(micros, weights, strict=True)
    ]


def more_inputs(spec: ModelSpec, inputs: Tensors) -> Tensors:
    """`inputs` of a decoder with what a model of `spec` takes beside them: to an encoder, each row
    ends in padding; an encoder-decoder reads the tokens backwards; segments change in the middle of
    a row."""
    tokens = inputs["tokens"]
    length = tokens.shape[1]
    place = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    padded = (place < length - length // 4).astype(np.int32)
    segments = place * min(2, spec.segments) // length
    more: dict[str, np.ndarray] = {}
    if spec.kind == "encoder-decoder":
        backwards = np.ascontiguousarray(tokens[:, ::-1])
        more |= {"source": backwards, "source_blocks": padded, "source_segments": segments}
    elif spec.kind == "encoder":
        more["blocks"] = padded
    more["segments"] = segments
    names = [name for name in more if spec.segments or not name.endswith("segments")]
    return {**inputs, **{name: more[name] for name in names}}


def moved_weights(spec: ModelSpec, seed: int) -> dict[str, np.ndarray]:
    """Initial weights, moved to where training might have brought them: zero biases hide errors,
    and with small kernels attention is all but uniform. Vectors get normal numbers of standard
    deviation 0.1, matrices such that what they give is about as large as what they take, at any
    width."""
    weights = initial_weights(spec, seed)
    for name, array in weights.items():
        std = 0.1
        if array.ndim == 2:
            std = array.shape[0 if name.endswith("kernel") else 1] ** -0.5
        array += normals(seed, f"parity.{name}", array.shape, std)
    return weights


class Comparison:
    """The engines of `make_engines`, driven through one batch.

    `referee` names the backend whose fp64 results are the reference, None without fp64;
    `loss_scale` is the one that the gradients were made with.
    """

    def __init__(
        self,
        config: Config,
        names: tuple[str, str],
        engines: Sequence[Engine | None],
        precision: Precision,
        left_out: list[str],
    ) -> None:
        self.config, self.names, self.left_out = config, names, left_out
        self.precision = precision
        self.loss_scale = 1.0
        self._slots = list(engines)
        self._engines = [engine for engine in engines if engine is not None]
        exact = [name for name, e in zip(names, engines[2:], strict=False) if e is not None]
        self.referee = exact[0] if exact else None
        self._weights = moved_weights(config.model, config.train.seed)

    def run(self, micros: Sequence[MicroBatch], log: Log) -> list[Place]:
        """All places, in order of computation."""
        self._fresh()
        log("comparing activations")
        places = self._activations(micros)
        log("comparing gradients")
        places += self._gradients(micros)
        log("comparing updates")
        return places + self._updates()

    def _fresh(self) -> None:
        for engine in self._engines:
            engine.load_state(EngineState(self._weights))

    def _activations(self, micros: Sequence[MicroBatch]) -> list[Place]:
        places = []
        if self._all_have("trace", "activations"):
            squares: dict[str, Squares] = {}
            for micro in micros:
                self._add(squares, [engine.trace(micro, STEP) for engine in self._engines])
            places += self._places("activation", squares)
        squares = {}
        for micro in micros:
            logits = [{"logits": engine.logits(micro.inputs)} for engine in self._engines]
            self._add(squares, logits)
        return places + self._places("activation", squares, "without dropout")

    def _gradients(self, micros: Sequence[MicroBatch]) -> list[Place]:
        reduced = self._backward(micros)
        losses: dict[str, Squares] = {}
        self._add(losses, [{"loss": np.array(list(r.losses.values()))} for r in reduced])
        norms: dict[str, Squares] = {}
        self._add(norms, [{"norm": np.array([r.norm])} for r in reduced])
        gradients = [engine.gradients() for engine in self._engines]
        self._given = gradients[2 if self.referee else 0]
        squares: dict[str, Squares] = {}
        self._add(squares, gradients, backward_order(self.config.model))
        return (
            self._places("activation", losses, "of the whole batch")
            + self._places("gradient", squares)
            + self._places("gradient", norms)
        )

    def _backward(self, micros: Sequence[MicroBatch]) -> list[Reduced]:
        """Reduced gradients of all engines. In fp16 the loss scale starts where the config's does
        and backs off until neither overflows, as it does in training."""
        rule = self.config.loss_scale
        scale = rule.initial if self.precision == "fp16" else 1.0
        while True:
            reduced = [_backward(engine, micros, scale) for engine in self._engines[:2]]
            last = self.precision != "fp16" or scale <= rule.minimum
            if last or all(r.finite for r in reduced):
                break
            scale = max(rule.minimum, scale * rule.backoff_factor)
        self.loss_scale = scale
        return reduced + [_backward(engine, micros, 1.0) for engine in self._engines[2:]]

    def _updates(self) -> list[Place]:
        """Two updates with the same gradient in all engines, then one from the start again with a
        gradient so small that epsilon counts."""
        if not self._all_have("load_gradients", "updates"):
            return []
        norm = math.sqrt(
            sum(float((g.astype(np.float64) ** 2).sum()) for g in self._given.values())
        )
        if not math.isfinite(norm) or norm == 0:
            self.left_out.append("updates: the gradient is zero or not finite")
            return []
        tiny = 2.0 ** round(math.log2(TINY_NORM / norm))
        places = []
        for title, rate, factor, fresh in (
            ("the first update", RATES[0], 1.0, True),
            ("the second update", RATES[1], 1.0, False),
            ("an update near epsilon", RATES[0], tiny, True),
        ):
            if fresh:
                self._fresh()
            places += self._update(title, rate, factor, norm * factor)
        return places

    def _update(self, title: str, rate: float, factor: float, norm: float) -> list[Place]:
        clip = self.config.train.max_norm
        if clip is not None:
            clip = min(clip, norm / 2)  # so that clipping is at work
        # All take what fp32 can hold, unless all are in fp64.
        kind = np.float64 if self.precision == "fp64" else np.float32
        given = {name: (factor * array).astype(kind) for name, array in self._given.items()}
        before = [engine.state().weights for engine in self._engines]
        for engine in self._engines:
            engine.load_gradients(given)
            engine.apply_gradients(rate, clip)
        states = [engine.state() for engine in self._engines]
        places = []
        moments = [name for name in states[0].moments if all(name in s.moments for s in states)]
        for moment in moments:
            squares: dict[str, Squares] = {}
            self._add(squares, [state.moments[moment] for state in states])
            places += self._places("update", squares, f"{title}, {moment} moment")
        squares = {}
        changes = [_changes(old, state.weights) for old, state in zip(before, states, strict=True)]
        self._add(squares, changes)
        rounding = self._rounding(states[0].weights, squares)
        return places + self._places("update", squares, f"{title}, weights", rounding)

    def _rounding(self, weights: Tensors, squares: Mapping[str, Squares]) -> dict[str, float]:
        """By tensor, what its change may be off by since weights are stored in fp32 (or fp64): each
        side rounds twice, by at most u of a weight each time."""
        unit = UNIT_ROUNDOFF["fp64" if self.precision == "fp64" else "fp32"]
        return {
            name: 4 * unit * float(np.linalg.norm(weights[name])) / math.sqrt(found.reference)
            for name, found in squares.items()
            if found.reference > 0
        }

    def _all_have(self, method: str, what: str) -> bool:
        """Whether all engines can do something that a user's own backend may lack."""
        lacking = [
            name
            for name, engine in zip(self.names, self._engines, strict=False)
            if not hasattr(engine, method)
        ]
        if lacking:
            self.left_out.append(f"{what}: no Engine.{method} in {' and '.join(lacking)}")
        return not lacking

    def _add(
        self,
        squares: dict[str, Squares],
        tensors: Sequence[Tensors],
        order: Iterable[str] | None = None,
    ) -> None:
        """Add one tensor of each engine to each place that all of them have."""
        order = list(order or tensors[0])
        for name in order:
            if all(name in found for found in tensors):
                arrays = iter([found[name] for found in tensors])
                slots = [None if engine is None else next(arrays) for engine in self._slots]
                squares.setdefault(name, Squares()).add(slots)
        for backend, found, other in zip(self.names, tensors, tensors[1::-1], strict=False):
            alone = [name for name in found if name not in other]
            text = f"{', '.join(alone)}: {backend} alone has it"
            if alone and text not in self.left_out:
                self.left_out.append(text)

    def _places(
        self,
        kind: Kind,
        squares: Mapping[str, Squares],
        quantity: str = "",
        rounding: Mapping[str, float] | None = None,
    ) -> list[Place]:
        tolerance, exact = (getattr(TOLERANCES[p], kind) for p in (self.precision, "fp64"))
        # Activations have no whole: each is of its own size.
        whole = math.sqrt(sum(s.reference for s in squares.values())) if kind != "activation" else 0
        places = []
        for name, found in squares.items():
            more = (rounding or {}).get(name, 0.0)
            apart = found.relative(found.apart, whole)
            assert apart is not None
            places.append(
                Place(
                    kind,
                    name,
                    apart,
                    tolerance + more,
                    quantity,
                    found.relative(found.first, whole),
                    found.relative(found.second, whole),
                    found.relative(found.fp64, whole),
                    exact + more * UNIT_ROUNDOFF["fp64"] / UNIT_ROUNDOFF["fp32"],
                )
            )
        return places


def _backward(engine: Engine, micros: Sequence[MicroBatch], scale: float) -> Reduced:
    for micro in micros:
        engine.forward_backward(micro, STEP, scale)
    return engine.reduce_gradients()


def _changes(before: Tensors, after: Tensors) -> dict[str, np.ndarray]:
    return {n: a.astype(np.float64) - before[n].astype(np.float64) for n, a in after.items()}
