"""From a config to its objectives: the one place that knows them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from horovod_lm.config import Config, Objective
from horovod_lm.data.feeds import Feed
from horovod_lm.data.layout import Buckets, Layout, Packed, Single
from horovod_lm.data.mixing import dealt, proportions
from horovod_lm.data.stream import TokenStream
from horovod_lm.errors import UserError
from horovod_lm.objectives import Corpus, LossKind, Tokenizer
from horovod_lm.objectives import Objective as Examples
from horovod_lm.objectives.causal_lm import CausalLM, PrefixLM
from horovod_lm.objectives.masked_lm import MaskedLM, Masking, MaskingOptions
from horovod_lm.objectives.options import NEEDS
from horovod_lm.objectives.sentence_pairs import SentencePairs
from horovod_lm.objectives.sequence_to_sequence import SequenceToSequence
from horovod_lm.objectives.span_corruption import Denoising, SpanCorruption
from horovod_lm.objectives.words import sentence_ends
from horovod_lm.randomness import Keys

Split = Literal["train", "validation"]


def tables(config: Config) -> tuple[Objective, ...]:
    """The objectives of a config: causal language modelling where it names none."""
    return config.objective or (Objective(name="causal_lm"),)


def loss_names(config: Config) -> tuple[str, ...]:
    """The names of the losses, in the order in which every micro-batch has them."""
    return tuple(kind.name for kind in loss_kinds(config))


def loss_kinds(config: Config) -> tuple[LossKind, ...]:
    """The losses in the order of `loss_names`."""
    return tuple(kind for table in _owners(config) for kind in _kinds(config, table))


def factors(config: Config, step: int) -> dict[str, float]:
    """The weight of each loss at `step`, from 0, in the order of `loss_names`."""
    weights = {table.loss_name: table.weight_at(step) for table in tables(config)}
    return {name: weights[name] for name in loss_names(config)}


def make_feeds(
    config: Config, corpora: Sequence[Corpus], tokenizer: Tokenizer, split: Split
) -> list[Feed]:
    """What the objectives of `config` read of `corpora`. Raises `UserError` for what they need and
    the model, the tokenizer or the corpora lack."""
    check_kind(config)
    owners = _owners(config)
    size = config.train.global_batch_size
    if size < len(owners):
        raise UserError(
            f"train.global_batch_size = {size} is less than the {len(owners)} objectives that have "
            "rows of their own; make it larger"
        )
    rows = dealt(size, [table.share for table in owners]).tolist()
    maker = _Maker(config, corpora, tokenizer, split)
    return [
        maker.feed(index, table, count)
        for index, (table, count) in enumerate(zip(owners, rows, strict=True))
    ]


def causal_windows(tokens: TokenStream, context: int, rows: int, seed: int) -> list[Feed]:
    """The feed of causal language modelling by windows alone, which needs no tokenizer."""
    objective = CausalLM(Corpus("", tokens), context)
    return [Feed([objective], [Single(objective, (context,))], [1.0], seed=seed, rows=rows)]


def prompt_begin(config: Config, tokenizer: Tokenizer) -> int | None:
    """The token that stands before a text from which a decoder goes on, as it stood before the
    documents that it was trained on; None where these stood in windows, behind anything."""
    if config.batching.kind == "windows":
        return None
    return tokenizer.special.get("begin", tokenizer.end)


def prompt_is_prefix(config: Config) -> bool:
    """Whether such a text is one of which all tokens see each other."""
    prefix = all(table.name == "prefix_lm" for table in tables(config))
    return prefix and config.model.kind == "decoder"


def check_kind(config: Config) -> None:
    """Raise `UserError` unless the model is of the kind that each objective needs."""
    for table in tables(config):
        kind = NEEDS[table.name].kind
        if config.model.kind != kind:
            default = "" if config.objective else ", the default objective,"
            fit = [name for name, needs in NEEDS.items() if needs.kind == config.model.kind]
            raise UserError(
                f'{table.name}{default} needs model.kind = "{kind}", not "{config.model.kind}"; '
                f"change it, or give an [[objective]] that fits: {', '.join(fit)}"
            )


def _owners(config: Config) -> list[Objective]:
    """The objectives that have rows of their own."""
    return [table for table in tables(config) if table.on is None]


def _riders(config: Config, owner: Objective) -> list[Objective]:
    """The objectives that work on the rows of `owner`."""
    return [table for table in tables(config) if table.on == owner.loss_name]


def _kinds(config: Config, owner: Objective) -> list[LossKind]:
    return [_kind(table) for table in [*_riders(config, owner), owner]]


def _kind(table: Objective) -> LossKind:
    if NEEDS[table.name].outputs:
        return LossKind(table.loss_name, table.name, "sequence")
    sparse = table.name == "masked_lm"
    return LossKind(table.loss_name, sparse=sparse, smoothing=table.smoothing, z_loss=table.z_loss)


@dataclass
class _Maker:
    """Makes the feeds of one split."""

    config: Config
    corpora: Sequence[Corpus]
    tokenizer: Tokenizer
    split: Split

    @cached_property
    def _ends(self) -> np.ndarray:
        return sentence_ends(self.tokenizer)

    def feed(self, index: int, table: Objective, rows: int) -> Feed:
        config, seed = self.config, self.config.train.seed
        if index:
            # Objectives after the first read the text in orders of their own.
            seed = int(Keys(seed, "feed")(index)[0] >> np.uint64(1))
        chosen = self._chosen(table)
        made = [self._objective(table, corpus) for corpus in chosen]
        for corpus, objective in zip(chosen, made, strict=True):
            if not len(objective.lengths):
                raise UserError(
                    f"objective {table.name} finds no example in the {self.split} documents of "
                    f"{corpus.name}: they are too short; give more text, or a "
                    "smaller model.context"
                )
        shape = self._shape(made)
        layouts = [self._layout(objective, shape, table, rows, seed) for objective in made]
        whole = None if config.batching.kind == "buckets" else rows
        return Feed(made, layouts, self._mixture(chosen).tolist(), seed=seed, rows=whole)

    def _chosen(self, table: Objective) -> list[Corpus]:
        names = [corpus.name for corpus in self.corpora]
        unknown = [name for name in table.source if name not in names]
        if unknown:
            raise UserError(
                f'objective {table.name}: there is no source "{unknown[0]}" in [[data.sources]]; '
                f"there are: {', '.join(names)}"
            )
        chosen = [corpus for corpus in self.corpora if corpus.name in (table.source or names)]
        chosen = [corpus for corpus in chosen if self._weights.get(corpus.name, 1.0) > 0]
        if not chosen:
            raise UserError(f"objective {table.name}: all of its data.sources have weight 0")
        return chosen

    @cached_property
    def _weights(self) -> dict[str, float]:
        return {source.name: source.weight for source in self.config.data.sources}

    def _mixture(self, corpora: Sequence[Corpus]) -> np.ndarray:
        """The share of each corpus, by its tokens, its weight and data.temperature."""
        sizes = [len(corpus.tokens) * self._weights.get(corpus.name, 1.0) for corpus in corpora]
        return proportions(sizes, self.config.data.temperature)

    def _objective(self, table: Objective, corpus: Corpus) -> Examples:
        keys = Keys(
            self.config.train.seed, f"{self.split}/{table.name}/{table.loss_name}/{corpus.name}"
        )
        documents = self.config.batching.kind != "windows"
        return _MAKERS[table.name](self, table, corpus, keys, documents)

    def causal(self, table: Objective, corpus: Corpus, keys: Keys, documents: bool) -> Examples:
        kind = CausalLM if table.name == "causal_lm" else PrefixLM
        context = self.config.model.context
        return kind(
            corpus, context, self.tokenizer, documents=documents, loss=_kind(table), keys=keys
        )

    def masked(self, table: Objective, corpus: Corpus, keys: Keys, documents: bool) -> Examples:
        context = self.config.model.context
        masking = self._masking(table)
        return MaskedLM(corpus, context, self.tokenizer, masking, keys, documents=documents)

    def _masking(self, table: Objective) -> Masking:
        options = MaskingOptions(
            table.probability, table.masked, table.randomised, table.whole_words
        )
        return Masking(self.tokenizer, _kind(table), options)

    def pairs(self, table: Objective, corpus: Corpus, keys: Keys, documents: bool) -> Examples:
        riders = _riders(self.config, table)
        return SentencePairs(
            corpus,
            self.config.model.context,
            self.tokenizer,
            keys,
            loss=_kind(table),
            swap=table.name == "sentence_order",
            segments=self.config.model.segments > 1,
            masking=self._masking(riders[0]) if riders else None,
            ends=self._ends,
        )

    def spans(self, table: Objective, corpus: Corpus, keys: Keys, documents: bool) -> Examples:
        place = corpus, self.config.model.context, self.tokenizer, keys
        options: dict[str, Any] = {"loss": _kind(table), "documents": documents}
        options["mean_span"] = table.mean_span
        if table.density is not None:  # each objective has a default of its own
            options["density"] = table.density
        if table.name == "span_corruption":
            return SpanCorruption(*place, **options)
        ends = self._ends if table.permute else None
        return Denoising(*place, permute=table.permute, ends=ends, **options)

    def parallel(self, table: Objective, corpus: Corpus, keys: Keys, documents: bool) -> Examples:
        return SequenceToSequence(
            corpus, self.config.model.context, self.tokenizer, loss=_kind(table)
        )

    def _shape(self, made: Sequence[Examples]) -> tuple[int, ...]:
        """How long rows are. With two streams neither is longer than it must be: as its longest
        example, or packed, in proportion to what there is of each."""
        context = self.config.model.context
        if len(made[0].streams) == 1:
            return (context,)
        longest = np.max([objective.lengths.max(axis=0) for objective in made], axis=0)
        if self.config.batching.kind != "packed":
            return tuple(longest.tolist())
        totals = np.sum([objective.lengths.sum(axis=0) for objective in made], axis=0)
        wanted = np.ceil(context * totals / totals.max()).astype(np.int64)
        return tuple(np.minimum(context, np.maximum(longest, wanted)).tolist())

    def _layout(
        self, objective: Examples, shape: tuple[int, ...], table: Objective, rows: int, seed: int
    ) -> Layout:
        batching = self.config.batching
        if batching.kind == "windows":
            return Single(objective, shape)
        if batching.kind == "packed":
            return Packed(objective, shape)
        size = self.config.train.global_batch_size
        budget = (batching.tokens or size * sum(shape)) * rows // size
        layout = Buckets(objective, shape, tokens=budget, count=batching.buckets, seed=seed)
        longest = max(map(sum, layout.shapes))
        if self.split == "train" and longest > budget:
            raise UserError(
                f"batching.tokens = {batching.tokens} is too few for a row of objective "
                f"{table.name}, whose longest one takes {longest}; set it to at least "
                f"{-(-longest * size // rows)}, or a smaller model.context"
            )
        return layout


_MAKERS: Mapping[str, Callable[..., Examples]] = {
    "causal_lm": _Maker.causal,
    "prefix_lm": _Maker.causal,
    "masked_lm": _Maker.masked,
    "next_sentence": _Maker.pairs,
    "sentence_order": _Maker.pairs,
    "span_corruption": _Maker.spans,
    "denoising": _Maker.spans,
    "sequence_to_sequence": _Maker.parallel,
}
