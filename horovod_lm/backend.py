"""The seam between the loop and a framework, and the one place that picks a backend by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from horovod_lm.errors import UserError
from horovod_lm.installed import DISTRIBUTIONS, require_horovod
from horovod_lm.optimizers import OptimizerName
from horovod_lm.spec import ModelSpec

if TYPE_CHECKING:
    from horovod_lm.bench.tools import BenchTools
    from horovod_lm.convert.tools import ConvertTools

# fp64 is the referee: of `horovod-lm parity`, and of runs whose curves part.
Precision = Literal["fp64", "fp32", "bf16", "fp16"]

# Bits of a rank's status, which travels in the reduced buffer.
STOP, INTERRUPT, ERROR, OVERFLOW = 1, 2, 4, 8


@dataclass(frozen=True)
class Loss:
    """One loss of a micro-batch: factor x sum(weights x l) / normaliser over its targets, with the
    logits z of `head` and l = (1 - e) (logsumexp(z) - z_y) + e (logsumexp(z) - mean(z))
    + `z_loss` x logsumexp(z)^2, where e is `smoothing` (Szegedy et al., 2016; Chowdhery et al.,
    2022).

    `targets` int32 and `weights` fp32, 0 where there is no target, have one shape: (B, L) for a
    head over tokens, (B,) for one over sequences. With `positions` (B, P) int32 they are (B, P),
    and target p of a row is at that place of it: the head then sees these places only. The
    `normaliser` is the weight sum over the whole *global* batch, so that the plain sum over
    micro-batches and ranks is the loss. What is reported under `name` is the negative
    log-likelihood, without smoothing and z-loss.
    """

    name: str
    head: str
    targets: np.ndarray
    weights: np.ndarray
    normaliser: float
    factor: float = 1.0
    positions: np.ndarray | None = None
    smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward works on.

    `inputs` are named arrays, all int32. `tokens` (B, L) go into the model's only stack, or into
    the decoder; `source` (B, S) into the encoder of an encoder-decoder. What belongs to `tokens`
    has its shape, and of what belongs to `source` the name begins with `source_`; each may be left
    out:

    - `blocks`: numbers of sequences that share a row, 0 for padding. A token sees only keys of its
      own number (an encoder-decoder's too, in its row of `source`); without it, all are one.
    - `positions`: for learned, sinusoidal and rotary positions; without it, 0, 1, 2, …
    - `prefix`: 1 for tokens of a decoder that all tokens of their block may see, also earlier ones.
    - `segments`: segment ids; without it, 0.

    `rows` (B,) int64 are the rows' indices in the global batch (dropout masks come from them);
    `losses` at least one.
    """

    inputs: Mapping[str, np.ndarray]
    rows: np.ndarray
    losses: tuple[Loss, ...]


@dataclass(frozen=True)
class Reduced:
    """What the ranks know together after `reduce_gradients`, the same on each of them.

    `losses`: by name, sum(weights x nll) / normaliser over the global batch, in nats, without
    factor and loss scale. `finite`: every element of the reduced gradient is; decided on elements.
    `norm`: global L2 norm after unscaling (inf or nan if not finite). `status`: (ranks,) bits STOP,
    INTERRUPT, ERROR, OVERFLOW of each rank. `tensor`: canonical name of the first tensor
    that is not finite, else None.
    """

    losses: Mapping[str, float]
    finite: bool
    norm: float
    status: np.ndarray
    tensor: str | None = None


class Sums(NamedTuple):
    """What an evaluation knows of one loss: the sums of weights x nll in nats, of the weights, and
    of the weights of those targets that have the largest logit (1/n of it where n are largest)."""

    nll: float
    weights: float
    hits: float


@dataclass(frozen=True)
class EngineSettings:
    """What an engine needs beside the spec. `loss_names` are the names of the losses in every
    micro-batch, in order. The backends' `optimizer` has the formula of each optimizer, and
    `horovod_lm.optimizers` what it reads of what stands here. With `recompute` a block keeps
    only its input for the backward, and makes its activations again (Chen et al., 2016)."""

    precision: Precision = "fp32"
    seed: int = 0
    loss_names: tuple[str, ...] = ("lm",)
    optimizer: OptimizerName = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.01
    dropout_generator: Literal["shared", "native"] = "shared"
    recompute: bool = False


@dataclass
class EngineState:
    """Everything that an engine knows: by canonical name, `weights` and `moments` (moment -> name
    -> array, see `horovod_lm.optimizers.moment_shapes`) in fp32 (fp64 where the engine's precision
    is), and the number of applied `updates`."""

    weights: dict[str, np.ndarray]
    moments: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    updates: int = 0


class Communicator(Protocol):
    """The only way in which neutral code speaks to other ranks. All calls but `shutdown` and the
    timeline's are collective: every rank makes them in the same order. Each raises
    `CollectiveFailed` if another rank has ended or the job has stalled."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    def broadcast(self, data: bytes, root: int = 0) -> bytes:
        """`data` of rank `root`, on every rank."""

    def allgather(self, data: bytes) -> list[bytes]:
        """The `data` of every rank, in the order of ranks; lengths may differ."""

    def allreduce(self, array: np.ndarray) -> np.ndarray:
        """The sum over ranks of an fp32, fp64, int32 or int64 array."""

    def barrier(self) -> None:
        """Return when every rank has come here."""

    def start_timeline(self, path: str) -> None:
        """Have rank 0 write Horovod's timeline to `path` from now on; HOROVOD_TIMELINE was
        "DYNAMIC" when Horovod started."""

    def stop_timeline(self) -> None:
        """End the timeline; its file is whole a moment later."""

    def shutdown(self) -> None:
        """Leave the job in good order."""


class Engine(Protocol):
    """A model with its gradients and optimizer in one framework. Small on purpose: everything
    that is not tensor arithmetic or a collective is neutral."""

    def forward_backward(self, micro: MicroBatch, step: int, loss_scale: float) -> None:
        """Add the gradients of `loss_scale` x the micro-batch's loss to the accumulator, and its
        losses to theirs; dropout is on, with masks of (seed, step, site, row)."""

    def reduce_gradients(self, status: int = 0) -> Reduced:
        """Sum accumulated gradients and losses over the ranks by ring-allreduce, in fp64 in a run
        of that precision and otherwise in fp32, undo the loss scale, and empty the accumulator.
        `status` is this rank's; OVERFLOW is added here. A rank without a micro-batch takes part
        with zeros."""

    def apply_gradients(self, learning_rate: float, clip: float | None) -> None:
        """One optimizer update with the reduced gradient, scaled by min(1, clip / norm)."""

    def evaluate(self, micro: MicroBatch) -> dict[str, Sums]:
        """By loss name, the sums of this micro-batch, on this rank, without dropout."""

    def logits(self, inputs: Mapping[str, np.ndarray], head: str = "lm") -> np.ndarray:
        """fp32 logits of a head without dropout: (B, L, outputs), or (B, outputs) of a head over
        sequences."""

    def hidden(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the stacks give without dropout, by stack, (B, L, D) fp32; and (B, D) as `pooled`
        where the spec has a pooler."""

    def trace(self, micro: MicroBatch, step: int) -> dict[str, np.ndarray]:
        """The activations of one forward with the dropout of `step`, by site, in the order of
        computation, fp32 (fp64 where the precision is); docs/parity.md lists the sites."""

    def start(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Any]:
        """Begin decoding after prompts `tokens` (B, L) of equal length, perhaps with a `prefix`,
        and with `source` and `source_blocks` for an encoder-decoder: the (B, V) fp32 logits of the
        next token, and an opaque cache of keys and values."""

    def next(self, tokens: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        """Feed one token a row, (B,) int32: the (B, V) logits of the one after it, and the cache
        (the one given must not be used again)."""

    def gradients(self) -> dict[str, np.ndarray]:
        """The reduced and unscaled gradient, by canonical name; read it between
        `reduce_gradients` and `apply_gradients`, which may clip it in place."""

    def load_gradients(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Take `gradients`, by canonical name, for what `reduce_gradients` has given, and their
        global norm with them: two engines can then be asked for the same update."""

    def state(self) -> EngineState:
        """A copy of weights, moments and update count."""

    def load_state(self, state: EngineState) -> None:
        """Take over `state`; without moments they start at 0. Moments must be those of this
        engine's optimizer."""

    def synchronise(self) -> None:
        """Return when the device has done all that was asked of it (for timing)."""


class Backend(Protocol):
    """One framework. Made once a process, before anything else of the framework is used."""

    name: str

    def __init__(self, threads: int) -> None:
        """Import the framework and limit it to `threads` threads."""

    def versions(self) -> dict[str, str]:
        """Names and versions of what it runs on."""

    def communicator(self) -> Communicator:
        """Start Horovod. Raises `UserError` if Horovod is missing, plain or built for other
        versions."""

    def engine(
        self, spec: ModelSpec, settings: EngineSettings, communicator: Communicator
    ) -> Engine:
        """A model with zero weights: give it a state next. Raises `UserError` for what this
        backend does not support."""

    def profile(self, path: Path) -> AbstractContextManager[None]:
        """Record what this process does inside with the framework's own profiler, and write it to
        `path` as a `horovod_lm.profiles.Trace`. A user's own backend may lack it."""

    def bench(self) -> BenchTools:
        """What `horovod-lm bench` needs of the framework. A user's own backend may lack it."""

    def convert(self) -> ConvertTools:
        """What `horovod-lm convert` needs of the framework. A user's own backend may lack it."""


GROUP = "horovod_lm.backends"


def backend_names() -> Sequence[str]:
    """Names of the backends that are installed, by the entry points of group
    `horovod_lm.backends`."""
    return sorted(entry.name for entry in entry_points(group=GROUP))


def require_backend(name: str) -> None:
    """Raise `UserError` unless there is a backend `name`, its framework is installed and so is a
    Horovod that fits. No framework is imported."""
    if name not in backend_names():
        raise UserError(
            f'"{name}" is not a backend; installed are: {", ".join(backend_names())} '
            f"(entry points of group {GROUP})"
        )
    if name in DISTRIBUTIONS and find_spec(name) is None:
        raise UserError(
            f"backend {name} needs {name}, which is missing; pip install 'horovod_lm[{name}]'"
        )
    require_horovod(name)


def load_backend(name: str, threads: int = 1) -> Backend:
    """The backend `name`, imported now and not before. Raises `UserError` if there is none of that
    name, or its framework or our Horovod is missing."""
    require_backend(name)
    (found,) = (entry for entry in entry_points(group=GROUP) if entry.name == name)
    try:
        return found.load()(threads)
    except ImportError as error:
        raise UserError(
            f"backend {name} can't be imported: {error}; install {error.name or 'what it needs'}, "
            f"and see horovod-lm doctor"
        ) from error


def load_backends(names: Sequence[str], threads: int = 1) -> dict[str, Backend]:
    """Several backends in one process, in the order in which that works: torch before TensorFlow,
    and a user's own, which may be made of either, between them. Raises as `load_backend`."""
    order = sorted(names, key=lambda name: {"torch": 0, "tensorflow": 2}.get(name, 1))
    return {name: load_backend(name, threads) for name in order}
