"""The sections of a configuration: their keys, with defaults and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from horovod_lm.objectives.options import COMMON, NEEDS, ObjectiveName
from horovod_lm.optimizers import KEYS, OptimizerName


class Section(BaseModel):
    # Strict: TOML has types, so "200" or true is no number of steps.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def _changed(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` whose values are not the defaults."""
        fields = type(self).model_fields
        return [key for key in keys if getattr(self, key) != fields[key].default]


Format = Literal["auto", "text", "jsonl", "csv", "tsv", "parquet", "glue", "squad", "tmx", "story"]
Documents = Literal["paragraph", "line", "file"]
_Strings = Annotated[tuple[str, ...], Field(strict=False)]  # a list will do for a tuple


class _Corpus(Section):
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
    vocabulary: int = Field(
        8192, ge=2, le=2**20, description="token ids; at least 257 of a trained tokenizer"
    )
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
        changed = self._changed(sorted({"text", *_Corpus.model_fields}))
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
        if self.is_trained and self.vocabulary < 257:
            raise ValueError(
                f"vocabulary = {self.vocabulary} is too small for a tokenizer that is trained; "
                "take at least 257, for the bytes and the end of a text"
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


class Batching(Section):
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
            for key in self._changed(("tokens", "buckets")):
                raise ValueError(
                    f'{key} = {getattr(self, key)} means nothing to kind = "{self.kind}"; leave it '
                    'out, or set kind = "buckets"'
                )
        return self


class Objective(Section):
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
        for key in self._changed(self.unread):
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


class Train(Section):
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


class Optimizer(Section):
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
        for key in self._changed(self.unread):
            raise ValueError(
                f"{key} = {getattr(self, key):g} means nothing to {self.name}, which reads "
                f"learning_rate, {', '.join(KEYS[self.name])}; leave {key} out, or choose another "
                "name"
            )
        return self

    @property
    def unread(self) -> list[str]:
        """The keys that this optimizer does not read."""
        read = ("name", "learning_rate", *KEYS[self.name])
        return [key for key in type(self).model_fields if key not in read]


class Schedule(Section):
    """`[schedule]`: the learning rate by applied updates."""

    name: Literal["cosine", "linear", "inverse_sqrt", "constant"] = Field(
        "cosine", description="the shape after the warm-up"
    )
    warmup: int = Field(20, ge=0, le=10**9, description="updates of linear warm-up")
    updates: int | None = Field(
        None, ge=1, le=10**9, description="updates until the final rate; default: train.steps"
    )
    final_fraction: float = Field(0.1, ge=0, le=1, description="final rate / learning_rate")


class LossScale(Section):
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


class Evaluation(Section):
    """`[evaluation]`: loss on the validation documents."""

    every: int = Field(100, ge=0, description="steps between; 0: only at the end")
    windows: int = Field(0, ge=0, description="how many validation windows; 0: all")


class Checkpoints(Section):
    """`[checkpoint]`: what is kept on disk."""

    every: int = Field(100, ge=0, description="steps between; 0: only at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay")


class Output(Section):
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


class Launch(Section):
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
