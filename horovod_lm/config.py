"""The configuration of a run: TOML and `--set key=value`, validated, resolved, and its digest."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from horovod_lm.errors import UserError
from horovod_lm.objectives.options import COMMON, NEEDS, ObjectiveName
from horovod_lm.optimizers import KEYS, OptimizerName
from horovod_lm.presets import preset
from horovod_lm.spec import ModelSpec


class _Section(BaseModel):
    # Strict: TOML has types, so "200" or true is no number of steps.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Format = Literal["auto", "text", "jsonl", "csv", "tsv", "parquet", "glue", "squad", "tmx", "story"]
Documents = Literal["paragraph", "line", "file"]
_Strings = Annotated[tuple[str, ...], Field(strict=False)]  # a list will do for a tuple


class _Corpus(_Section):
    """Files, and what a document is in them."""

    format: Format = Field("auto", description="of the files; auto: by their names")
    documents: Documents = Field(
        "paragraph",
        description="what one document of running text is; paragraphs end at an empty line",
    )
    fields: _Strings = Field((), description="of records, in this order; default: the usual ones")
    parallel: bool = Field(False, description="the two fields are a source and its target")
    target: _Strings = Field(
        (), description="files whose lines are the translations of those of text"
    )

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.target and self.format not in ("auto", "text"):
            raise ValueError(
                f"target = {list(self.target)} is for running text, not for format = "
                f'"{self.format}"; leave target out and set parallel = true'
            )
        if self.parallel and self.fields and len(self.fields) != 2:
            raise ValueError(
                f"parallel = true takes two fields, a source and its target, and fields has "
                f"{len(self.fields)}"
            )
        return self


class Source(_Corpus):
    """`[[data.sources]]`: one of several corpora."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-]{1,40}$", description="of 1 to 40 letters, digits, - and _"
    )
    text: _Strings = Field(min_length=1, description="as data.text")
    weight: float = Field(1.0, ge=0, le=1e9, description="of its documents, in mixing")


class Data(_Corpus):
    """`[data]`: the corpus (or several), its tokenizer and its split."""

    text: tuple[str, ...] = Field(
        ("corpus:wikipedia-introductions",),
        min_length=1,
        strict=False,  # a list will do for a tuple
        description="files, folders, globs (relative to the config file), or corpus:NAME",
    )
    sources: Annotated[tuple[Source, ...], Field(strict=False)] = Field(
        (), description="several corpora, instead of text"
    )
    temperature: float = Field(1.0, gt=0, le=100, description="of mixing; above 1: more evenly")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="what a broken place in a file leads to"
    )
    tokenizer: str = Field(
        "bpe",
        min_length=1,
        description="bpe, wordpiece, unigram or characters, trained on the text, or the path of a "
        "tokenizer.json",
    )
    normalise: Annotated[
        tuple[Literal["nfc", "nfd", "nfkc", "nfkd", "lowercase", "strip_accents"], ...],
        Field(strict=False),
    ] = Field((), description="what is done to text first, in this order")
    special: Annotated[
        tuple[Literal["padding", "mask", "classify", "separate", "begin"], ...],
        Field(strict=False),
    ] = Field((), description="special tokens of a trained tokenizer; wordpiece has BERT's")
    sentinels: int = Field(0, ge=0, le=10_000, description="<extra_id_...> of a trained tokenizer")
    vocabulary: int = Field(8192, ge=257, le=2**20, description="size of the trained tokenizer")
    validation_fraction: float = Field(
        0.05, gt=0, lt=1, description="share of documents, the last ones, kept for validation"
    )
    workers: int | None = Field(
        None, ge=1, le=1024, description="processes that tokenise; default: as many as cores"
    )

    @property
    def is_trained(self) -> bool:
        """Whether the tokenizer is trained here, and not loaded."""
        return self.tokenizer in TOKENIZERS

    @model_validator(mode="after")
    def _one_corpus_or_several(self) -> Data:
        given = self.model_fields_set & {"text", *_Corpus.model_fields}
        changed = [key for key in sorted(given) if getattr(self, key) != _default(Data, key)]
        if self.sources and changed:
            raise ValueError(
                f"{changed[0]} belongs into each [[data.sources]] where there are some; it is set "
                "beside them"
            )
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f'two sources are called "{twice}"; give each a name of its own')
        return self

    @model_validator(mode="after")
    def _fits_the_tokenizer(self) -> Data:
        own = [key for key in ("normalise", "special", "sentinels") if getattr(self, key)]
        if not self.is_trained and own:
            raise ValueError(
                f"{own[0]} is for a tokenizer that is trained here; that of {self.tokenizer} is "
                f"taken as it is, so leave {own[0]} out"
            )
        # The bytes, the end of a text, and what WordPiece has beside them.
        least = 262 + len(self.special) + self.sentinels
        if self.sentinels and self.vocabulary < least:
            raise ValueError(
                f"vocabulary = {self.vocabulary} has no room for sentinels = {self.sentinels}; "
                f"it must be at least {least}"
            )
        if (self.special or self.tokenizer == "wordpiece") and self.vocabulary < least:
            raise ValueError(f"vocabulary = {self.vocabulary} is too small; take at least {least}")
        return self


TOKENIZERS = ("bpe", "wordpiece", "unigram", "characters")


def _default(section: type[BaseModel], key: str) -> Any:
    return section.model_fields[key].default


class Batching(_Section):
    """`[batching]`: how text fills rows."""

    kind: Literal["windows", "packed", "buckets"] = Field(
        "windows",
        description="windows of model.context tokens; whole documents packed into rows; documents "
        "of about equal length together",
    )
    tokens: int | None = Field(
        None,
        ge=1,
        le=2**40,
        description="tokens of a global batch of buckets, padding included; default: those of "
        "train.global_batch_size full rows",
    )
    buckets: int = Field(8, ge=1, le=1024, description="how many lengths of rows buckets have")

    @model_validator(mode="after")
    def _read(self) -> Batching:
        if self.kind != "buckets":
            for key in ("tokens", "buckets"):
                value = getattr(self, key)
                if value != type(self).model_fields[key].default:
                    raise ValueError(
                        f'{key} = {value} means nothing to kind = "{self.kind}"; leave it out, or '
                        'set kind = "buckets"'
                    )
        return self


class Objective(_Section):
    """One of the `[[objective]]` tables: what the model learns. A key that the objective does not
    read (see `objectives.options`) is refused. Without any table: causal_lm."""

    name: ObjectiveName = Field(description="what is predicted")
    weight: float = Field(1.0, ge=0, le=1e6, description="factor on its loss")
    schedule: tuple[Annotated[tuple[int, float], Field(strict=False)], ...] = Field(
        (),
        strict=False,
        description="[[step, weight], …] in place of weight, linear between the steps",
    )
    source: tuple[str, ...] = Field(
        (), strict=False, description="names of the data.sources that it reads; default: all"
    )
    share: float = Field(
        1.0, gt=0, le=1e6, description="of the rows of a global batch, beside other objectives"
    )
    loss: str | None = Field(
        None,
        pattern=r"^[a-z][a-z0-9_]{0,39}$",
        description="name of its loss; default: the objective's, and lm for causal_lm",
    )
    on: str | None = Field(
        None, description="name of the loss whose rows it works on: masked words in sentence pairs"
    )
    probability: float = Field(0.15, gt=0, lt=1, description="share of tokens to be predicted")
    masked: float = Field(0.8, ge=0, le=1, description="of these, share replaced by a mask")
    randomised: float = Field(0.1, ge=0, le=1, description="of these, share replaced by any token")
    whole_words: bool = Field(False, description="mask words whole")
    density: float | None = Field(
        None, gt=0, lt=1, description="share taken out; default: 0.15, of denoising 0.3"
    )
    mean_span: float = Field(3.0, ge=1, le=1000, description="mean length of a span, in tokens")
    permute: bool = Field(True, description="also put sentences in another order")
    smoothing: float = Field(0.0, ge=0, lt=1, description="of labels (Szegedy et al., 2016)")
    z_loss: float = Field(0.0, ge=0, le=1, description="factor on logsumexp squared")

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("source"), str):
            return {**values, "source": [values["source"]]}
        return values

    @model_validator(mode="after")
    def _read(self) -> Objective:
        reads = NEEDS[self.name].reads
        for key in self.unread:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} = {getattr(self, key)} means nothing to {self.name}"
                    + (f", which reads {', '.join(reads)}" if reads else "")
                    + f"; leave {key} out"
                )
        steps = [step for step, _ in self.schedule]
        if steps != sorted(set(steps)) or any(step < 0 for step in steps):
            raise ValueError(f"schedule has steps {steps}, which must rise from 0 or more")
        if any(weight < 0 for _, weight in self.schedule):
            raise ValueError("schedule has a weight below 0")
        if self.schedule and self.weight != 1:
            raise ValueError("give weight or schedule, not both")
        if self.masked + self.randomised > 1:
            raise ValueError(
                f"masked = {self.masked:g} and randomised = {self.randomised:g} are more than 1 "
                "together"
            )
        return self

    @property
    def unread(self) -> list[str]:
        """The keys that this objective does not read."""
        read = (*COMMON, *NEEDS[self.name].reads)
        return [key for key in type(self).model_fields if key not in read]

    @property
    def loss_name(self) -> str:
        """The name of its loss in metrics."""
        return self.loss or NEEDS[self.name].loss or self.name

    def weight_at(self, step: int) -> float:
        """The factor on its loss at `step`, from 0."""
        if not self.schedule:
            return self.weight
        before = [point for point in self.schedule if point[0] <= step]
        after = [point for point in self.schedule if point[0] > step]
        if not before or not after:
            return (before[-1:] or after[:1])[0][1]
        (start, low), (stop, high) = before[-1], after[0]
        return low + (high - low) * (step - start) / (stop - start)


class Train(_Section):
    """`[train]`: how long, how much at once, and how exactly."""

    steps: int = Field(200, ge=1, le=10**9, description="attempted steps")
    global_batch_size: int = Field(16, ge=1, le=2**24, description="sequences in a global batch")
    micro_batch_size: int | None = Field(
        None, ge=1, le=2**24, description="sequences of one forward; default: a rank's whole part"
    )
    seed: int = Field(1, ge=0, lt=2**63, description="of weights, data order and dropout")
    start_from: str | None = Field(
        None, description="folder of a run whose weights to start with; heads may be others"
    )
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the products; fp64 shows what rounding alone has done"
    )
    recompute: bool = Field(
        False, description="make a block's activations anew in the backward: less memory, more time"
    )
    dropout_generator: Literal["shared", "native"] = Field(
        "shared",
        description="shared: the same masks in every framework and on any number of ranks; native: "
        "the framework's own",
    )
    max_norm: float | None = Field(1.0, gt=0, description="global gradient norm; null: no clipping")
    check_every: int = Field(
        100, ge=0, description="updates between comparisons of the replicas; 0: only the first"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_clipping(cls, values: Any) -> Any:
        # TOML has no null: `max_norm = 0` is how a file says "no clipping".
        if isinstance(values, Mapping) and values.get("max_norm") == 0:
            return {**values, "max_norm": None}
        return values


class Optimizer(_Section):
    """`[optimizer]`: how gradients move weights; weight decay applies to kernels and token
    embeddings. A key that the chosen optimizer does not read (see `optimizers.KEYS`) is refused."""

    name: OptimizerName = Field("adamw", description="adam is adamw without weight decay")
    learning_rate: float = Field(
        1e-3, gt=0, le=100, description="peak of the schedule; adafactor's is relative to weights"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    epsilon: float = Field(1e-8, gt=0, le=1, description="outside the square root")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd; a sum of gradients alone")
    weight_decay: float = Field(0.01, ge=0, le=10, description="decoupled, times learning rate")

    @model_validator(mode="after")
    def _read(self) -> Optimizer:
        for key in self.unread:
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} = {value:g} means nothing to {self.name}, which reads learning_rate, "
                    f"{', '.join(KEYS[self.name])}; leave {key} out, or choose another name"
                )
        return self

    @property
    def unread(self) -> list[str]:
        """The keys that this optimizer does not read."""
        read = ("name", "learning_rate", *KEYS[self.name])
        return [key for key in type(self).model_fields if key not in read]


class Schedule(_Section):
    """`[schedule]`: the learning rate by applied updates."""

    name: Literal["cosine", "linear", "inverse_sqrt", "constant"] = Field(
        "cosine", description="the shape after the warm-up"
    )
    warmup: int = Field(20, ge=0, le=10**9, description="updates of linear warm-up")
    updates: int | None = Field(
        None, ge=1, le=10**9, description="updates until the final rate; default: train.steps"
    )
    final_fraction: float = Field(0.1, ge=0, le=1, description="final rate / learning_rate")


class LossScale(_Section):
    """`[loss_scale]`: of fp16; Micikevicius et al. (2018), with the field's defaults."""

    mode: Literal["dynamic", "static"] = Field("dynamic", description="static never changes")
    initial: float = Field(2.0**16, gt=0, le=2.0**40, description="scale of the first step")
    growth_factor: float = Field(2.0, gt=1, le=1024, description="factor when it grows")
    growth_interval: int = Field(2000, ge=1, description="good steps in a row until it grows")
    backoff_factor: float = Field(0.5, gt=0, lt=1, description="factor after an overflow")
    hysteresis: int = Field(
        1, ge=1, description="overflows until it backs off; counted afresh when it grows"
    )
    minimum: float = Field(1.0, gt=0, description="an overflow at the minimum ends the run")
    maximum: float = Field(2.0**24, gt=0, le=2.0**40, description="never above")

    @model_validator(mode="after")
    def _ordered(self) -> LossScale:
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"minimum = {self.minimum:g}, initial = {self.initial:g} and maximum = "
                f"{self.maximum:g} must be in this order"
            )
        return self


class Evaluation(_Section):
    """`[evaluation]`: loss on the validation documents."""

    every: int = Field(100, ge=0, description="steps between; 0: only at the end")
    windows: int = Field(0, ge=0, description="how many validation windows; 0: all")


class Checkpoints(_Section):
    """`[checkpoint]`: what is kept on disk."""

    every: int = Field(100, ge=0, description="steps between; 0: only at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay")


MOST_PROFILED = 50  # steps; viewers can't open much more


class Output(_Section):
    """`[output]`: where a run goes. Outside the run's digest."""

    folder: str | None = Field(None, description="default: runs/NAME-TIME")
    tensorboard: bool = Field(True, description="also write TensorBoard files")
    log_every: int = Field(10, ge=1, description="steps between lines of a log")
    weights_every: int = Field(
        20, ge=0, description="steps between sketches of the weights, for the report; 0: none"
    )
    profile: str | None = Field(
        None,
        pattern=r"^\d{1,10}:\d{1,10}$",
        description="FIRST:LAST, the steps that are profiled and traced; default: none",
    )

    @property
    def profiled(self) -> range:
        """The steps, from 1, that are profiled."""
        first, last = map(int, (self.profile or "1:0").split(":"))
        return range(first, last + 1)


class Launch(_Section):
    """`[launch]`: on what the run runs. Outside the run's digest."""

    backend: str = Field("torch", description="torch or tensorflow, or another entry point")
    ranks: int = Field(1, ge=1, le=65536, description="processes that compare starts")
    launcher: Literal["mpirun", "horovodrun", "srun"] = Field("mpirun", description="starts them")
    controller: Literal["mpi", "gloo"] = Field("mpi", description="with horovodrun: who reduces")
    hosts: str | None = Field(None, description="as HOST:SLOTS,…; default: this machine")
    threads: int | None = Field(
        None, ge=1, le=4096, description="per rank; default: the rank's share of its cores"
    )
    stall_seconds: int = Field(600, ge=1, description="a collective that waits longer ends the run")


class Config(_Section):
    """A whole run. `model.vocabulary` follows `data.vocabulary`, so it is not set apart; and
    `model.preset` names the values that the other keys of `model` have by default."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9._-]{1,80}$",
        description="of 1 to 80 letters, digits, dots, hyphens and underscores",
    )
    model: ModelSpec = ModelSpec()
    data: Data = Data()
    batching: Batching = Batching()
    objective: tuple[Objective, ...] = Field(
        (), strict=False, description="the [[objective]] tables; none: causal_lm"
    )
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    loss_scale: LossScale = LossScale()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoints = Checkpoints()
    output: Output = Output()
    launch: Launch = Launch()

    @model_validator(mode="before")
    @classmethod
    def _plain_model(cls, values: Any) -> Any:
        """The fields of `model.preset` in its place, and one vocabulary."""
        if not isinstance(values, Mapping):
            return values
        model, data = values.get("model", {}), values.get("data", {})
        if not isinstance(model, Mapping) or not isinstance(data, Mapping):
            return values
        fields = _preset_fields(model)
        usual = fields.pop("vocabulary", 8192)
        wanted = data.get("vocabulary", usual)
        if not isinstance(wanted, int):
            return values
        if model.get("vocabulary", wanted) != wanted:
            raise ValueError(
                f"model.vocabulary = {model['vocabulary']} differs from data.vocabulary = "
                f"{wanted}; set data.vocabulary alone"
            )
        own = {key: value for key, value in model.items() if key != "preset"}
        return {
            **values,
            "model": {**fields, **own, "vocabulary": wanted},
            "data": {**data, "vocabulary": wanted},
        }

    @model_validator(mode="before")
    @classmethod
    def _heads_of_objectives(cls, values: Any) -> Any:
        """The model gets the head of each objective over sequences that it has not got."""
        tables = values.get("objective", ()) if isinstance(values, Mapping) else ()
        model = values.get("model", {}) if isinstance(values, Mapping) else {}
        if not isinstance(tables, list | tuple) or not isinstance(model, Mapping):
            return values
        heads = model.get("task_heads", ())
        if not isinstance(heads, list | tuple):
            return values
        names = {head.get("name") for head in heads if isinstance(head, Mapping)}
        wanted = [str(table.get("name")) for table in tables if isinstance(table, Mapping)]
        new = [
            {"name": name, "outputs": NEEDS[name].outputs}
            for name in dict.fromkeys(wanted)
            if name in NEEDS and NEEDS[name].outputs and name not in names
        ]
        if not new:
            return values
        return {**values, "model": {**model, "task_heads": [*heads, *new]}}

    @model_validator(mode="after")
    def _objectives_fit(self) -> Config:
        names = [table.loss_name for table in self.objective]
        heads = {head.name: head for head in self.model.task_heads}
        for table in self.objective:
            needs, name = NEEDS[table.name], table.loss_name
            fault = None
            if names.count(name) > 1:
                fault = f'two have a loss "{name}"; give one of them another loss = NAME'
            elif self.model.kind != needs.kind:
                fault = (
                    f'it needs model.kind = "{needs.kind}", not "{self.model.kind}"; change the '
                    "kind, or the objective"
                )
            elif needs.outputs and (
                (heads[table.name].outputs, heads[table.name].over) != (needs.outputs, "sequence")
            ):
                fault = (
                    f"its head in model.task_heads must have outputs = {needs.outputs} over "
                    "sequence; leave the head out, and it is added"
                )
            elif self.batching.kind == "packed" and not needs.packed:
                fault = (
                    "its examples can't share a row, whose first token is judged; set "
                    'batching.kind = "windows" or "buckets"'
                )
            elif table.on is not None and not self._carries(table.on):
                fault = f'on = "{table.on}" must be the loss of a next_sentence or sentence_order'
            if fault:
                raise ValueError(f"objective {table.name}: {fault}")
        riders = [table.on for table in self.objective if table.on is not None]
        if len(riders) != len(set(riders)):
            raise ValueError("objective: two work on the same rows; one may")
        return self

    def _carries(self, loss: str) -> bool:
        return any(t.loss_name == loss and NEEDS[t.name].outputs for t in self.objective)

    @model_validator(mode="after")
    def _profiled_in_the_run(self) -> Config:
        steps = self.output.profiled
        if self.output.profile is None:
            return self
        first, last, most = steps.start, steps.stop - 1, self.train.steps
        if not (2 <= first <= last <= most) or len(steps) > MOST_PROFILED:
            raise ValueError(
                f"output.profile = {self.output.profile} must be FIRST:LAST of at most "
                f"{MOST_PROFILED} steps, from the second (the first one compiles) to train.steps = "
                f"{most}, as in {max(2, most - 3)}:{max(2, most - 1)}"
            )
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this run this run: all but `launch`, `output`, `data.workers` and the name."""
        # However many processes tokenise, the same data comes out.
        apart: Any = {"launch": True, "output": True, "name": True, "data": {"workers"}}
        return self.model_dump(mode="json", exclude=apart)

    @property
    def flat(self) -> dict[str, Any]:
        """`identity` by `section.key`; the tables of objectives are one value."""
        values: dict[str, Any] = {}
        for section, keys in self.identity.items():
            if isinstance(keys, Mapping):
                values |= {f"{section}.{key}": value for key, value in keys.items()}
            else:
                values[section] = keys
        return values

    @property
    def digest(self) -> str:
        """SHA-256 of `identity`."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def trajectory(self) -> dict[str, Any]:
        """The part of `identity` that decides which weights come out, flat, as `section.key`: a
        resumed run must not change it.

        Left out are evaluation, checkpoints, comparisons of replicas, keys that the optimizer does
        not read, the micro-batch size and recomputation (which change memory, not results).
        `train.steps` counts only where the schedule ends with it: then it stands as
        `schedule.updates`.
        """
        values = {
            key: value
            for key, value in self.flat.items()
            if not key.startswith(("evaluation.", "checkpoint."))
        }
        steps = values.pop("train.steps")
        unread = [f"optimizer.{key}" for key in self.optimizer.unread]
        for key in ("train.check_every", "train.micro_batch_size", "train.recompute", *unread):
            del values[key]
        ends = self.schedule.name in ("cosine", "linear")
        values["schedule.updates"] = (self.schedule.updates or steps) if ends else None
        return values


def _preset_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the fields of the preset that section `model` names, if it does."""
    name = model.get("preset")
    if name is None:
        return {}
    try:
        return dict(preset(str(name)).fields)
    except UserError as error:
        raise ValueError(f"model.preset: {error}") from None


def known_keys() -> list[str]:
    """Every key that a config may have, as `section.key`."""
    keys = ["model.preset"]
    for name, info in Config.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{key}" for key in section.model_fields]
        else:
            keys.append(name)
    return keys


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file, apply `section.key=value` overrides, validate.

    Relative paths in `[data]` and `train.start_from` become absolute, from the config file's
    folder. Raises
    `UserError` with one message that names every fault.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a TOML config") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path} can't be read: {reason}") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    values.setdefault("name", re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:80])
    for override in overrides:
        _override(values, override)
    return make_config(values, str(path), base=path.resolve().parent)


def preset_config(name: str, overrides: Iterable[str] = ()) -> Config:
    """All defaults, but for the model of a preset, with overrides; see `load_config`."""
    values: dict[str, Any] = {"name": name, "model": {"preset": name}}
    for override in overrides:
        _override(values, override)
    return make_config(values, "--preset")


def make_config(values: Mapping[str, Any], where: str, base: Path | None = None) -> Config:
    """Validate a mapping of sections; see `load_config`."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_explain(error, where))) from None
    if base is None:
        return config
    config = with_keys(config, data=_absolute(config.data, base))
    if config.train.start_from is None:
        return config
    return with_keys(config, train={"start_from": str(base / config.train.start_from)})


def _absolute(data: Data, base: Path) -> dict[str, Any]:
    """The paths of `data`, from the folder `base`."""

    def texts(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(t if t.startswith("corpus:") else str(base / t) for t in names)

    sources = tuple(
        source.model_copy(update={"text": texts(source.text), "target": texts(source.target)})
        for source in data.sources
    )
    return {
        "text": texts(data.text),
        "target": texts(data.target),
        "sources": sources,
        "tokenizer": data.tokenizer if data.is_trained else str(base / data.tokenizer),
    }


def with_keys(config: Config, **sections: Mapping[str, Any]) -> Config:
    """`config` with some keys of its sections changed, unchecked."""
    changed = {
        name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()
    }
    return config.model_copy(update=changed)


def _override(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value`; the value is read as TOML, or taken as a string if it isn't any."""
    key, equals, raw = (part.strip() for part in override.partition("="))
    if not equals or not key:
        raise UserError(f'--set "{override}" is not of the form section.key=value')
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    if key not in known_keys():
        raise UserError(f"--set {key}: {unknown_key(key)}")
    section, _, name = key.rpartition(".")
    target = values
    if section:
        target = values.setdefault(section, {})
        if not isinstance(target, dict):
            raise UserError(f"{section} must be a section of keys, not {target!r}")
    target[name] = value


def unknown_key(key: str, sections: bool = False) -> str:
    """That there is no such key, and the nearest one that there is; `sections` are keys too."""
    known = known_keys() + (list(Config.model_fields) if sections else [])
    tail = key.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == tail][:1]  # in another section
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"there is no key {key}" + (f"; did you mean {near[0]}?" if near else "")


def _explain(error: ValidationError, where: str) -> list[str]:
    """One plain line for each fault."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        given, context = fault["input"], fault.get("ctx", {})
        if fault["type"] == "extra_forbidden":
            text = unknown_key(key, sections=True)
        elif fault["type"] == "value_error":
            text = f"{key}: {context['error']}" if key else str(context["error"])
        else:
            field, allowed = _allowed(fault["loc"])
            name = "it" if field == key else field
            text = f"{key} = {given!r} is not allowed; {name} must be {allowed}"
        lines.append(f"{where}: {text}")
    return lines


def _alternatives(kind: Any) -> str:
    return " or ".join(f'"{value}"' for value in get_args(kind))


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
_BOUNDS = {
    "ge": "at least",
    "gt": "above",
    "le": "at most",
    "lt": "below",
    "multiple_of": "a multiple of",
}


def _allowed(location: tuple[int | str, ...]) -> tuple[str, str]:
    """The key of the field at `location` and, in words, the values that it may have."""
    model: type[BaseModel] = Config
    path: list[str] = []
    for part in location:
        path.append(str(part))
        if isinstance(part, int):  # of a list of sections
            continue
        info = model.model_fields[part]
        kind: Any = info.annotation
        inner = get_args(kind)[0] if get_origin(kind) is tuple else kind
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    else:
        is_list = get_origin(kind) is tuple and not isinstance(location[-1], int)
        return ".".join(path), "a list of sections" if is_list else "a section of keys"
    if get_origin(kind) is Literal:
        return ".".join(path), _alternatives(kind)
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        if get_origin(inner) is Literal:
            return ".".join(path), f"a list of {_alternatives(inner)}"
        if inner is not str:
            return ".".join(path), info.description or "a list"
        some = "one or more " if any(getattr(r, "min_length", 0) for r in info.metadata) else ""
        return ".".join(path), f"a list of {some}strings"
    plain = next(k for k in (get_args(kind) or (kind,)) if k is not type(None))
    words = [_KINDS[plain]]
    for rule in info.metadata:
        words += [f"{w} {getattr(rule, b)}" for b, w in _BOUNDS.items() if hasattr(rule, b)]
    if plain is str and info.metadata:
        words.append(info.description or "")
    return ".".join(path), ", ".join(words)


def to_toml(config: Config) -> str:
    """The resolved config as TOML that `load_config` reads back to an equal one; None is left
    out."""
    values = config.model_dump(mode="json")
    lines = [f"name = {_toml_value(values.pop('name'))}"]
    for section, keys in _titled(values):
        lines += ["", section]
        for key, value in keys.items():
            if (section, key) == ("[train]", "max_norm") and value is None:
                value = 0
            if value is not None:
                lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _titled(values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The sections with their titles: one for each of a list of tables."""
    for section, keys in values.items():
        if isinstance(keys, Mapping):
            yield f"[{section}]", keys
        else:
            yield from ((f"[[{section}]]", table) for table in keys)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        keys = (f"{key} = {_toml_value(item)}" for key, item in value.items() if item is not None)
        return "{ " + ", ".join(keys) + " }"
    # JSON writes strings, numbers and booleans as TOML reads them, but for this one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
