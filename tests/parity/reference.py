"""Every Transformer of a `ModelSpec` written once more, plainly, in fp64 on NumPy, from the words
of `horovod_lm.spec`, `.backend` and `.randomness`: what both backends are measured against. It
stands on no framework, and has nothing of either backend.

What it takes from the product, as both backends do, so that a mistake there is one in all three:
tables of positions, buckets of distances, slopes, and what follows from a spec, such as parameters,
scales and widths (by hand and by other formulas in tests/unit/test_spec.py); the words and masks of
dropout (their integers in tests/unit/test_randomness.py, whether they are random enough in
tests/unit/test_dropout_masks.py).

Letters: B rows, L queries, M keys, H heads, K head width, D width, V outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from horovod_lm.backend import Loss, MicroBatch
from horovod_lm.randomness import DropoutWords, keep_mask
from horovod_lm.spec import (
    ModelSpec,
    alibi_slopes,
    relative_buckets,
    rotary_tables,
    sinusoidal_positions,
)
from tests.parity.autograd import (
    Tensor,
    concatenate,
    erf,
    exp,
    logsumexp,
    relu,
    softmax,
    tanh,
    where,
)

Words = Mapping[str, DropoutWords]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": relu,
    "gelu": lambda x: x * 0.5 * (1.0 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1.0 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3.0))),
    "silu": lambda x: x / (1.0 + exp(-x)),
}
FAR = -1e30  # the score of a key that is not seen: where none is, all are alike


@dataclass(frozen=True)
class Side:
    """What goes into one stack, each (B, L)."""

    tokens: np.ndarray
    blocks: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    prefix: np.ndarray


def side(inputs: Mapping[str, np.ndarray], source: bool) -> Side:
    """That of the encoder of an encoder-decoder if `source`, else of the stack that `tokens` go
    into, with what was left out filled in."""
    tokens = inputs["source" if source else "tokens"]

    def given(name: str, default: np.ndarray) -> np.ndarray:
        return inputs.get(f"source_{name}" if source else name, default)

    zeros = np.zeros_like(tokens)
    return Side(
        tokens,
        blocks=given("blocks", zeros + 1),
        positions=given("positions", zeros + np.arange(tokens.shape[1])),
        segments=given("segments", zeros),
        prefix=given("prefix", zeros),
    )


class Reference:
    """`weights` by canonical name. After `loss`, its gradients are in `gradients`, and in `losses`
    what is reported of each: sum(weights x negative log-likelihood) / normaliser."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, np.ndarray]) -> None:
        self.spec = spec
        self.parameters = {name: Tensor(array) for name, array in weights.items()}
        self.losses: dict[str, float] = {}
        self._passes: Mapping[str, np.ndarray] = {}

    def hidden(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """By stack, (B, L, D), and `pooled` (B, D) where there is a pooler."""
        states = self._states(inputs, {})
        if self.spec.pooler:
            states["pooled"] = self._pooled(states)
        return {name: state.value for name, state in states.items()}

    def logits(
        self, inputs: Mapping[str, np.ndarray], words: Words | None = None, head: str = "lm"
    ) -> np.ndarray:
        """(B, L, V), or (B, V) of a head over sequences."""
        return self._head(self._states(inputs, words or {}), head, None).value

    def loss(
        self,
        micro: MicroBatch,
        words: Words | None = None,
        passes: Mapping[str, np.ndarray] | None = None,
    ) -> float:
        """The sum over the losses of factor x sum(weights x l) / normaliser. `passes` says, by the
        name of a layer, where its activation, a ReLU, lets through what it is given, rather than
        where that is over 0: rounding moves some of it to the other side."""
        self._passes = passes or {}
        states = self._states(micro.inputs, words or {})
        total = Tensor(0.0)
        for loss in micro.losses:
            total = total + self._loss(states, loss)
        total.backward()
        return float(total.value)

    def hits(self, inputs: Mapping[str, np.ndarray], loss: Loss) -> float:
        """The weights of the targets whose logits are the largest, without dropout."""
        z = self._head(self._states(inputs, {}), loss.head, loss.positions).value
        return float(loss.weights[z.argmax(-1) == loss.targets].sum())

    @property
    def gradients(self) -> dict[str, np.ndarray]:
        return {
            name: np.zeros(tensor.shape) if tensor.gradient is None else tensor.gradient
            for name, tensor in self.parameters.items()
        }

    # Outputs

    def _loss(self, states: Mapping[str, Tensor], loss: Loss) -> Tensor:
        z = self._head(states, loss.head, loss.positions)
        every = logsumexp(z)
        nll = every - z[(*np.indices(loss.targets.shape), loss.targets)]
        smooth = every - z.mean(-1)[..., 0]
        e = loss.smoothing
        each = (1 - e) * nll + e * smooth + loss.z_loss * every**2.0
        weights = loss.weights.astype(np.float64)
        self.losses[loss.name] = float((weights * nll.value).sum()) / loss.normaliser
        return loss.factor * (weights * each).sum() / loss.normaliser

    def _head(
        self, states: Mapping[str, Tensor], head: str, positions: np.ndarray | None
    ) -> Tensor:
        x = states["decoder" if "decoder" in states else "encoder"]
        over = {task.name: task.over for task in self.spec.task_heads}.get(head, "token")
        if over == "sequence":
            return self._linear(
                self._pooled(states) if self.spec.pooler else x[:, 0], "heads." + head
            )
        if positions is not None:
            x = x[np.arange(len(positions))[:, None], positions]
        if head != "lm":
            return self._linear(x, f"heads.{head}")
        x = x * self.spec.output_scale
        if self.spec.head_transform:
            x = self._activation(self._linear(x, "heads.lm.transform"), "heads.lm")
            x = self._norm(x, "heads.lm.norm")
        if self.spec.tied:
            x = x @ self.parameters["embeddings.tokens"].swapaxes(0, 1)
        else:
            x = x @ self.parameters["heads.lm.kernel"]
        return x + self.parameters["heads.lm.bias"] if self.spec.head_bias else x

    def _pooled(self, states: Mapping[str, Tensor]) -> Tensor:
        return tanh(self._linear(states["encoder"][:, 0], "pooler"))

    # Stacks

    def _states(self, inputs: Mapping[str, np.ndarray], words: Words) -> dict[str, Tensor]:
        """What the stacks give."""
        both = len(self.spec.stacks) == 2
        states: dict[str, Tensor] = {}
        for stack in self.spec.stacks:  # the encoder first
            own = side(inputs, both and stack == "encoder")
            memory = (states["encoder"], side(inputs, True)) if both and states else None
            states[stack] = self._stack(stack, own, memory, words.get(stack))
        return states

    def _stack(
        self,
        stack: str,
        own: Side,
        memory: tuple[Tensor, Side] | None,
        words: DropoutWords | None,
    ) -> Tensor:
        """`memory` is the encoder's output, for a stack that has attention to it."""
        spec, length = self.spec, own.tokens.shape[1]
        seen = own.blocks[:, :, None] == own.blocks[:, None, :]
        if stack == "decoder":
            place = np.arange(length)
            seen = seen & ((place <= place[:, None]) | (own.prefix[:, None, :] == 1))
        bias = self._distance_bias(stack, length)
        sites = iter(range(1 + 3 * spec.stacks[stack]))
        x = self._drop(self._embeddings(own), words, next(sites))

        def branch(x: Tensor, name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
            norm = f"{stack}.{index}.{name}_norm"
            if spec.norm_placement == "pre":
                return x + self._drop(function(self._norm(x, norm)), words, next(sites))
            return self._norm(x + self._drop(function(x), words, next(sites)), norm)

        for index in range(spec.stacks[stack]):

            def to_self(x: Tensor, index: int = index) -> Tensor:
                masks = words and (words.attention_rows, words.attention_columns)
                name = f"{stack}.{index}.attention"
                return self._attention(x, x, name, index, seen, masks, bias, own.positions)

            def to_encoder(x: Tensor, index: int = index) -> Tensor:
                states, source = memory
                allowed = own.blocks[:, :, None] == source.blocks[:, None, :]
                masks = words and (words.cross_rows, words.cross_columns)
                name = f"{stack}.{index}.cross_attention"
                return self._attention(x, states, name, index, allowed, masks)

            x = branch(x, "attention", to_self)
            if memory is not None:
                x = branch(x, "cross_attention", to_encoder)
            x = branch(x, "feed_forward", lambda x, i=index: self._feed_forward(x, stack, i))
        return self._norm(x, f"{stack}.norm") if spec.norm_placement == "pre" else x

    def _embeddings(self, own: Side) -> Tensor:
        spec, get = self.spec, self.parameters
        x = get["embeddings.tokens"][own.tokens] * spec.embedding_scale
        if spec.positions == "learned":
            x = x + get["embeddings.positions"][own.positions + spec.position_offset]
        elif spec.positions == "sinusoidal":
            x = x + sinusoidal_positions(spec)[own.positions]
        if spec.segments:
            x = x + get["embeddings.segments"][own.segments]
        return self._norm(x, "embeddings.norm") if spec.has_embedding_norm else x

    def _distance_bias(self, stack: str, length: int) -> Tensor | None:
        """What is added to the scores of every self-attention of a stack, (H, L, M)."""
        place = np.arange(length)
        if self.spec.positions == "relative":
            buckets = relative_buckets(self.spec, stack, range(length), range(length))
            return self.parameters[f"{stack}.relative_bias"][buckets].swapaxes(1, 2).swapaxes(0, 1)
        if self.spec.positions == "alibi":
            apart = np.abs(place[:, None] - place)
            return Tensor(-alibi_slopes(self.spec.heads)[:, None, None].astype(float) * apart)
        return None

    # Layers

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.parameters[f"{name}.kernel"] + self.parameters.get(f"{name}.bias", 0.0)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        if self.spec.norm == "layer_norm":
            x = x - x.mean(-1)
        x = x * ((x * x).mean(-1) + self.spec.norm_epsilon) ** -0.5
        return x * self.parameters[f"{name}.scale"] + self.parameters.get(f"{name}.bias", 0.0)

    def _drop(self, x: Tensor, words: DropoutWords | None, site: int) -> Tensor:
        rate = self.spec.dropout
        if words is None or not rate:
            return x
        keep = keep_mask(words.residual_rows[site], words.residual_columns[site], rate)
        return x * (keep / (1 - rate))

    def _attention(
        self,
        x: Tensor,
        memory: Tensor,
        name: str,
        index: int,
        seen: np.ndarray,
        masks: tuple[np.ndarray, np.ndarray] | None,
        bias: Tensor | None = None,
        positions: np.ndarray | None = None,
    ) -> Tensor:
        """Queries of x (B, L, D), keys and values of `memory` (B, M, D); `seen` (B, L, M); `bias`
        on the scores; `positions` where queries and keys may be turned by theirs."""
        spec, width = self.spec, self.spec.head_width

        def heads(y: Tensor, part: str) -> Tensor:
            y = self._linear(y, f"{name}.{part}")
            return y.reshape(*y.shape[:2], -1, width).swapaxes(1, 2)

        query, key, value = heads(x, "query"), heads(memory, "key"), heads(memory, "value")
        if spec.positions == "rotary" and positions is not None:
            query, key = self._turn(query, positions), self._turn(key, positions)
        group = np.arange(spec.heads) // (spec.heads // spec.key_value_count)
        key, value = key[:, group], value[:, group]
        scores = query @ key.swapaxes(2, 3) * spec.attention_scale
        if bias is not None:
            scores = scores + bias
        probabilities = softmax(where(seen[:, None], scores, FAR))
        rate = spec.attention_dropout
        if masks is not None and rate:
            rows, columns = masks
            probabilities = probabilities * (
                keep_mask(rows[index], columns[index], rate) / (1 - rate)
            )
        mixed = (probabilities @ value).swapaxes(1, 2)
        return self._linear(mixed.reshape(*x.shape[:2], -1), f"{name}.output")

    def _turn(self, x: Tensor, positions: np.ndarray) -> Tensor:
        """(B, H, L, K), by the angles of `positions` (B, L)."""
        cosines, sines = (table[positions][:, None] for table in rotary_tables(self.spec))
        half = self.spec.head_width // 2
        a, b = x[..., :half], x[..., half:]
        return concatenate([a * cosines - b * sines, b * cosines + a * sines], -1)

    def _feed_forward(self, x: Tensor, stack: str, index: int) -> Tensor:
        name = f"{stack}.{index}.feed_forward"
        up = self._linear(x, f"{name}.up")
        if self.spec.gated:
            inner = self._activation(self._linear(x, f"{name}.gate"), name) * up
        else:
            inner = self._activation(up, name)
        return self._linear(inner, f"{name}.down")

    def _activation(self, x: Tensor, name: str) -> Tensor:
        if name in self._passes:
            return where(self._passes[name].reshape(x.shape), x, 0.0)
        return ACTIVATIONS[self.spec.activation](x)
