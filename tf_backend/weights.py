"""From canonical parameters to this backend's own variables, and back."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from horovod_lm.spec import ModelSpec


def own_name(spec: ModelSpec, canonical: str) -> tuple[str, int | None]:
    """The name of the variable that holds a canonical parameter, and for a fused kernel of query,
    key and value, or of key and value alone, which part of its columns."""
    *path, layer, kind = canonical.split(".")
    if not path or layer not in ("query", "key", "value"):
        return canonical, None
    if kind == "bias":
        return ".".join([*path, f"{layer}_bias"]), None
    if path[-1] == "attention" and spec.key_value_count == spec.heads:
        return ".".join([*path, "qkv_kernel"]), ("query", "key", "value").index(layer)
    if layer == "query":
        return ".".join([*path, "query_kernel"]), None
    return ".".join([*path, "key_value_kernel"]), ("key", "value").index(layer)


def block(shape: Sequence[int], parts: int) -> tuple[int, int, int]:
    """The shape (rows, parts, columns) of a tensor that holds `parts` canonical matrices."""
    rows, columns = (1, 1, *shape)[-2:]
    return rows, parts, columns // parts


class Weights:
    """All variables of a model, and their gradients in one flat buffer, which makes the allreduce
    one operation.

    `values`: the variables; `decays`: for each, whether weight decay applies; `gradients`
    (P + tail,), whose last `tail` elements travel with the gradients; None: there are no gradients.
    """

    def __init__(self, model: keras.Model, spec: ModelSpec, tail: int | None, device: str) -> None:
        self.spec = spec
        # A path is transformer/decoder/0/attention/output/kernel: layers bear canonical names.
        own = {v.path.partition("/")[2].replace("/", "."): v.value for v in model.weights}
        order: dict[str, bool] = {}
        for parameter in spec.parameters:
            order.setdefault(own_name(spec, parameter.name)[0], parameter.decay)
        parts = Counter(own_name(spec, parameter.name)[0] for parameter in spec.parameters)
        assert set(order) == set(own), set(order) ^ set(own)
        self._index = {name: index for index, name in enumerate(order)}
        self.values: list[tf.Variable] = [own[name] for name in order]
        self.names, self.decays = list(order), list(order.values())
        self.blocks = [block(own[name].shape, parts[name]) for name in order]
        self.sizes = [math.prod(value.shape) for value in self.values]
        self._ends = list(itertools.accumulate(self.sizes))
        self.size = self._ends[-1]
        if tail is not None:
            self.gradients = tf.zeros(self.size + tail, self.values[0].dtype)

    def read(self, buffer: Sequence[tf.Tensor | tf.Variable]) -> dict[str, np.ndarray]:
        """Copies of all canonical tensors among own tensors in the order of `values`."""
        tensors = {}
        for parameter in self.spec.parameters:
            name, part = own_name(self.spec, parameter.name)
            array = self._part(buffer[self._index[name]].numpy(), name, part)
            tensors[parameter.name] = np.array(array.reshape(parameter.shape), order="C")
        return tensors

    def write(self, buffer: Sequence[tf.Variable], tensors: Mapping[str, np.ndarray]) -> None:
        """Fill variables in the order of `values` from canonical tensors. Raises `KeyError` for a
        missing one."""
        parts: dict[str, list[tuple[int | None, str]]] = {name: [] for name in self.names}
        for parameter in self.spec.parameters:
            if parameter.name not in tensors:
                raise KeyError(parameter.name)
            name, part = own_name(self.spec, parameter.name)
            parts[name].append((part, parameter.name))
        # One after the other: no second copy of them all stands in memory.
        for variable, (name, own) in zip(buffer, parts.items(), strict=True):
            whole = np.empty(variable.shape, variable.dtype.as_numpy_dtype)
            for part, canonical in own:
                self._part(whole, name, part)[...] = tensors[canonical]
            variable.assign(whole)

    def views(self, buffer: tf.Tensor) -> list[tf.Tensor]:
        """The own tensors in a flat buffer, each in its shape."""
        # Slices and not tf.split, which copies.
        parts = [buffer[end - size : end] for size, end in zip(self.sizes, self._ends, strict=True)]
        return [tf.reshape(p, v.shape) for p, v in zip(parts, self.values, strict=True)]

    def first_not_finite(self, buffer: tf.Tensor) -> str | None:
        """The canonical name of the first tensor with an element that is not finite."""
        tensors = self.read(self.views(buffer))
        names = (name for name, array in tensors.items() if not np.isfinite(array).all())
        return next(names, None)

    def _part(self, array: np.ndarray, name: str, part: int | None) -> np.ndarray:
        """A view of the columns of one canonical matrix of an own one."""
        parts = self.blocks[self._index[name]][1]
        return array if part is None else np.split(array, parts, 1)[part]
