"""The least time that a step's work of a kind takes on this machine: its matrix products alone, and
the bytes that must move at the rate of a plain copy."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from horovod_lm.backend import Backend, MicroBatch, Precision
from horovod_lm.bench.tools import BenchTools, products_of
from horovod_lm.config import Config
from horovod_lm.optimizers import moment_size
from horovod_lm.spec import ModelSpec, element_sizes

_LEAST_RUNS, _SECONDS = 3, 0.1  # of one measurement
_LEAST_ELEMENTS = 2**18  # of a copy


@dataclass(frozen=True)
class Sizes:
    """What a forward works on: `rows` sequences, of so many tokens in each stack, and `places`,
    summed over the rows, that the output layer is applied to."""

    rows: int
    lengths: tuple[tuple[str, int], ...]
    places: int

    @classmethod
    def of(cls, spec: ModelSpec, micro: MicroBatch) -> Sizes:
        """Those of a micro-batch."""
        rows, length = micro.inputs["tokens"].shape
        lengths = {stack: int(length) for stack in spec.stacks}
        if "source" in micro.inputs:
            lengths["encoder"] = micro.inputs["source"].shape[1]
        places = sum(loss.targets.size for loss in micro.losses if loss.targets.ndim == 2)
        return cls(rows, tuple(lengths.items()), places)

    @property
    def tokens(self) -> float:
        """Tokens in each stack, on average."""
        return self.rows * sum(length for _, length in self.lengths) / len(self.lengths)


def ideal_times(config: Config, backend: Backend, micros: Sequence[MicroBatch]) -> dict[str, float]:
    """By kind of `horovod_lm.profiles`, the ms that a step of one rank, on `micros`, takes at the
    least.

    Matrix products: the same products by the framework's fastest library, with nothing else
    between. Attention: its FLOPs at the same rate. The others, which do little with each element:
    the bytes of `bytes_per_token` and of the optimizer, at the rate of copying a tensor of their
    size. Kinds for which this means nothing are left out.
    """
    spec, train = config.model, config.train
    tools = backend.bench()
    times: dict[str, float] = {}
    for sizes, count in Counter(Sizes.of(spec, micro) for micro in micros).items():
        for kind, seconds in _forward_times(spec, train.precision, tools, sizes).items():
            times[kind] = times.get(kind, 0.0) + count * seconds
    update = optimizer_bytes(spec, config.optimizer.name) * element_sizes(train.precision)[0] / 4
    times["optimizer"] = update * _seconds_of_a_byte(tools, spec.size)
    return {kind: 1e3 * value for kind, value in times.items()}


def _forward_times(
    spec: ModelSpec, precision: Precision, tools: BenchTools, sizes: Sizes
) -> dict[str, float]:
    """The seconds of a forward and backward, by kind."""
    products = products_of(spec, sizes.rows, dict(sizes.lengths), sizes.places)
    seconds = min(
        _seconds(tools.products(library, products, precision))
        for library in tools.product_libraries(precision)
    )
    rate = sum(product.flops for product in products) / seconds
    times = {
        "matrix products": seconds,
        "attention": sizes.rows * spec.attention_flops(dict(sizes.lengths)) / rate,
    }
    byte = _seconds_of_a_byte(tools, int(sizes.tokens) * spec.width)
    full, half = element_sizes(precision)
    for kind, count in bytes_per_token(spec, 4 * half // full).items():
        times[kind] = sizes.tokens * count * byte * full / 4
    return times


def bytes_per_token(spec: ModelSpec, half: int) -> dict[str, float]:
    """The bytes that a forward and backward of a token must at the least read and write, by kind,
    if each operation of a kind is one pass; `half` bytes has an element of a product's result.

    With D the width, F the inner width: a norm reads x and writes y, then reads g and x and writes
    dx; an activation the same over F, a gated one also reads and multiplies a second tensor, and a
    sum of the residual stream reads two and writes one, each way; dropout reads, writes and a mask
    of bytes, each way; an embedding reads a row of each table and writes their sum, then reads g
    for each and adds it to its row. A token stands for one in each stack.
    """
    width, stacks = 4 * spec.width, len(spec.stacks)
    blocks = sum(spec.stacks.values())
    branches = sum(
        layers * (3 if spec.attends_to_encoder(stack) else 2)
        for stack, layers in spec.stacks.items()
    )
    norms = branches + stacks * (spec.has_embedding_norm + (spec.norm_placement == "pre"))
    activations = (8 if spec.gated else 5) * half * spec.inner_width * blocks
    if spec.head_transform:
        norms += 1
        activations += 5 * half * spec.width
    tables = 1 + (spec.positions in ("learned", "sinusoidal")) + (spec.segments > 0)
    found = {
        "norms": 5 * width * norms,
        "activations": activations + 6 * width * branches,
        "embedding": (tables + 1 + 3 * tables) * width * stacks,
    }
    if spec.dropout:
        found["dropout"] = (4 * width + 2 * spec.width) * (branches + stacks)
    return {kind: float(count) for kind, count in found.items()}


def optimizer_bytes(spec: ModelSpec, optimizer: str) -> float:
    """The bytes of an update at 4 an element, as in all precisions but fp64: the norm reads the
    gradient, the update reads it again, and reads and writes weights and moments."""
    moments = moment_size(optimizer, {p.name: p.shape for p in spec.parameters})
    return 4.0 * (4 * spec.size + 2 * moments)


def _seconds_of_a_byte(tools: BenchTools, elements: int) -> float:
    """To read or write one, in copying so many fp32 elements, or more if calling takes longer."""
    elements = max(elements, _LEAST_ELEMENTS)
    return _seconds(tools.copy(elements)) / (8 * elements)


def _seconds(work: Callable[[], None]) -> float:
    """The least time of some runs after a first one."""
    work()
    times: list[float] = []
    while len(times) < _LEAST_RUNS or sum(times) < _SECONDS:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)
