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
    Sums,
)
from horovod_lm.errors import UserError
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
        self.model = Transformer(spec, settings.precision, settings.recompute).to(device)
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
        hidden = self.model(self._inputs(micro.inputs), self._noise(micro, step))
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for index, loss in enumerate(micro.losses):
            coefficient = loss_scale * loss.factor / loss.normaliser
            scaled, nll_sum, _ = self._loss(hidden, loss, coefficient)
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
    def evaluate(self, micro: MicroBatch) -> dict[str, Sums]:
        """By loss name, the sums on this rank, without dropout."""
        hidden = self.model(self._inputs(micro.inputs))
        found = {}
        for loss in micro.losses:
            _, nll_sum, hits = self._loss(hidden, loss, 0.0)
            found[loss.name] = Sums(nll_sum.item(), float(loss.weights.sum()), hits.item())
        return found

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, np.ndarray], head: str = "lm") -> np.ndarray:
        """Logits of a head without dropout: (B, L, outputs), or (B, outputs)."""
        features = self.model.features(self.model(self._inputs(inputs)), head)
        return self.model.logits(features, head).cpu().numpy()

    @torch.no_grad()
    def hidden(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the stacks give without dropout, by stack, and `pooled`."""
        hidden = self.model(self._inputs(inputs))
        return {name: x.cpu().numpy() for name, x in hidden.items()}

    @torch.no_grad()
    def trace(self, micro: MicroBatch, step: int) -> dict[str, np.ndarray]:
        """The activations of one forward with the dropout of `step`, by site."""
        inputs = self._inputs(micro.inputs)
        with tracing(_as_array) as sites:
            hidden = self.model(inputs, self._noise(micro, step))
            scaled = [self._loss(hidden, s, s.factor / s.normaliser)[0] for s in micro.losses]
            record("loss", torch.stack(scaled).sum(0, keepdim=True))
        sites["loss"] = sites["loss"].reshape(())
        heads = [loss.head for loss in micro.losses]
        for loss in micro.losses:
            if heads.count(loss.head) == 1:
                site = _logits_site(loss.head)
                sites[site] = sites[site].reshape(*loss.targets.shape, -1)
        return sites

    @torch.no_grad()
    def start(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Any]:
        """Begin decoding after prompts `tokens` (B, L)."""
        if "decoder" not in self.spec.stacks:
            raise UserError(f'a model of kind "{self.spec.kind}" has no decoder to generate with')
        hidden, cache = self.model.start(self._inputs(inputs))
        return self._logits(hidden), cache

    @torch.no_grad()
    def next(self, tokens: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        """Feed one token a row."""
        hidden, cache = self.model.next(self._tensor(tokens), cache)
        return self._logits(hidden), cache

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

    def _inputs(self, inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {name: self._tensor(array) for name, array in inputs.items()}

    def _noise(self, micro: MicroBatch, step: int) -> dict[str, Noise]:
        """What the dropout of one forward is made of, by stack."""
        seed, rows, stacks = self.settings.seed, micro.rows, list(self.spec.stacks)
        if self.settings.dropout_generator == "native":
            first = int(native_seed(seed, step, rows).view(np.int64)[0])
            return {name: Native(first + number) for number, name in enumerate(stacks)}
        inputs = ["source", "tokens"][-len(stacks) :]
        lengths = {
            name: micro.inputs[key].shape[1] for name, key in zip(stacks, inputs, strict=True)
        }
        noise = {}
        for name, words in dropout_words(self.spec, seed, step, rows, lengths).items():
            arrays = (getattr(words, field) for field in Words._fields)
            noise[name] = Words(*(None if a is None else self._tensor(a) for a in arrays))
        return noise

    def _loss(self, hidden, loss, coefficient: float) -> tuple[torch.Tensor, ...]:
        positions = None if loss.positions is None else self._tensor(loss.positions)
        features = self.model.features(hidden, loss.head, positions)
        weights = self._tensor(loss.weights.reshape(-1)).to(self.dtype)
        return head_loss(
            features.reshape(-1, features.shape[-1]),
            self.model.head_kernel(loss.head),
            self.model.head_bias(loss.head),
            self._tensor(loss.targets.reshape(-1)).long(),
            weights,
            weights * coefficient,
            loss.smoothing,
            loss.z_loss,
            self.model.half,
            _logits_site(loss.head),
        )

    def _logits(self, hidden: torch.Tensor) -> np.ndarray:
        features = self.model.head("lm")(hidden)
        return self.model.logits(features).cpu().numpy()


def _logits_site(head: str) -> str:
    """The name of a head's logits in records."""
    return "logits" if head == "lm" else f"{head}.logits"


def _as_array(x: torch.Tensor) -> np.ndarray:
    return full(x).detach().cpu().numpy()
