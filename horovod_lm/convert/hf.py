"""From a folder of transformers to canonical weights, and back."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from pydantic import ValidationError

from horovod_lm.convert import folder as files
from horovod_lm.convert import tensors
from horovod_lm.convert.bert import Bert, DistilBert, Roberta
from horovod_lm.convert.family import Family, Json, Row, Shapes, Values, shown
from horovod_lm.convert.folder import Weights
from horovod_lm.convert.gpt2 import Gpt2
from horovod_lm.convert.llama import Llama
from horovod_lm.convert.progress import counting
from horovod_lm.convert.t5 import T5
from horovod_lm.convert.tensors import Tensor
from horovod_lm.errors import UserError
from horovod_lm.spec import ModelSpec

_ALL: tuple[Family, ...] = (Bert(), Roberta(), DistilBert(), Gpt2(), T5(), Llama())
FAMILIES = {family.name: family for family in _ALL}
Legacy = Callable[[Path, Path], None]  # writes a pytorch_model.bin as safetensors
Log = Callable[[str], None]
Count = Callable[[int], None]


@dataclass(frozen=True)
class Model:
    """A model out of a folder: its spec and canonical fp32 weights, and what is needed to write
    the folder again: the headers of its weight files by name, the tensors and the files that the
    spec has no place for."""

    family: str
    spec: ModelSpec
    weights: dict[str, np.ndarray]
    headers: dict[str, str]
    extra: dict[str, Tensor]
    companions: dict[str, bytes]


def read_model(
    folder: Path, legacy: Legacy | None = None, keep_extra: bool = False, log: Log = print
) -> Model:
    """Read and check a model's folder. `legacy` reads a `pytorch_model.bin`, which is refused
    without it; with `keep_extra` tensors that have no place are kept, else refused. `log` is told
    how far it is, where that takes long."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; {_elsewhere(folder)}")
    text = files.read_bytes(folder, files.CONFIG)
    if text is None:
        raise UserError(f"{folder} has no config.json; {_inside(folder)}")
    config = files.parse_json(text, folder / files.CONFIG)
    family = family_of(config)
    companions = {files.CONFIG: text}
    for name in (files.INDEX, *files.COMPANIONS):
        data = files.read_bytes(folder, name)
        if data is not None:
            companions[name] = data
    with tempfile.TemporaryDirectory() as work:
        weights = _open(folder, Path(work), legacy)
        total = sum(t.data.nbytes for t in weights.tensors.values())
        with counting(log, "reading", total) as count:
            spec, values, extra = _take(folder, family, config, weights, keep_extra, count)
    _check_tokenizer(folder, companions.get(files.TOKENIZER), spec)
    headers = {name: file.header for name, file in weights.files.items()}
    return Model(family.name, spec, values, headers, extra, companions)


def _elsewhere(name: Path) -> str:
    """What to do about a path that is no folder."""
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) and not name.exists():
        return (
            "a model is not fetched by its name on the hub: "
            f"hf download {name} --local-dir {name.name}, and give that folder"
        )
    return "give the one that holds config.json"


def _inside(folder: Path) -> str:
    """What to do about a folder without a config."""
    if (folder / "config.toml").exists():
        return "it is a run: --from run"
    if (folder / "snapshots").is_dir():
        return "give one of the folders in its snapshots"
    return "give the folder of a model"


def family_of(config: Json) -> Family:
    """The family that a config.json names."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        what = "missing" if name is None else f"{shown(name)}, which is unknown"
        raise UserError(f"config.json: model_type is {what}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _open(folder: Path, work: Path, legacy: Legacy | None) -> Weights:
    weights = files.open_weights(folder)
    if weights is not None:
        return weights
    path = files.plain_file(folder, files.LEGACY)
    if path is None:
        raise UserError(
            f"{folder} has no weights: neither {files.WEIGHTS} nor {files.INDEX} is there; "
            "save_pretrained of transformers writes them"
        )
    if legacy is None:
        raise UserError(
            f"{folder} has {files.LEGACY} alone, a pickle of torch; --legacy reads it without "
            f"running code, with the torch backend"
        )
    legacy(path, work / files.WEIGHTS)
    return Weights({files.WEIGHTS: tensors.read(work / files.WEIGHTS)})


def full_names(family: Family, names: list[str]) -> dict[str, str]:
    """By a file's own name of a tensor, the full one of today."""
    prefix = family.prefix
    heads = {
        row.name.partition(".")[0] + "." for row in family.rows(ModelSpec(kind=family.kind))
    } - {prefix}
    bare = prefix and not any(name.startswith(prefix) for name in names)
    full = {}
    for name in names:
        new = name
        for old, today in family.old:
            if new.endswith(old):
                new = new.removesuffix(old) + today
        if bare and not new.startswith(tuple(heads)):
            new = prefix + new
        full[name] = new
    return full


def _take(
    folder: Path, family: Family, config: Json, weights: Weights, keep_extra: bool, count: Count
) -> tuple[ModelSpec, dict[str, np.ndarray], dict[str, Tensor]]:
    """Every tensor to its place."""
    found = _by_full_name(folder, family, weights)

    def same(one: str, other: str) -> bool:
        return one in found and other in found and _equal(found[one][1], found[other][1])

    shapes = Shapes({name: tensor.shape for name, (_, tensor) in found.items()}, same)
    spec = spec_of(family, config, shapes)
    faults = family.faults(spec)
    if faults:
        raise UserError(
            f"{folder}: its tensors are those of no {family.name} that transformers has: "
            + ", ".join(faults)
        )
    rows = {row.name: row for row in rows_of(family, spec)}
    values, unread = _values(folder, spec, rows, found, count)
    left = [name for name in found if name not in rows]
    kept = re.compile("|".join(family.kept)) if family.kept else None
    for name in left:
        if not keep_extra and not (kept and kept.fullmatch(name)):
            raise UserError(
                f"{folder}: the tensor {found[name][0]} has no place in a model of type "
                f"{family.name}; --keep-extra carries such tensors along, unused"
            )
    # The files may lie in a folder that is about to go.
    extra = {
        own: Tensor(tensor.dtype, tensor.shape, np.array(tensor.data))
        for own, tensor in (found[name] for name in [*left, *unread])
    }
    return spec, values, extra


def _by_full_name(folder: Path, family: Family, weights: Weights) -> dict[str, tuple[str, Tensor]]:
    """By the full name of a tensor, the file's own name of it and the tensor."""
    given = weights.tensors
    found: dict[str, tuple[str, Tensor]] = {}
    for own, full in full_names(family, list(given)).items():
        if full in found:
            raise UserError(f"{folder}: {found[full][0]} and {own} are one tensor")
        found[full] = own, given[own]
    return found


def _values(
    folder: Path,
    spec: ModelSpec,
    rows: Mapping[str, Row],
    found: Mapping[str, tuple[str, Tensor]],
    count: Count,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The spec's parameters, in its order, and the full names of tensors that nobody reads and
    that differ from those which are read. Raises `UserError` for a tensor that is missing, or is
    not what `rows` ask for."""
    wanted = {p.name: p.shape for p in spec.parameters}
    values: dict[str, np.ndarray] = {}
    source: dict[str, str] = {}
    unread: list[str] = []
    for name, row in rows.items():
        if name not in found:
            continue
        (own, tensor), shape = found[name], row.shape(wanted)
        if tensor.shape != shape:
            raise UserError(
                f"{folder}: {own} has shape {list(tensor.shape)}, and config.json asks for "
                f"{list(shape)}"
            )
        if tensor.dtype not in tensors.READ:
            raise UserError(
                f"{folder}: {own} has type {tensor.dtype}; allowed: {', '.join(tensors.READ)}"
            )
        first = source.setdefault(row.parts[0], name)
        if first != name:
            if row.unread and not _equal(found[first][1], tensor):
                unread.append(name)
            elif not row.unread and not _equal(found[first][1], tensor):
                raise UserError(
                    f"{folder}: {own} differs from {found[first][0]}, and config.json has them "
                    "tied (tie_word_embeddings)"
                )
            continue
        for part, array in zip(row.parts, row.split(tensor.fp32(), wanted), strict=True):
            values[part] = np.ascontiguousarray(array)
        count(tensor.data.nbytes)
    for name, row in rows.items():
        if row.parts[0] not in values:
            raise UserError(f"{folder}: the tensor {name} is missing")
    lost = [name for name in wanted if name not in values]
    assert not lost, lost
    return {name: values[name] for name in wanted}, unread


def _equal(one: Tensor, other: Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    same = same and np.array_equal(one.data, other.data)
    one.forget()
    other.forget()
    return same


def rows_of(family: Family, spec: ModelSpec) -> list[Row]:
    """The rows whose parts the spec has. A bias on keys that it has not counts too: as zeros."""
    names = {p.name for p in spec.parameters}
    rows = family.rows(spec) if spec.kind == family.kind else []
    return [row for row in rows if all(p in names or p.endswith(".key.bias") for p in row.parts)]


def _shapes(spec: ModelSpec, rows: Sequence[Row]) -> dict[str, tuple[int, ...]]:
    """The shapes of the spec's parameters, and of biases on keys that `rows` have."""
    keys = (spec.key_value_count * spec.head_width,)
    biases = {part: keys for row in rows for part in row.parts if part.endswith(".key.bias")}
    return {parameter.name: parameter.shape for parameter in spec.parameters} | biases


def spec_of(family: Family, config: Json, shapes: Shapes) -> ModelSpec:
    """The spec that a config.json and the tensors beside it describe."""
    fields = family.fields(Values(config), shapes)
    try:
        return ModelSpec(**fields)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        reason = fault["ctx"]["error"] if fault["type"] == "value_error" else fault["msg"]
        given = f"{key} = {shown(fault['input'])}: " if key else ""
        raise UserError(f"config.json: there is no such model here: {given}{reason}") from None


def _check_tokenizer(folder: Path, data: bytes | None, spec: ModelSpec) -> None:
    """Every id of a tokenizer must have a row in the embedding; rows without a token may be."""
    if data is None:
        return
    try:
        table = tokenizers.Tokenizer.from_str(data.decode("utf-8")).get_vocab()
    # The library raises plain `Exception` for a file that it can't make sense of.
    except Exception as error:
        raise UserError(f"{folder / files.TOKENIZER} can't be read: {error}") from None
    token, most = max(table.items(), key=lambda item: item[1], default=("", -1))
    if most >= spec.vocabulary:
        raise UserError(
            f"{folder / files.TOKENIZER} does not fit the model: its token {token!r} has id "
            f"{most}, and the vocabulary of config.json ends at {spec.vocabulary - 1}"
        )


def _identity(spec: ModelSpec) -> dict[str, Any]:
    """What decides the function that a spec computes, with defaults resolved."""
    values: dict[str, Any] = {
        "kind": spec.kind, "vocabulary": spec.vocabulary, "width": spec.width,
        "layers": tuple(spec.stacks.values()), "heads": spec.heads,
        "key_value_heads": spec.key_value_count, "head_size": spec.head_width,
        "feed_forward": spec.inner_width, "gated": spec.gated, "norm": spec.norm,
        "norm_placement": spec.norm_placement, "norm_epsilon": spec.norm_epsilon,
        "embedding_norm": spec.has_embedding_norm, "activation": spec.activation,
        "positions": spec.positions, "bias": spec.bias, "context": spec.context,
        "scale_attention": spec.attention_scale, "scale_embeddings": spec.embedding_scale,
        "tied": spec.tied, "scale_output": spec.scale_output,
        "head_transform": spec.head_transform, "head_bias": spec.head_bias,
        "pooler": spec.pooler, "segments": spec.segments,
        "position_offset": spec.position_offset,
        "task_heads": sorted((head.name, head.outputs, head.over) for head in spec.task_heads),
    }  # fmt: skip
    if spec.positions == "rotary":
        values["rotary_base"] = spec.rotary_base
    if spec.positions == "relative":
        values["relative_buckets"] = spec.relative_buckets
        values["relative_distance"] = spec.relative_distance
    return values


def _differences(family: Family, config: Json, spec: ModelSpec) -> list[str]:
    """Which fields of a spec a model that is read with `config` would have otherwise."""
    rows = rows_of(family, spec)
    if not rows:
        return [f'kind = "{spec.kind}"']
    wanted = _shapes(spec, rows)
    shapes = {row.name: row.shape(wanted) for row in rows if not row.copy}
    try:
        read = _identity(spec_of(family, config, Shapes(shapes, lambda *_: False)))
    except UserError as error:
        return [str(error)]
    mine = _identity(spec)
    faults = [f"{key} = {mine[key]!r}" for key in mine if read.get(key) != mine[key]]
    faults += family.faults(spec)
    held = {part for row in rows for part in row.parts}
    return faults or [name for name in wanted if name not in held]


@dataclass(frozen=True)
class Plan:
    """How a spec is written as a folder: its family, the config and the headers of the weights."""

    family: Family
    config: bytes
    headers: dict[str, str]


def plan(spec: ModelSpec, more: Json | None = None) -> Plan:
    """How to write `spec`, with `more` values in the config. Raises `UserError`, naming what
    stands against it, if no family has such a model."""
    faults = {}
    for name, family in FAMILIES.items():
        config = {**family.config(spec), **(more or {}), "torch_dtype": "float32"}
        faults[name] = _differences(family, config, spec)
        if not faults[name]:
            text = json.dumps(config, indent=2) + "\n"
            return Plan(family, text.encode(), {files.WEIGHTS: _header(family, spec)})
    name = min(faults, key=lambda name: (FAMILIES[name].kind != spec.kind, len(faults[name])))
    raise UserError(
        f"no family of transformers has this model: the nearest is {name}, which does not go with "
        f"{', '.join(faults[name])}; families: {', '.join(FAMILIES)}"
    )


def _header(family: Family, spec: ModelSpec) -> str:
    rows = [row for row in rows_of(family, spec) if not row.copy]
    shapes = _shapes(spec, rows)
    return tensors.header_of({row.name: ("F32", row.shape(shapes)) for row in rows})


def fits(family: Family, spec: ModelSpec, config: bytes, headers: Mapping[str, str]) -> bool:
    """Whether a folder with these files is one of `spec`."""
    names = {n: s for h in headers.values() for n, (_, s, *_) in tensors.places(h).items()}
    full = {new: names[old] for old, new in full_names(family, list(names)).items()}
    rows = rows_of(family, spec)
    tied = {row.name for row in rows if row.copy}
    shapes = Shapes(full, lambda one, other: one in tied)
    try:
        read = spec_of(family, json.loads(config), shapes)
    except UserError:
        return False
    tables = [[(p.name, p.shape) for p in s.parameters] for s in (read, spec)]
    return _identity(read) == _identity(spec) and tables[0] == tables[1]


def write_weights(
    target: Path,
    family: Family,
    spec: ModelSpec,
    weights: Mapping[str, np.ndarray],
    headers: Mapping[str, str],
    extra: Mapping[str, Tensor],
    log: Log = print,
) -> None:
    """Write the weight files of a folder. `log` is told how far it is, where that takes long."""
    everything = [name for header in headers.values() for name in tensors.places(header)]
    full = full_names(family, everything)
    rows = {row.name: row for row in rows_of(family, spec)}
    keys = np.zeros(spec.key_value_count * spec.head_width, np.float32)

    def data(name: str, dtype: str) -> np.ndarray:
        if name in extra:
            return extra[name].data
        row = rows[full[name]]
        array = row.join([weights.get(p, keys) for p in row.parts])
        if dtype == "F16" and np.abs(array[np.isfinite(array)]).max(initial=0) >= 65520:
            raise UserError(
                f"{name} has weights beyond 65504, the largest of F16, which is its type in the "
                "imported files; import them in fp32 or bf16, and start with that run"
            )
        return tensors.encode(array, dtype)

    places = [place for header in headers.values() for place in tensors.places(header).values()]
    total = sum(stop - start for _, _, start, stop in places)
    with counting(log, "writing", total) as count:
        for name, header in headers.items():
            tensors.write(target / name, header, data, count)
