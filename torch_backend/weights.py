"""From canonical parameters to this backend's own tensors, in one flat buffer, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from horovod_lm.spec import ModelSpec


def own_name(spec: ModelSpec, canonical: str) -> tuple[str, int | None]:
    """The name of the module parameter that holds a canonical one, and which part of its columns
    where it is a fused kernel: query, key and value, or key and value alone where queries come from
    elsewhere or are wider."""
    first, *rest = canonical.split(".")
    if first == "heads":
        return ".".join([f"{rest[0]}_head", *rest[1:]]), None
    *path, layer, kind = [first, *rest]
    if path[-1:] not in (["attention"], ["cross_attention"]) or layer == "output":
        return canonical, None
    path = ".".join(path)
    if kind == "bias":
        return f"{path}.{layer}_bias", None
    layers = ["query", "key", "value"]
    if path.endswith(".attention") and spec.heads == spec.key_value_count:
        return f"{path}.qkv_kernel", layers.index(layer)
    if layer == "query":
        return f"{path}.query_kernel", None
    return f"{path}.key_value_kernel", layers.index(layer) - 1


def block(shape: Sequence[int], parts: int) -> tuple[int, int, int]:
    """The shape (rows, parts, columns) of a tensor that holds `parts` canonical matrices."""
    rows, columns = (1, 1, *shape)[-2:]
    return rows, parts, columns // parts


class Weights:
    """All parameters of a model as views of one flat buffer, and their gradients as views of
    another, which makes allreduce, norm and update one operation each. Parameters with weight
    decay come first.

    `values` (P,); `gradients` (P + tail,), whose last `tail` elements travel with the gradients.
    For each own tensor, in order: its name in `names`; in `decays`, whether weight decay applies;
    in `blocks` (rows, parts, columns), that is `parts` canonical matrices side by side, or
    (1, 1, elements) of a vector.
    """

    def __init__(self, model: nn.Module, spec: ModelSpec, tail: int, device: torch.device) -> None:
        self.spec = spec
        own = dict(model.named_parameters())
        order: dict[str, bool] = {}
        for parameter in spec.parameters:
            order.setdefault(own_name(spec, parameter.name)[0], parameter.decay)
        parts = Counter(own_name(spec, parameter.name)[0] for parameter in spec.parameters)
        assert set(order) == set(own), set(order) ^ set(own)
        names = sorted(order, key=lambda name: not order[name])
        self.names, self.decays, self._parts = names, [order[name] for name in names], parts
        self.blocks = [block(own[name].shape, parts[name]) for name in names]
        self.size = sum(own[name].numel() for name in names)
        self.decayed = sum(own[name].numel() for name in names if order[name])
        dtype = next(model.parameters()).dtype
        self.values = torch.zeros(self.size, dtype=dtype, device=device)
        self.gradients = torch.zeros(self.size + tail, dtype=dtype, device=device)
        self.tail = self.gradients[self.size :]
        self.slices: dict[str, slice] = {}
        self.shapes: dict[str, torch.Size] = {}
        start = 0
        for name in names:
            part = slice(start, start + own[name].numel())
            self.slices[name], self.shapes[name] = part, own[name].shape
            own[name].data = self.values[part].view(own[name].shape)
            own[name].grad = self.gradients[part].view(own[name].shape)
            start = part.stop

    def read(self, buffer: torch.Tensor) -> dict[str, np.ndarray]:
        """Copies of all canonical tensors in a flat buffer of this layout."""
        tensors = {}
        for parameter in self.spec.parameters:
            view = self._view(buffer, parameter.name)
            tensors[parameter.name] = np.array(view.detach().cpu().numpy(), order="C")
        return tensors

    def write(self, buffer: torch.Tensor, tensors: Mapping[str, np.ndarray]) -> None:
        """Fill a flat buffer of this layout from canonical tensors. Raises `KeyError` for a
        missing one."""
        for parameter in self.spec.parameters:
            array = np.ascontiguousarray(tensors[parameter.name])
            self._view(buffer, parameter.name).copy_(torch.from_numpy(array))

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The own tensors in a flat buffer, each as (elements,)."""
        return [buffer[part] for part in self.slices.values()]

    def first_not_finite(self, buffer: torch.Tensor) -> str | None:
        """The canonical name of the first tensor with an element that is not finite."""
        for parameter in self.spec.parameters:
            if not torch.isfinite(self._view(buffer, parameter.name)).all():
                return parameter.name
        return None

    def _view(self, buffer: torch.Tensor, canonical: str) -> torch.Tensor:
        name, part = own_name(self.spec, canonical)
        view = buffer[self.slices[name]].view(self.shapes[name])
        return view if part is None else view.chunk(self._parts[name], dim=1)[part]
