"""From a model's folder to a run's, which `evaluate`, `generate` and `train` take, and back.

A run that was imported has `imported/`: the companions of the weights as they were, `layout.json`
(the headers of the weight files) and `extra.safetensors` (tensors that the spec has no place for).
With them the folder is written again byte by byte, but for the weights that were trained since.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from horovod_lm import checkpoint
from horovod_lm.backend import EngineState, load_backend
from horovod_lm.config import Config, make_config, with_keys
from horovod_lm.convert import folder as files
from horovod_lm.convert import hf, tensors
from horovod_lm.convert.family import Family
from horovod_lm.convert.target import claim_new, new_folder
from horovod_lm.convert.tensors import Tensor
from horovod_lm.convert.tokenizer import GENERATION, IDS, Exported, export_tokenizer, nothing
from horovod_lm.convert.tools import ConvertTools
from horovod_lm.errors import RunFailed, UserError
from horovod_lm.objectives.registry import prompt_is_prefix
from horovod_lm.run_folder import IMPORTED, STATE, RunRecord, tokenizer_file
from horovod_lm.spec import ModelSpec

LAYOUT, EXTRA = "layout.json", "extra.safetensors"
Log = Callable[[str], None]


class _Layout(BaseModel):
    """What `layout.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    family: str
    headers: dict[str, str]
    companions: list[str]


@dataclass(frozen=True)
class Imported:
    """What a run keeps of the model that it was imported from."""

    family: Family
    headers: dict[str, str]
    extra: dict[str, Tensor]
    companions: dict[str, bytes]

    @property
    def decoder_start(self) -> int | None:
        """The token with which a decoder begins, where the config names one."""
        own = self._values(GENERATION).get("decoder_start_token_id")
        config = self._values(files.CONFIG)
        named = (own, config.get("decoder_start_token_id"), config.get("pad_token_id"))
        return next((start for start in named if type(start) is int), None)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer, where a config names some."""
        for name in (GENERATION, files.CONFIG):
            ids = self._values(name).get("eos_token_id")
            found = [n for n in (ids if isinstance(ids, list) else [ids]) if type(n) is int]
            if found:
                return tuple(found)
        return ()

    @property
    def text(self) -> Exported:
        """Its tokenizer, and what its configs say of tokens."""
        config = self._values(files.CONFIG)
        ids = {key: config[key] for key in IDS if key in config}
        kept = {name: self.companions[name] for name in files.OF_TEXT if name in self.companions}
        return Exported(kept, ids)

    def _values(self, name: str) -> dict[str, Any]:
        return files.parse_json(self.companions.get(name, b"{}"), Path(IMPORTED, name))


def tools(backend: str) -> ConvertTools:
    """A backend's part in conversion. Raises `UserError` where it has none."""
    loaded: Any = load_backend(backend)
    if not hasattr(loaded, "convert"):
        raise UserError(f"backend {backend} has no part in conversion; use torch or tensorflow")
    return loaded.convert()


def import_run(
    source: Path, run: Path, *, legacy: bool = False, keep_extra: bool = False, log: Log = print
) -> Config:
    """Make the run `run` of the model in `source`; returns its config. All is read and checked
    before anything is written."""
    claim_new(run)
    legacy_weights = tools("torch").legacy_weights if legacy else None
    model = hf.read_model(source, legacy_weights, keep_extra, log)
    tokenizer = run.resolve() / IMPORTED / files.TOKENIZER
    data = {"vocabulary": model.spec.vocabulary, "tokenizer": str(tokenizer)}
    fields = model.spec.model_dump(mode="json", exclude={"vocabulary"}, exclude_none=True)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", run.resolve().name)[:80] or "imported"
    sections = {"model": fields, "data": data, "objective": _objectives(model.spec)}
    config = make_config({"name": name, **sections}, str(source))
    log(f"writing {4 * model.spec.size / 1e6:,.1f} MB to {run}")
    with new_folder(run, STATE) as partial:
        _write_run(partial, config, model, source)
    log(f"{model.family}: {model.spec.size:,} parameters, {len(model.weights)} tensors")
    if files.TOKENIZER not in model.companions:
        log(
            f"there is no {files.TOKENIZER}: put the model's own at {tokenizer}, or set "
            "data.tokenizer, before the run reads text"
        )
    if model.extra:
        log(f"kept beside them, unused: {', '.join(sorted(model.extra))}")
    return config


def _objectives(spec: ModelSpec) -> list[dict[str, str]]:
    """What a model of `spec` has learnt, as far as its outputs tell; decoders have the default."""
    if spec.kind == "encoder-decoder":
        return [{"name": "span_corruption"}]
    if spec.kind == "decoder" or not (spec.head_transform or spec.head_bias):
        return []
    heads = {head.name: (head.outputs, head.over) for head in spec.task_heads}
    if heads.get("next_sentence") == (2, "sequence"):
        return [{"name": "masked_lm", "on": "next_sentence"}, {"name": "next_sentence"}]
    return [{"name": "masked_lm"}]


def _write_run(run: Path, config: Config, model: hf.Model, source: Path) -> None:
    own = run / IMPORTED
    own.mkdir()
    for name, content in model.companions.items():
        (own / name).write_bytes(content)
    layout = _Layout(
        family=model.family, headers=model.headers, companions=sorted(model.companions)
    )
    (own / LAYOUT).write_text(layout.model_dump_json(indent=1) + "\n", encoding="utf-8")
    header = tensors.header_of({n: (t.dtype, t.shape) for n, t in model.extra.items()})
    tensors.write(own / EXTRA, header, lambda name, _: model.extra[name].data)
    state = checkpoint.RunState(0, 0, {}, EngineState(model.weights))
    try:
        path = checkpoint.save(run / "checkpoints", state, config, keep=1)
    except RunFailed as error:
        # What it says is about a run that goes on.
        raise OSError(None, checkpoint.reason(error.__cause__ or error)) from None
    # As a path within the folder, which may be moved.
    within = with_keys(config, data={"tokenizer": f"{IMPORTED}/{files.TOKENIZER}"})
    record = RunRecord(
        run,
        within,
        backend=config.launch.backend,
        ranks=0,
        threads=0,
        launcher=None,
        controller=None,
        versions={},
        unigram_entropy=None,
        parameters=model.spec.size,
        imported=str(source),
        checkpoint=path.name,
    )
    (run / "metrics.jsonl").touch()
    record.end("finished", f"imported from {source}")


def read_imported(run: Path) -> Imported | None:
    """What a run keeps of the model that it was imported from, if it was."""
    own = run / IMPORTED
    text = files.read_bytes(own, LAYOUT) if own.is_dir() else None
    if text is None:
        return None
    try:
        layout = _Layout.model_validate_json(text)
        if layout.family not in hf.FAMILIES:
            raise ValueError(f"the family {layout.family} is unknown")
        for name in [*layout.headers, *layout.companions]:
            if Path(name).name != name:
                raise ValueError(f"{name!r} is no plain name")
        for header in layout.headers.values():
            tensors.places(header)
    except ValidationError as error:
        raise UserError(f"{own / LAYOUT} is damaged: {error.errors()[0]['msg']}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{own / LAYOUT} is damaged: {error}") from None
    companions = {}
    for name in layout.companions:
        content = files.read_bytes(own, name)
        if content is None:
            raise UserError(f"{own / name} is missing")
        companions[name] = content
    if files.plain_file(own, EXTRA) is None:
        raise UserError(f"{own / EXTRA} is missing")
    extra = tensors.read(own / EXTRA).tensors
    return Imported(hf.FAMILIES[layout.family], layout.headers, extra, companions)


def export_run(run: Path, target: Path, log: Log = print) -> str:
    """Write the newest checkpoint of a run as a folder of transformers; returns its family.

    A run that was imported, or began with the weights of one, is written as that was, if it still
    has its model. Others go to the family that has such a model. Raises `UserError` if none has.
    """
    claim_new(target)
    config, weights = read_run(run)
    spec = config.model
    imported, exported = read_imported(run), None
    if imported is not None:
        change = _change(run, imported, config)
        if change is not None:
            log(f"the {change} is not the imported one any more: it is written anew")
            if files.TOKENIZER in imported.companions and change != "tokenizer":
                exported = imported.text
            imported = None
    if prompt_is_prefix(config):
        log(
            "prompts were seen from both sides in training (prefix_lm), and are not there: "
            "transformers reads them from left to right"
        )
    if imported is None:
        extra: dict[str, Tensor] = {}
        exported = exported or _own_text(run, config, log)
        plan = hf.plan(spec, exported.ids)
        family, headers, companions = plan.family, plan.headers, exported.companions
        companions[files.CONFIG] = plan.config
        if spec.kind == "encoder" and not spec.head_transform:
            log(
                f"the output layer is left out: that of {family.name} stands behind a transform "
                "(model.head_transform, model.head_bias)"
            )
    else:
        family, headers = imported.family, imported.headers
        extra, companions = imported.extra, imported.companions
    with new_folder(target, files.CONFIG) as partial:
        for name, content in companions.items():
            (partial / name).write_bytes(content)
        hf.write_weights(partial, family, spec, weights, headers, extra, log)
    return family.name


def _own_text(run: Path, config: Config, log: Log) -> Exported:
    text = own_tokenizer(run, config, log)
    return nothing(config.model) if text is None else export_tokenizer(text, config)


def _change(run: Path, imported: Imported, config: Config) -> str | None:
    """What of a run is not that of the model which it was imported from, if anything is."""
    if not has_imported_tokenizer(run, imported, config):
        return "tokenizer"
    text = imported.companions[files.CONFIG]
    fits = hf.fits(imported.family, config.model, text, imported.headers)
    return None if fits else "model"


def has_imported_tokenizer(run: Path, imported: Imported, config: Config) -> bool:
    """Whether a run reads text as the model that it was imported from did."""
    own = tokenizer_file(run, config)
    text = imported.companions.get(files.TOKENIZER)
    if own is None or text is None:  # one that was found later is the model's own
        return not config.data.is_trained
    return own.read_bytes() == text


def own_tokenizer(run: Path, config: Config, log: Log) -> bytes | None:
    """The tokenizer.json of a run, None if there is none any more."""
    from horovod_lm.data.prepare import prepare

    path = tokenizer_file(run, config)
    if path is None:
        try:
            path = prepare(config, log).folder / files.TOKENIZER
        except UserError as error:
            log(f"without a tokenizer: {error}")
            return None
    return path.read_bytes()


def read_run(run: Path) -> tuple[Config, dict[str, Any]]:
    """The config of a run and the weights of its newest checkpoint."""
    if not (run / "config.toml").exists() and (run / files.CONFIG).exists():
        raise UserError(f"{run} is a model of transformers: --from hf")
    config = checkpoint.config_of_run(run)
    weights = checkpoint.load(checkpoint.newest_of_run(run, config)).engine.weights
    return config, {name: array.astype("f", copy=False) for name, array in weights.items()}
