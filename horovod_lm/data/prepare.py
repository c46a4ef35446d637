"""Corpora to tokenizer to token shards, once, into a cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horovod_lm import config as configuration
from horovod_lm.config import Config, Data
from horovod_lm.data.cache import building, cache_folder, locked, sha256
from horovod_lm.data.contents import CORPUS, SCHEMA, SPLITS, RawSource, raw_source, settings_of
from horovod_lm.data.corpora import PREFIX, corpus_file
from horovod_lm.data.digests import are_right
from horovod_lm.data.documents import Corpus, file_digest, find_files
from horovod_lm.data.making import Making, digest_of, files_of
from horovod_lm.data.progress import Log as Log
from horovod_lm.data.shards import Tokens
from horovod_lm.data.tokenizer import Tokenizer
from horovod_lm.errors import UserError
from horovod_lm.objectives.options import NEEDS


@dataclass(frozen=True)
class Source:
    """One corpus of the prepared data: its streams by name, "text", or "source" and "target" whose
    documents go together by number. `weight` is that of the config."""

    name: str
    weight: float
    train: Mapping[str, Tokens]
    validation: Mapping[str, Tokens]


@dataclass(frozen=True)
class Prepared:
    """Prepared data, memory-mapped.

    `sources` are in the order of the config; a single one is called "corpus". `manifest` has the
    settings, the digests of the corpora's files and of every file in `folder`, what was left out,
    and `digest` over the files: equal digests are equal data.
    """

    folder: Path
    tokenizer: Tokenizer
    sources: Mapping[str, Source]
    manifest: dict[str, Any]

    @property
    def train(self) -> Tokens:
        """The first source's last stream: of parallel text the target, which decoders learn."""
        return list(next(iter(self.sources.values())).train.values())[-1]

    @property
    def validation(self) -> Tokens:
        """The first source's last stream."""
        return list(next(iter(self.sources.values())).validation.values())[-1]

    @property
    def unigram_entropy(self) -> float:
        """Nats per token of the first source's last stream: the validation tokens under the
        training counts, add-one over the whole vocabulary."""
        return float(list(self.manifest["sources"][0]["unigram_entropy"].values())[-1])


def prepare(config: Config, log: Log = print) -> Prepared:
    """The data of `config`: from the cache, or made now, on all cores of this process.

    The validation documents are the last `validation_fraction` of each corpus, at least one; the
    tokenizer is trained on the others. The same data comes out for any number of workers. What a
    kill or Ctrl-C cut short goes on from where it was. Safe to call from several processes at once:
    they wait for each other. Raises `UserError` for a corpus or a tokenizer that can't be used,
    `RunFailed` for a full disk; nothing half is left then.
    """
    data, cache = config.data, cache_folder()
    given = None if data.is_trained else _load_tokenizer(data)
    sources = [
        raw_source(name, corpus, data.validation_fraction, cache, log)
        for name, corpus in _corpora(data, cache, log)
    ]
    folder = cache / _key(data, sources)
    prepared = _open(folder, data, log)
    if prepared is None:
        with locked(folder, log):
            prepared = _open(folder, data, log)  # another process may have made it meanwhile
            if prepared is None:
                if folder.exists():
                    log(f"the prepared data in {folder} is damaged; making it anew")
                with building(folder, keep=True) as unfinished:
                    Making(unfinished, data, sources, given, log).run()
                prepared = _open(folder, data, log)
    assert prepared is not None
    if _cuts_windows(config):
        check_windows(prepared, config)
    return prepared


def _corpora(data: Data, cache: Path, log: Log) -> Iterator[tuple[str, Corpus]]:
    entries: list[tuple[str, str, Data | configuration.Source]]
    entries = [(source.name, "data.sources.", source) for source in data.sources]
    for name, key, entry in entries or [(CORPUS, "data.", data)]:
        patterns = [
            str(corpus_file(text.removeprefix(PREFIX), cache, log))
            if text.startswith(PREFIX)
            else text
            for text in entry.text
        ]
        yield (
            name,
            Corpus(
                find_files(patterns, key + "text"),
                entry.documents,
                entry.format,
                entry.fields,
                entry.parallel,
                find_files(entry.target, key + "target") if entry.target else (),
                data.on_error == "skip",
            ),
        )


def _load_tokenizer(data: Data) -> Tokenizer:
    path = Path(data.tokenizer)
    with suppress(PermissionError):  # of a folder above it: loading says so
        if not path.exists():
            raise UserError(
                f"data.tokenizer: {path} does not exist; give the path of a tokenizer.json, or "
                + ", ".join(f'"{kind}"' for kind in configuration.TOKENIZERS)
            )
    tokenizer = Tokenizer.load(path, "give a tokenizer.json of the tokenizers library")
    if tokenizer.vocabulary > data.vocabulary:
        raise UserError(
            f"{path} has {tokenizer.vocabulary:,} ids, which do not fit into data.vocabulary = "
            f"{data.vocabulary}; set data.vocabulary = {tokenizer.vocabulary}"
        )
    return tokenizer


def _key(data: Data, sources: list[RawSource]) -> str:
    settings = [
        SCHEMA,
        [[s.name, s.contents.digests, settings_of(s.corpus)] for s in sources],
        data.vocabulary,
        data.validation_fraction,
        data.tokenizer if data.is_trained else file_digest(Path(data.tokenizer)),
        [data.normalise, data.special, data.sentinels],
    ]
    return sha256(json.dumps(settings).encode())[:32]


def _open(folder: Path, data: Data, log: Log) -> Prepared | None:
    """What is in the cache, or None if that is missing or damaged."""
    weights = {source.name: source.weight for source in data.sources}
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        tokenizer, files = folder / "tokenizer.json", files_of(manifest)
        record = folder.parent / "known" / f"{folder.name}.json"
        if digest_of(files) != manifest["digest"] or not are_right(folder, files, record, log):
            return None
        sources = {}
        for entry in manifest["sources"]:
            name = entry["name"]
            train, validation = (
                {stream: Tokens(folder, files) for stream, files in entry[split].items()}
                for split in SPLITS
            )
            sources[name] = Source(name, weights.get(name, 1.0), train, validation)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Prepared(folder, Tokenizer.load(tokenizer), sources, manifest)


def _cuts_windows(config: Config) -> bool:
    """Whether an objective reads text in windows: without any it is causal_lm, and pairs of
    sentences, and what works on their rows, are cut by documents in any case."""
    owners = [table for table in config.objective if table.on is None]
    cut = not owners or any(not NEEDS[table.name].outputs for table in owners)
    return cut and config.batching.kind == "windows"


def check_windows(prepared: Prepared, config: Config) -> None:
    """Each split of running text must fill one window, else there is nothing to learn or to judge
    by. Raises `UserError`."""
    needed = config.model.context + 1
    for source in prepared.sources.values():
        if "text" not in source.train:
            continue
        of = "" if source.name == CORPUS else f" of {source.name}"
        train, validation = len(source.train["text"]), len(source.validation["text"])
        if train < needed:
            raise UserError(
                f"the training documents{of} have {train:,} tokens, and one window takes "
                f"{needed:,} (model.context + 1); give more text, or a smaller model.context"
            )
        if validation < needed:
            raise UserError(
                f"the validation documents{of} have {validation:,} tokens, and one window takes "
                f"{needed:,} (model.context + 1); give more text, a larger "
                "data.validation_fraction, or a smaller model.context"
            )
