"""A model with its gradients and optimizer: what the loop drives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from horovod_lm.activations import record, tracing
from horovod_lm.backend import (
    OVERFLOW,
    EngineSettings,
    EngineState,
    MicroBatch,
    Reduced,
)
from horovod_lm.randomness import dropout_words, native_seed
from horovod_lm.spec import ModelSpec
from torch_backend.communicator import Communicator
from torch_backend.layers import Native, Noise, Words
from torch_backend.loss import head_loss
from torch_backend.model import Transformer
from torch_backend.optimizer import OPTIMIZERS, global_norm
from torch_backend.precision import FULL_TYPES, full
from torch_backend.profiler import scope
from torch_backend.weights import Weights


class Engine:
    """See `horovod_lm.backend.Engine`. Gradients accumulate in one flat buffer whose tail
    carries the losses and each rank's status through the same allreduce."""

    def __init__(
        self,
        spec: ModelSpec,
        settings: EngineSettings,
        communicator: Communicator,
        device: torch.device,
    ) -> None:
        self.spec, self.settings, self.communicator = spec, settings, communicator
        self.device, self.dtype = device, FULL_TYPES[settings.precision]
        self.model = Transformer(spec, settings.precision).to(device)
        tail = len(settings.loss_names) + communicator.size
        self.weights = Weights(self.model, spec, tail, device)
        self.optimizer = OPTIMIZERS[settings.optimizer](self.weights, settings)
        self.updates = 0
        self._norm = 0.0
        self._loss_scale = 1.0
        self._empty = True

    def forward_backward(self, micro: MicroBatch, step: int, loss_scale: float) -> None:
        """Add the gradients and losses of one micro-batch to the accumulator."""
        self._begin()
        self._loss_scale = loss_scale
        tokens = self._tensor(micro.inputs["tokens"])
        hidden = self.model(tokens, self._noise(micro, step))
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for index, loss in enumerate(micro.losses):
            scaled, nll_sum = self._loss(hidden, loss, loss_scale * loss.factor / loss.normaliser)
            total = total + scaled
            self.weights.tail[index] += nll_sum / loss.normaliser
        total.backward()

    @scope("optimizer")
    def reduce_gradients(self, status: int = 0) -> Reduced:
        """Sum the accumulator over the ranks and undo the loss scale."""
        self._begin()
        self._empty = True
        names, weights = self.settings.loss_names, self.weights
        gradients = weights.gradients[: weights.size]
        # Only a scaled loss needs to know which rank overflowed; elsewhere it is not worth a pass.
        if self.settings.precision == "fp16" and not torch.isfinite(gradients).all():
            status |= OVERFLOW
        weights.tail[len(names) + self.communicator.rank] = status
        self.communicator.reduce_in_place(weights.gradients)
        if self._loss_scale != 1:
            gradients.mul_(1 / self._loss_scale)
        self._norm = global_norm(weights)
        finite = math.isfinite(self._norm)
        tail = weights.tail.tolist()
        return Reduced(
            losses=dict(zip(names, tail, strict=False)),
            finite=finite,
            norm=self._norm,
            status=np.array(tail[len(names) :]).astype(np.int64),
            tensor=None if finite else weights.first_not_finite(gradients),
        )

    @scope("optimizer")
    def apply_gradients(self, learning_rate: float, clip: float | None) -> None:
        """One update with the reduced gradient, clipped to a global norm of `clip`."""
        if clip is not None and self._norm > clip:
            self.weights.gradients[: self.weights.size].mul_(clip / self._norm)
        self.updates += 1
        self.optimizer.step(learning_rate, self.updates)

    @torch.no_grad()
    def evaluate(self, micro: MicroBatch) -> dict[str, tuple[float, float]]:
        """By loss name: (weighted sum of nll, sum of weights) on this rank, without dropout."""
        hidden = self.model(self._tensor(micro.inputs["tokens"]))
        return {
            loss.name: (self._loss(hidden, loss, 0.0)[1].item(), float(loss.weights.sum()))
            for loss in micro.losses
        }

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """(B, L, V) logits without dropout."""
        return self.model.logits(self.model(self._tensor(inputs["tokens"]))).cpu().numpy()

    @torch.no_grad()
    def trace(self, micro: MicroBatch, step: int) -> dict[str, np.ndarray]:
        """The activations of one forward with the dropout of `step`, by site."""
        tokens = self._tensor(micro.inputs["tokens"])
        with tracing(_as_array) as sites:
            hidden = self.model(tokens, self._noise(micro, step))
            scaled = [self._loss(hidden, s, s.factor / s.normaliser)[0] for s in micro.losses]
            record("loss", torch.stack(scaled).sum(0, keepdim=True))
        sites["logits"] = sites["logits"].reshape(*tokens.shape, -1)
        sites["loss"] = sites["loss"].reshape(())
        return sites

    @torch.no_grad()
    def start(self, tokens: np.ndarray) -> tuple[np.ndarray, Any]:
        """Begin decoding after prompts (B, L)."""
        spec = self.spec
        shape = (spec.layers, 2, len(tokens), spec.heads, spec.context, spec.head_width)
        return self._decode(tokens, torch.zeros(shape, dtype=self.dtype, device=self.device), 0)

    @torch.no_grad()
    def next(self, tokens: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        """Feed one token a row."""
        caches, position = cache
        return self._decode(tokens[:, None], caches, position)

    def gradients(self) -> dict[str, np.ndarray]:
        """The reduced gradient by canonical name, as it is before `apply_gradients` clips it."""
        return self.weights.read(self.weights.gradients)

    def load_gradients(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Take `gradients` for what `reduce_gradients` has given."""
        self.weights.write(self.weights.gradients, gradients)
        self._norm = global_norm(self.weights)

    def state(self) -> EngineState:
        """A copy of weights, moments and update count."""
        return EngineState(
            self.weights.read(self.weights.values), self.optimizer.state(), self.updates
        )

    @torch.no_grad()
    def load_state(self, state: EngineState) -> None:
        """Take over `state`; without moments they start at 0."""
        self.weights.write(self.weights.values, state.weights)
        self.optimizer.load_state(state.moments)
        self.updates = state.updates

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _begin(self) -> None:
        if self._empty:
            self.weights.gradients.zero_()
            self._empty = False

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _noise(self, micro: MicroBatch, step: int) -> Noise | None:
        """What the dropout of one forward is made of."""
        seed, rows = self.settings.seed, micro.rows
        if self.settings.dropout_generator == "native":
            return Native(int(native_seed(seed, step, rows).view(np.int64)[0]))
        length = micro.inputs["tokens"].shape[1]
        words = dropout_words(self.spec, seed, step, rows, length)
        if words is None:
            return None
        arrays = (
            words.residual_rows,
            words.residual_columns,
            words.attention_rows,
            words.attention_columns,
        )
        return Words(*(None if a is None else self._tensor(a) for a in arrays))

    def _loss(self, hidden, loss, coefficient: float) -> tuple[torch.Tensor, torch.Tensor]:
        weights = self._tensor(loss.weights.reshape(-1)).to(self.dtype)
        return head_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            self.model.head_kernel(loss.head),
            self._tensor(loss.targets.reshape(-1)).long(),
            weights,
            weights * coefficient,
            self.model.half,
        )

    def _decode(self, tokens, caches, position: int) -> tuple[np.ndarray, Any]:
        hidden = self.model(self._tensor(tokens), None, caches, position)
        logits = self.model.logits(hidden[:, -1])
        return logits.cpu().numpy(), (caches, position + tokens.shape[1])


def _as_array(x: torch.Tensor) -> np.ndarray:
    return full(x).detach().cpu().numpy()
