"""Corpus to tokenizer to token shards, once, into a cache."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from horovod_lm.config import Config, Data
from horovod_lm.data.cache import building, cache_folder, locked, writing
from horovod_lm.data.corpora import PREFIX, corpus_file
from horovod_lm.data.documents import Corpus, find_files, text_digest
from horovod_lm.data.shards import Tokens, TokenWriter
from horovod_lm.data.tokenizer import Tokenizer
from horovod_lm.errors import UserError

Log = Callable[[str], None]

SCHEMA = 1  # raise it when prepared data of the same key would come out different
_BATCH = 2**20  # characters that are tokenised at once
_LOG_SECONDS = 5.0


@dataclass(frozen=True)
class Prepared:
    """Prepared data, memory-mapped.

    `manifest` has the settings, the digests of the corpus' files and of every file in `folder`,
    and `digest` over the latter: equal digests are equal data. `unigram_entropy` is in nats per
    token: the validation tokens under the training counts, add-one over the whole vocabulary.
    """

    folder: Path
    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    manifest: dict[str, Any]

    @property
    def unigram_entropy(self) -> float:
        return float(self.manifest["unigram_entropy"])


@dataclass(frozen=True)
class _Contents:
    """What is in a corpus: the SHA-256 of each file, and the number of documents."""

    digests: list[str]
    documents: int


def prepare(config: Config, log: Log = print) -> Prepared:
    """The data of `config`: from the cache, or made now, on this process' cores.

    The validation documents are the last `validation_fraction`, at least one; the tokenizer is
    trained on the others. Safe to call from several processes at once: they wait for each other.
    Raises `UserError` for a corpus that can't be used, `RunFailed` for a full disk; nothing half
    is left.
    """
    cache = cache_folder()
    corpus = _find(config.data, cache, log)
    stamps = corpus.stamps()
    contents = _contents(corpus, stamps, cache, log)
    folder = cache / _key(config.data, contents)
    prepared = _open(folder)
    if prepared is None:
        with locked(folder, log):
            prepared = _open(folder)  # another process may have made it meanwhile
            if prepared is None:
                if folder.exists():
                    log(f"the prepared data in {folder} is damaged; making it anew")
                with building(folder) as partial:
                    _make(partial, config.data, corpus, stamps, contents, log)
                prepared = _open(folder)
    assert prepared is not None
    _check_windows(prepared, config)
    return prepared


def _find(data: Data, cache: Path, log: Log) -> Corpus:
    patterns = [
        str(corpus_file(text.removeprefix(PREFIX), cache, log)) if text.startswith(PREFIX) else text
        for text in data.text
    ]
    return Corpus(find_files(patterns), data.documents)


def _contents(corpus: Corpus, stamps: list[Any], cache: Path, log: Log) -> _Contents:
    """Read and check every file, unless all are as they were the last time."""
    seen = hashlib.sha256(json.dumps([SCHEMA, corpus.kind, stamps]).encode()).hexdigest()
    known = cache / "known" / f"{seen[:32]}.json"
    with suppress(OSError, ValueError, TypeError):  # missing, or damaged by a crash
        return _Contents(**json.loads(known.read_text()))
    size = sum(stamp[1] for stamp in stamps)
    log(f"reading {size / 1e6:.1f} MB of text in {len(stamps)} file(s)")
    digests = [text_digest(path) for path in corpus.files]
    contents = _Contents(digests, sum(ends for _, ends in corpus.pieces()))
    _check_documents(contents.documents, corpus)
    with writing(known):
        known.parent.mkdir(parents=True, exist_ok=True)
        partial = known.with_name(f"{known.name}.{time.time_ns()}")
        try:
            partial.write_text(json.dumps(vars(contents)))
            partial.rename(known)
        finally:
            partial.unlink(missing_ok=True)
    return contents


def _check_documents(documents: int, corpus: Corpus) -> None:
    if documents == 0:
        raise UserError(
            f"the corpus of data.text is empty: {len(corpus.files)} file(s) without any text"
        )
    if documents == 1:
        raise UserError(
            f'data.text holds one document only (data.documents = "{corpus.kind}"), and at least '
            "two are needed, one of them for validation; give more text, or another "
            'data.documents: "paragraph", "line" or "file"'
        )


def _key(data: Data, contents: _Contents) -> str:
    settings = [SCHEMA, contents.digests, data.documents, data.vocabulary, data.validation_fraction]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _open(folder: Path) -> Prepared | None:
    """What is in the cache, or None if that is missing or damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        tokenizer = folder / "tokenizer.json"
        if _sha256(tokenizer.read_bytes()) != manifest["tokenizer"]["sha256"]:
            return None
        train, validation = (Tokens(folder, manifest[split]) for split in ("train", "validation"))
    except (OSError, ValueError, KeyError):
        return None
    return Prepared(folder, Tokenizer.load(tokenizer), train, validation, manifest)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _make(
    folder: Path,
    data: Data,
    corpus: Corpus,
    stamps: list[Any],
    contents: _Contents,
    log: Log,
) -> None:
    """Train the tokenizer, write both splits and the manifest."""
    held_out = max(1, round(contents.documents * data.validation_fraction))
    training = max(1, contents.documents - held_out)
    log(f"training a tokenizer of {data.vocabulary:,} ids on {training:,} documents")
    progress = _Progress(log, "training the tokenizer", training)
    texts = (text for text, _ in progress.follow(_first(corpus.pieces(), training)))
    tokenizer = Tokenizer.train(texts, data.vocabulary)
    if tokenizer.vocabulary < data.vocabulary:
        log(f"the corpus fills {tokenizer.vocabulary:,} of {data.vocabulary:,} ids; the rest idles")
    tokenizer.save(folder / "tokenizer.json")

    log(f"tokenising {contents.documents:,} documents")
    progress = _Progress(log, "tokenising", contents.documents)
    pieces = progress.follow(corpus.pieces())
    train = _write(folder, "train", data.vocabulary, tokenizer, _first(pieces, training))
    validation = _write(folder, "validation", data.vocabulary, tokenizer, pieces)
    if corpus.stamps() != stamps:
        raise UserError(
            "a file of data.text changed while it was prepared; run it again when the files are "
            "complete"
        )
    _write_manifest(folder, data, corpus, contents, tokenizer, train, validation)


def _write_manifest(
    folder: Path,
    data: Data,
    corpus: Corpus,
    contents: _Contents,
    tokenizer: Tokenizer,
    train: TokenWriter,
    validation: TokenWriter,
) -> None:
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "settings": data.model_dump(mode="json", exclude={"text"}),
        "corpus": [
            {"file": str(path), "sha256": digest}
            for path, digest in zip(corpus.files, contents.digests, strict=True)
        ],
        "tokenizer": {
            "file": "tokenizer.json",
            "sha256": _sha256((folder / "tokenizer.json").read_bytes()),
            "vocabulary": tokenizer.vocabulary,
        },
        "train": train.finish(),
        "validation": validation.finish(),
    }
    files = [manifest["tokenizer"]]
    for split in (manifest["train"], manifest["validation"]):
        files += [*split["shards"], split["index"]]
    manifest["digest"] = _sha256("".join(file["sha256"] for file in files).encode())
    manifest["unigram_entropy"] = unigram_entropy(train.counts, validation.counts)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _first(pieces: Iterator[tuple[str, bool]], documents: int) -> Iterator[tuple[str, bool]]:
    """The pieces of the first `documents` documents; the iterator then stands behind them."""
    for text, ends in pieces:
        yield text, ends
        documents -= ends
        if not documents:
            return


def _write(
    folder: Path,
    split: str,
    vocabulary: int,
    tokenizer: Tokenizer,
    pieces: Iterator[tuple[str, bool]],
) -> TokenWriter:
    """Tokenise `pieces` into a stream, in batches that keep all cores at work."""
    end = np.array([tokenizer.end], dtype=np.int32)
    with TokenWriter(folder, split, vocabulary) as writer:
        for batch in _batched(pieces):
            ids = tokenizer.encode_batch([text for text, _ in batch])
            writer.write(
                [
                    (np.concatenate([part, end]) if ends else part, ends)
                    for part, (_, ends) in zip(ids, batch, strict=True)
                ]
            )
    return writer


def _batched(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def unigram_entropy(train: np.ndarray, validation: np.ndarray) -> float:
    """Nats per token of the `validation` counts (V,) under the add-one distribution of the `train`
    counts (V,): -sum(v log((t + 1) / (sum(t) + V))) / sum(v)."""
    probabilities = (train + 1) / (train.sum() + len(train))
    return float(-(validation * np.log(probabilities)).sum() / validation.sum())


class _Progress:
    """Says every few seconds how far a long pass over documents is."""

    def __init__(self, log: Log, what: str, total: int) -> None:
        self._log, self._what, self._total = log, what, total
        self._last = time.monotonic()

    def follow(self, pieces: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
        done = 0
        for text, ends in pieces:
            yield text, ends
            done += ends
            if time.monotonic() - self._last > _LOG_SECONDS:
                self._last = time.monotonic()
                self._log(f"{self._what}: {done:,} of {self._total:,} documents")


def _check_windows(prepared: Prepared, config: Config) -> None:
    """Each split must fill one window, else there is nothing to learn or to judge by."""
    needed = config.model.context + 1
    if len(prepared.train) < needed:
        raise UserError(
            f"the training documents have {len(prepared.train):,} tokens, and one window takes "
            f"{needed:,} (model.context + 1); give more text, or a smaller model.context"
        )
    if len(prepared.validation) < needed:
        raise UserError(
            f"the validation documents have {len(prepared.validation):,} tokens, and one window "
            f"takes {needed:,} (model.context + 1); give more text, a larger "
            "data.validation_fraction, or a smaller model.context"
        )
