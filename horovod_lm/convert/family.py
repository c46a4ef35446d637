"""What the maps of all families are made of: rows of names, and careful reading of a config."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from horovod_lm.errors import UserError
from horovod_lm.spec import Kind, ModelSpec

Json = dict[str, Any]


@dataclass(frozen=True)
class Shapes:
    """The tensors of a folder, by their full names, and whether two of them are `same`."""

    shapes: Mapping[str, tuple[int, ...]]
    same: Callable[[str, str], bool]

    def __contains__(self, name: str) -> bool:
        return name in self.shapes


@dataclass(frozen=True)
class Row:
    """One tensor of a family's file and what it is here.

    `parts` are canonical names: the tensor is the one part itself, its transpose, or several parts
    side by side on the last axis (`joined`). With `copy` another row holds the same, and files may
    do without this one. With `unread` transformers reads another row where both are there, so that
    a file may hold anything in this one.
    """

    name: str
    parts: tuple[str, ...]
    form: Literal["same", "transposed", "joined"] = "same"
    copy: bool = False
    unread: bool = False

    def split(self, array: np.ndarray, spec: Mapping[str, tuple[int, ...]]) -> list[np.ndarray]:
        """The parts of a file's tensor; `spec` are their shapes."""
        if self.form == "transposed":
            return [array.T]
        if self.form == "same":
            return [array]
        ends = np.cumsum([spec[part][-1] for part in self.parts])
        return np.split(array, ends[:-1], axis=-1)

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """The file's tensor of its parts."""
        if self.form == "transposed":
            return parts[0].T
        return np.concatenate(parts, axis=-1) if self.form == "joined" else parts[0]

    def shape(self, spec: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the file's tensor."""
        if self.form == "transposed":
            return spec[self.parts[0]][::-1]
        first = spec[self.parts[0]]
        return (*first[:-1], sum(spec[part][-1] for part in self.parts))


class Family(Protocol):
    """How models of one `kind` stand in `config.json` and in their tensors.

    `name` is the config's model_type; `prefix` stands before the names of all tensors but heads,
    and is missing from files of the bare model; `kept` are patterns of names that files may have
    and no model needs; `old` are endings of names that were called otherwise (old, new).
    """

    name: str
    kind: Kind
    prefix: str
    kept: tuple[str, ...]
    old: tuple[tuple[str, str], ...]

    def fields(self, config: Values, shapes: Shapes) -> Json:
        """The fields of the spec."""

    def config(self, spec: ModelSpec) -> Json:
        """A config.json that says what `spec` does as far as this family's can."""

    def rows(self, spec: ModelSpec) -> list[Row]:
        """Every tensor that a file may have."""

    def faults(self, spec: ModelSpec) -> list[str]:
        """Which fields of a spec that `rows` holds make it another model than there is."""


class Values:
    """A `config.json`, whose values are asked for by name, type and what is allowed."""

    def __init__(self, values: Json) -> None:
        self.values = values

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.values.get(key, default)
        if type(value) is not int or value < 1:
            raise UserError(f"config.json: {key} = {shown(value)} must be a whole number above 0")
        return value

    def index(self, key: str, default: int) -> int:
        """A whole number from 0."""
        value = self.values.get(key, default)
        if type(value) is not int or value < 0:
            raise UserError(
                f"config.json: {key} = {shown(value)} must be a whole number, 0 or more"
            )
        return value

    def maybe(self, key: str) -> int | None:
        """A whole number above 0, or nothing."""
        return None if self.values.get(key) is None else self.number(key)

    def real(self, key: str, default: float) -> float:
        """A number."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
            raise UserError(f"config.json: {key} = {shown(value)} must be a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"config.json: {key} = {shown(value)} must be true or false")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse another value; the first that is allowed is the default."""
        value = self.values.get(key, allowed[0])
        if value not in allowed:
            raise self.unsupported(key, value, allowed)

    def activation(self, key: str, default: str, value: str | None = None) -> str:
        """Our word for an activation of theirs."""
        value = value or self.values.get(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.unsupported(key, value, tuple(ACTIVATIONS))
        return ACTIVATIONS[value]

    def unsupported(self, key: str, value: Any, allowed: tuple[Any, ...]) -> UserError:
        """That there is no place for this value here."""
        words = " or ".join(dict.fromkeys(shown(a) for a in allowed))
        return UserError(f"config.json: {key} = {shown(value)} is not supported; allowed: {words}")

    @property
    def architecture(self) -> str:
        """The first of `architectures`, or ""."""
        names = self.values.get("architectures") or [""]
        return str(names[0]) if isinstance(names, list) else ""


def shown(value: Any) -> str:
    """A value as JSON writes it, on one line, and not all of a long one."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
THEIRS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}


def linear(theirs: str, ours: str, bias: bool = True) -> Iterator[Row]:
    """A linear layer of torch, whose weight is (outputs, inputs)."""
    yield Row(f"{theirs}.weight", (f"{ours}.kernel",), "transposed")
    if bias:
        yield Row(f"{theirs}.bias", (f"{ours}.bias",))


def norm(theirs: str, ours: str, bias: bool = True) -> Iterator[Row]:
    """A norm."""
    yield Row(f"{theirs}.weight", (f"{ours}.scale",))
    if bias:
        yield Row(f"{theirs}.bias", (f"{ours}.bias",))


def output(theirs: str, tied: bool) -> Row:
    """The output layer's weight; tied, it is the token embedding once more."""
    if tied:
        return Row(theirs, ("embeddings.tokens",), copy=True)
    return Row(theirs, ("heads.lm.kernel",), "transposed")


def task_head(shapes: Shapes, theirs: str, name: str, over: str) -> list[Json]:
    """A task head, where there is one."""
    shape = shapes.shapes.get(f"{theirs}.weight")
    if shape is None or len(shape) != 2:
        return []
    return [{"name": name, "outputs": shape[0], "over": over}]


def is_tied(config: Values, shapes: Shapes, head: str, default: bool) -> bool:
    """Whether there is one matrix for embedding and output."""
    tied = config.flag("tie_word_embeddings", default)
    # A bare model and a classifier have no output layer, and so none of their own.
    bare = not config.architecture.endswith(("LM", "LMHeadModel", "ForPreTraining"))
    return tied or (bare and head not in shapes)


def labels(spec: ModelSpec, *names: str) -> Json:
    """What a config says of a task head's number of outputs."""
    for head in spec.task_heads:
        if head.name in names:
            words = [f"LABEL_{i}" for i in range(head.outputs)]
            return {
                "id2label": {str(i): word for i, word in enumerate(words)},
                "label2id": {word: i for i, word in enumerate(words)},
            }
    return {}
