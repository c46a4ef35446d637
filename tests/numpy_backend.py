"""A third backend, in NumPy: an engine for tests of everything around the engines.

The model predicts the next token from the present one: logits = table[token], the rows of one
matrix `table` (V, V). Its gradients fit on a line, and its optimizer is plain gradient descent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from horovod_lm.backend import OVERFLOW, EngineState, Reduced, Sums

TABLE = "embeddings.tokens"


@dataclass
class NumpyEngine:
    """See `horovod_lm.backend.Engine`. Gradients are reduced in fp64, so that the number of ranks
    makes next to no difference."""

    communicator: object
    vocabulary: int
    updates: int = 0
    loss_names: tuple[str, ...] = ("lm",)

    def __post_init__(self):
        self.table = np.zeros((self.vocabulary, self.vocabulary))
        self._scale = 1.0
        self._clear()

    def _clear(self):
        self._gradient = np.zeros_like(self.table)
        self._losses = np.zeros(len(self.loss_names))

    def _nll(self, tokens, loss):
        """(B, L) nll, and (B, L, V) probabilities."""
        logits = self.table[tokens]
        logits = logits - logits.max(-1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.take_along_axis(logs, loss.targets[..., None], -1)[..., 0], np.exp(logs)

    def forward_backward(self, micro, step, loss_scale):
        for index, loss in enumerate(micro.losses):
            tokens = self._seen(micro, loss)
            nll, slopes = self._nll(tokens, loss)
            self._losses[index] += (loss.weights * nll).sum() / loss.normaliser
            slopes -= np.eye(self.vocabulary)[loss.targets]
            slopes *= (loss.weights * loss.factor / loss.normaliser)[..., None] * loss_scale
            np.add.at(self._gradient, tokens, slopes)
        self._scale = loss_scale

    @staticmethod
    def _seen(micro, loss):
        """The tokens at which `loss` has targets."""
        tokens = micro.inputs["tokens"]
        if loss.positions is None:
            return tokens
        return np.take_along_axis(tokens, loss.positions, 1)

    def reduce_gradients(self, status=0):
        ranks, rank = self.communicator.size, self.communicator.rank
        if not np.isfinite(self._gradient).all():
            status |= OVERFLOW
        flags = np.zeros(ranks)
        flags[rank] = status
        buffer = np.concatenate([self._gradient.ravel(), self._losses, flags])
        buffer = self.communicator.allreduce(buffer)
        self._clear()
        self.reduced = buffer[: self.table.size].reshape(self.table.shape) / self._scale
        finite = bool(np.isfinite(self.reduced).all())
        self._norm = float(np.sqrt((self.reduced**2).sum()))
        return Reduced(
            losses=dict(zip(self.loss_names, buffer[self.table.size :].tolist(), strict=False)),
            finite=finite,
            norm=self._norm,
            status=buffer[self.table.size + len(self.loss_names) :].astype(np.int64),
            tensor=None if finite else TABLE,
        )

    def apply_gradients(self, learning_rate, clip):
        factor = 1.0 if clip is None else min(1.0, clip / max(self._norm, 1e-300))
        self.table -= learning_rate * factor * self.reduced
        self.updates += 1

    def evaluate(self, micro):
        found = {}
        for loss in micro.losses:
            nll, shares = self._nll(self._seen(micro, loss), loss)
            largest = shares == shares.max(-1, keepdims=True)
            picked = np.take_along_axis(largest, loss.targets[..., None], -1)[..., 0]
            hits = loss.weights * picked / largest.sum(-1)
            found[loss.name] = Sums(
                float((loss.weights * nll).sum()), float(loss.weights.sum()), float(hits.sum())
            )
        return found

    def logits(self, inputs, head="lm"):
        return self.table[inputs["tokens"]].astype(np.float32)

    def hidden(self, inputs):
        return {"decoder": self.table[inputs["tokens"]].astype(np.float32)}

    def start(self, inputs):
        tokens = inputs["tokens"]
        return self.next(tokens[:, -1], tokens.shape[1] - 1)

    def next(self, tokens, cache):
        """The cache is the number of tokens so far."""
        return self.table[tokens].astype(np.float32), cache + 1

    def gradients(self):
        return {TABLE: self.reduced.astype(np.float32)}

    def state(self):
        return EngineState({TABLE: self.table.astype(np.float32)}, {}, self.updates)

    def load_state(self, state):
        self.table = state.weights[TABLE].astype(np.float64)
        self.updates = state.updates

    def synchronise(self):
        pass
