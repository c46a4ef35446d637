"""The decoder written once more, plainly, in fp64 on torch with autograd, from the spec's own words
and canonical parameters: what both backends are measured against. It shares no code with them."""

from __future__ import annotations

import math

import numpy as np
import torch

from horovod_lm.backend import MicroBatch
from horovod_lm.randomness import DropoutWords, keep_mask
from horovod_lm.spec import ModelSpec, sinusoidal_positions


class Reference:
    """`weights` by canonical name; gradients are in `gradients` after `loss`."""

    def __init__(self, spec: ModelSpec, weights: dict[str, np.ndarray]) -> None:
        self.spec = spec
        self.parameters = {
            name: torch.tensor(array, dtype=torch.float64, requires_grad=True)
            for name, array in weights.items()
        }

    def logits(self, tokens: np.ndarray, words: DropoutWords | None = None) -> torch.Tensor:
        """(B, L, V)."""
        spec, get = self.spec, self.parameters
        ids = torch.from_numpy(tokens).long()
        x = get["embeddings.tokens"][ids] * spec.embedding_scale
        if spec.positions == "learned":
            x = x + get["embeddings.positions"][: ids.shape[1]]
        else:
            x = x + torch.from_numpy(sinusoidal_positions(spec)).double()[: ids.shape[1]]
        if spec.norm_placement == "post":
            x = self._norm(x, "embeddings.norm")
        x = self._drop(x, words, 0)
        for index in range(spec.layers):
            name = f"decoder.{index}"
            branches = [
                (f"{name}.attention_norm", lambda y, i=index: self._attention(y, i, words)),
                (f"{name}.feed_forward_norm", lambda y, i=index: self._feed_forward(y, i)),
            ]
            for place, (norm, branch) in enumerate(branches):
                site = 1 + 2 * index + place
                if spec.norm_placement == "pre":
                    x = x + self._drop(branch(self._norm(x, norm)), words, site)
                else:
                    x = self._norm(x + self._drop(branch(x), words, site), norm)
        if spec.norm_placement == "pre":
            x = self._norm(x, "decoder.norm")
        if spec.tied:
            return x @ get["embeddings.tokens"].T
        return x @ get["heads.lm.kernel"]

    def loss(self, micro: MicroBatch, words: DropoutWords | None = None) -> float:
        """factor x sum(weights x nll) / normaliser over the losses, and its gradients."""
        logs = torch.log_softmax(self.logits(micro.inputs["tokens"], words), -1)
        total = torch.zeros((), dtype=torch.float64)
        for loss in micro.losses:
            targets = torch.from_numpy(loss.targets).long()[..., None]
            nll = -torch.gather(logs, -1, targets)[..., 0]
            weights = torch.from_numpy(loss.weights).double()
            total = total + loss.factor * (weights * nll).sum() / loss.normaliser
        total.backward()
        return total.item()

    @property
    def gradients(self) -> dict[str, np.ndarray]:
        return {name: tensor.grad.numpy() for name, tensor in self.parameters.items()}

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ self.parameters[f"{name}.kernel"]
        return y + self.parameters.get(f"{name}.bias", 0.0)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        y = centred / torch.sqrt(variance + self.spec.norm_epsilon)
        return y * self.parameters[f"{name}.scale"] + self.parameters.get(f"{name}.bias", 0.0)

    def _drop(self, x: torch.Tensor, words: DropoutWords | None, site: int) -> torch.Tensor:
        rate = self.spec.dropout
        if words is None or not rate:
            return x
        keep = keep_mask(words.residual_rows[site], words.residual_columns[site], rate)
        return x * torch.from_numpy(keep) / (1 - rate)

    def _attention(self, x: torch.Tensor, index: int, words: DropoutWords | None) -> torch.Tensor:
        name, (batch, length, width) = f"decoder.{index}.attention", x.shape
        heads, rate = self.spec.heads, self.spec.attention_dropout
        query, key, value = (
            self._linear(x, f"{name}.{part}").reshape(batch, length, heads, -1).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(width / heads)
        future = torch.arange(length)[None, :] > torch.arange(length)[:, None]
        probabilities = torch.softmax(scores.masked_fill(future, -math.inf), -1)
        if words is not None and rate:
            keep = keep_mask(words.attention_rows[index], words.attention_columns[index], rate)
            probabilities = probabilities * torch.from_numpy(keep) / (1 - rate)
        mixed = (probabilities @ value).transpose(1, 2).reshape(batch, length, width)
        return self._linear(mixed, f"{name}.output")

    def _feed_forward(self, x: torch.Tensor, index: int) -> torch.Tensor:
        name = f"decoder.{index}.feed_forward"
        x = self._linear(x, f"{name}.up")
        if self.spec.activation == "relu":
            x = x.clamp(min=0)
        elif self.spec.activation == "gelu":
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        else:
            cube = x + 0.044715 * x**3
            x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * cube))
        return self._linear(x, f"{name}.down")
