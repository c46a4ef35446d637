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


def own_name(canonical: str) -> tuple[str, int | None]:
    """The name of the variable that holds a canonical parameter, and for the fused query, key
    and value kernel which third of its columns."""
    *path, layer, kind = canonical.split(".")
    if path and path[-1] == "attention" and layer in ("query", "key", "value"):
        if kind == "bias":
            return ".".join([*path, f"{layer}_bias"]), None
        return ".".join([*path, "qkv_kernel"]), ("query", "key", "value").index(layer)
    if canonical.startswith("decoder.norm."):
        return canonical.removeprefix("decoder."), None
    if canonical == "heads.lm.kernel":
        return "lm_kernel", None
    return canonical, None


def block(shape: Sequence[int], parts: int) -> tuple[int, int, int]:
    """The shape (rows, parts, columns) of a tensor that holds `parts` canonical matrices."""
    rows, columns = (1, 1, *shape)[-2:]
    return rows, parts, columns // parts


class Weights:
    """All variables of a model, and their gradients in one flat buffer, which makes the allreduce
    one operation.

    `values`: the variables; `decays`: for each, whether weight decay applies; `gradients`
    (P + tail,), whose last `tail` elements travel with the gradients.
    """

    def __init__(self, model: keras.Model, spec: ModelSpec, tail: int, device: str) -> None:
        self.spec = spec
        # A path is transformer/decoder.0/attention/output/kernel: layers bear canonical names.
        own = {v.path.partition("/")[2].replace("/", "."): v.value for v in model.weights}
        order: dict[str, bool] = {}
        for parameter in spec.parameters:
            order.setdefault(own_name(parameter.name)[0], parameter.decay)
        parts = Counter(own_name(parameter.name)[0] for parameter in spec.parameters)
        assert set(order) == set(own), set(order) ^ set(own)
        self._index = {name: index for index, name in enumerate(order)}
        self.values: list[tf.Variable] = [own[name] for name in order]
        self.names, self.decays = list(order), list(order.values())
        self.blocks = [block(own[name].shape, parts[name]) for name in order]
        self.sizes = [math.prod(value.shape) for value in self.values]
        self._ends = list(itertools.accumulate(self.sizes))
        self.size = self._ends[-1]
        self.gradients = tf.zeros(self.size + tail, self.values[0].dtype)

    def read(self, buffer: Sequence[tf.Tensor | tf.Variable]) -> dict[str, np.ndarray]:
        """Copies of all canonical tensors among own tensors in the order of `values`."""
        tensors = {}
        for parameter in self.spec.parameters:
            name, third = own_name(parameter.name)
            array = buffer[self._index[name]].numpy()
            part = array if third is None else np.split(array, 3, 1)[third]
            tensors[parameter.name] = np.array(part.reshape(parameter.shape), order="C")
        return tensors

    def write(self, buffer: Sequence[tf.Variable], tensors: Mapping[str, np.ndarray]) -> None:
        """Fill variables in the order of `values` from canonical tensors. Raises `KeyError` for a
        missing one."""
        arrays = [np.empty(v.shape, v.dtype.as_numpy_dtype) for v in self.values]
        for parameter in self.spec.parameters:
            name, third = own_name(parameter.name)
            array = arrays[self._index[name]]
            part = array if third is None else np.split(array, 3, 1)[third]
            part[...] = tensors[parameter.name]
        for variable, array in zip(buffer, arrays, strict=True):
            variable.assign(array)

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
