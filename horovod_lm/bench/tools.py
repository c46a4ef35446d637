"""What a backend offers to the benchmarks: peers to be measured against, ceilings, an allreduce."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from horovod_lm.backend import Communicator, Precision
    from horovod_lm.config import Config
    from horovod_lm.spec import ModelSpec


@dataclass(frozen=True)
class Product:
    """A matrix product of a training step, (rows, inputs) @ (inputs, outputs), which with its two
    gradients happens `times` times a step."""

    rows: int
    inputs: int
    outputs: int
    times: int

    @property
    def flops(self) -> float:
        """Of the product and of both gradients, all times."""
        return 6.0 * self.rows * self.inputs * self.outputs * self.times


HEAD_ROWS = 512  # the output layer is applied to so many rows at a time, in both backends


def products_of(
    spec: ModelSpec,
    rows: int,
    lengths: Mapping[str, int] | None = None,
    places: int | None = None,
) -> list[Product]:
    """The products with weights of one step on `rows` sequences: query, key and value are one
    product where they are equally wide, else key and value are; in attention to the encoder always.
    `lengths` are those of the sequences in each stack, by default the full ones, and the output
    layer sees so many `places`, by default all of the last stack."""
    width, inner = spec.width, spec.inner_width
    lengths = lengths or dict.fromkeys(spec.stacks, spec.context)
    places = rows * lengths[list(lengths)[-1]] if places is None else places
    queries, both = spec.attention_width, 2 * spec.key_value_count * spec.head_width
    apart = [(width, queries), (width, both)]
    attention = [(width, queries + both)] if both == 2 * queries else apart
    feed_forward = [(width, inner)] * (2 if spec.gated else 1) + [(inner, width)]
    whole, rest = divmod(places, HEAD_ROWS)
    chunks = [(HEAD_ROWS, whole)] * (whole > 0) + [(rest, 1)] * (rest > 0)
    found = []
    for stack, layers in spec.stacks.items():
        shapes = [*attention, (queries, width)]
        if spec.attends_to_encoder(stack):
            shapes += [apart[0], (queries, width)]
            found.append(Product(rows * lengths["encoder"], *apart[1], layers))
        tokens = rows * lengths[stack]
        found += [Product(tokens, *shape, layers) for shape in shapes + feed_forward]
    if spec.head_transform and places:
        found.append(Product(places, width, width, 1))
    return found + [Product(chunk, width, spec.vocabulary, times) for chunk, times in chunks]


@dataclass(frozen=True)
class PeerKind:
    """A peer that a user could pick instead: its `name` on the command line, the framework, the
    package that it needs and how that is installed, and the precisions that it trains in here."""

    name: str
    label: str
    backend: str
    package: str
    mend: str = "pip install 'horovod_lm[bench]'"
    precisions: tuple[str, ...] = ("fp32", "bf16")  # torch's fp16 takes tens of seconds a step


_KERAS_HUB = "pip install 'horovod_lm[bench]' and then pip install --no-deps keras-hub"
PEERS = (
    PeerKind("huggingface", "Hugging Face", "torch", "transformers"),
    PeerKind("huggingface-compile", "Hugging Face, compiled", "torch", "transformers"),
    PeerKind("plain", "plain torch", "torch", "torch"),
    PeerKind("plain-compile", "plain torch, compiled", "torch", "torch"),
    PeerKind("kerashub", "KerasHub", "tensorflow", "keras_hub", _KERAS_HUB),
    PeerKind("kerashub-xla", "KerasHub, XLA", "tensorflow", "keras_hub", _KERAS_HUB),
)
# torchrun starts these: the plain model, and our own torch model and optimizer, so that only the
# reduction of gradients is another's.
DISTRIBUTED = (
    PeerKind("ddp", "plain torch in DDP", "torch", "torch"),
    PeerKind("ddp-own", "our torch in DDP", "torch", "torch"),
)


class Peer(Protocol):
    """A GPT-2 of the spec's sizes by somebody else, with its optimizer, as it is shipped."""

    rank: int
    size: int

    def step(self, tokens: np.ndarray) -> float:
        """One training step on this rank's sequences (B, L + 1) int32; the loss, in nats per
        token."""

    def broadcast(self, data: bytes) -> bytes:
        """`data` of rank 0, on every rank of a distributed peer."""


class BenchTools(Protocol):
    """See `horovod_lm.backend.Backend.bench`."""

    def peer(self, name: str, config: Config, threads: int) -> Peer:
        """The peer `name` of `PEERS` or `DISTRIBUTED`, with new weights; its package is imported
        now."""

    def product_libraries(self, precision: Precision) -> Sequence[str]:
        """The libraries whose matrix products the framework can use here, each a name for
        `products`."""

    def products(
        self, library: str, products: Sequence[Product], precision: Precision
    ) -> Callable[[], None]:
        """A function that does all the products once, with their gradients, and nothing else."""

    def copy(self, elements: int) -> Callable[[], None]:
        """A function that reads a tensor of `elements` fp32 and writes another: what a copy
        costs."""

    def allreduce(self, communicator: Communicator, elements: int) -> Callable[[], None]:
        """A function that sums a tensor of `elements` fp32 over the ranks, as the engine does its
        gradients, and waits for the sum."""
