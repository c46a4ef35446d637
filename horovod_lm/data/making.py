"""Filling a folder with prepared data: the tokenizer, the streams of tokens and the manifest."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from horovod_lm.config import Data
from horovod_lm.data.cache import replace, sha256
from horovod_lm.data.contents import SCHEMA, SPLITS, RawSource
from horovod_lm.data.documents import Piece, file_digest
from horovod_lm.data.progress import Log, follow
from horovod_lm.data.shards import Tokens, TokenWriter
from horovod_lm.data.tokenizer import Tokenizer
from horovod_lm.data.workers import Batch, Encoder, Workers
from horovod_lm.errors import UserError

_PROGRESS = "progress.json"  # in an unfinished folder: how far it is
_SAVE_SECONDS = 5.0
_BATCH = 2**20  # characters that are tokenised at once
_LEARNT = 2**28  # characters that a tokenizer is trained on; of more, evenly chosen documents
_SMALL = 2**23  # bytes of files for which no process is started


class Making:
    """Fills a folder with the tokenizer, the streams and the manifest; goes on where a killed
    process left it."""

    def __init__(
        self,
        folder: Path,
        data: Data,
        sources: list[RawSource],
        given: Tokenizer | None,
        log: Log,
    ) -> None:
        self._folder, self._data, self._sources = folder, data, sources
        self._given, self._log = given, log
        self._finished: dict[str, Any] = {}  # of each stream's stem, its part of the manifest
        self._bytes = 0  # of text that was tokenised

    @property
    def _tokenizer_file(self) -> Path:
        return self._folder / "tokenizer.json"

    def run(self) -> None:
        """Make all that is not there yet. Raises `UserError` for a file that changed meanwhile."""
        begun = time.monotonic()
        for path in self._folder.glob(f"{_PROGRESS}.*"):
            path.unlink()  # was not finished when the process was killed
        progress = self._left()
        if progress is None:
            for path in self._folder.iterdir():
                path.unlink()
            tokenizer = self._make_tokenizer()
            self._save({})
        else:
            self._log(f"going on with what was left unfinished in {self._folder}")
            tokenizer = Tokenizer.load(self._tokenizer_file)
            self._finished = progress["finished"]
        documents = sum(source.contents.documents for source in self._sources)
        current = (progress or {}).get("current", {})
        with self._encoder(tokenizer, documents) as encoder:
            for source in self._sources:
                self._write_source(source, tokenizer, encoder, current)
        for source in self._sources:
            if source.corpus.stamps() != source.stamps:
                raise UserError(
                    "a file of data.text changed while it was prepared; run it again when the "
                    "files are complete"
                )
        self._write_manifest(tokenizer)
        (self._folder / _PROGRESS).unlink()
        seconds, size = time.monotonic() - begun, self._bytes / 1e6
        self._log(f"prepared {size:.1f} MB of text in {seconds:.1f} s: {size / seconds:.2f} MB/s")

    def _left(self) -> dict[str, Any] | None:
        """How far an unfinished folder is, or None where there is nothing to go on with."""
        try:
            progress = json.loads((self._folder / _PROGRESS).read_text())
            if sha256(self._tokenizer_file.read_bytes()) != progress["tokenizer"]:
                return None
            for entry in progress["finished"].values():
                for file in [*entry["shards"], entry["index"]]:
                    if file_digest(self._folder / file["file"]) != file["sha256"]:
                        return None
            for stem, state in progress["current"].get("writers", {}).items():
                TokenWriter(self._folder, stem, self._data.vocabulary, state=state).close()
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None
        return dict(progress)

    def _save(self, current: dict[str, Any]) -> None:
        progress = {
            "tokenizer": sha256(self._tokenizer_file.read_bytes()),
            "finished": self._finished,
            "current": current,
        }
        replace(self._folder / _PROGRESS, json.dumps(progress))

    def _make_tokenizer(self) -> Tokenizer:
        data, log = self._data, self._log
        if self._given is not None:
            # Byte for byte, for those who compare it or hand it on.
            shutil.copyfile(data.tokenizer, self._tokenizer_file)
            return self._given
        training = sum(source.training for source in self._sources)
        kind = "a tokenizer" if data.tokenizer == "bpe" else f"a {data.tokenizer} tokenizer"
        log(f"training {kind} of {data.vocabulary:,} ids on {training:,} documents")
        tokenizer = Tokenizer.train(
            _Texts(self._sources, log),
            data.vocabulary,
            data.tokenizer,
            data.normalise,
            data.special,
            data.sentinels,
        )
        if tokenizer.vocabulary < data.vocabulary:
            log(
                f"the corpus fills {tokenizer.vocabulary:,} of {data.vocabulary:,} ids; the rest "
                "idles"
            )
        tokenizer.save(self._tokenizer_file)
        return tokenizer

    def _encoder(self, tokenizer: Tokenizer, documents: int) -> AbstractContextManager[Encoder]:
        size = sum(stamp[1] for source in self._sources for stamp in source.stamps)
        cores = len(os.sched_getaffinity(0))
        count = self._data.workers or (cores if size >= _SMALL else 1)
        where = f" in {count} processes" if count > 1 else ""
        self._log(f"tokenising {documents:,} documents{where}")
        if count > 1:
            return Workers(count, self._tokenizer_file)
        return nullcontext(_Here(tokenizer))

    def _write_source(
        self, source: RawSource, tokenizer: Tokenizer, encoder: Encoder, current: dict[str, Any]
    ) -> None:
        streams = source.corpus.streams
        stems = {split: [source.stem(split, stream) for stream in streams] for split in SPLITS}
        if all(stem in self._finished for split in SPLITS for stem in stems[split]):
            return
        total = source.contents.documents
        with follow(source.corpus.pieces(), self._log, "tokenising", total) as pieces:
            for split in SPLITS:
                mine = _first(pieces, source.documents(split), len(streams))
                if all(stem in self._finished for stem in stems[split]):
                    deque(mine, maxlen=0)  # passed over
                    continue
                here = current if set(stems[split]) <= current.get("writers", {}).keys() else {}
                self._write(stems[split], mine, tokenizer, encoder, here)
                self._save({})

    def _write(
        self,
        stems: list[str],
        pieces: Iterator[Piece],
        tokenizer: Tokenizer,
        encoder: Encoder,
        current: dict[str, Any],
    ) -> None:
        """Tokenise `pieces` into streams, one for each of `stems`."""
        end = np.array([tokenizer.end], dtype=np.int32)
        done = current.get("batches", 0)
        batches = _batched(pieces)
        for _ in range(done):
            next(batches, None)
        waiting: deque[list[Piece]] = deque()

        def texts() -> Iterator[Batch]:
            for batch in batches:
                waiting.append(batch)
                yield [text for text, _, _ in batch]

        saved = time.monotonic()
        states = current.get("writers", {})
        open_writer = partial(TokenWriter, self._folder, vocabulary=self._data.vocabulary)
        with ExitStack() as stack:
            writers = [
                stack.enter_context(open_writer(name=stem, state=states.get(stem)))
                for stem in stems
            ]
            for ids in encoder.encode(texts()):
                batch = waiting.popleft()
                for number, writer in enumerate(writers):
                    writer.write(
                        [
                            (np.concatenate([part, end]) if ends else part, ends)
                            for part, (_, ends, stream) in zip(ids, batch, strict=True)
                            if stream == number
                        ]
                    )
                done += 1
                self._bytes += sum(len(text.encode()) for text, _, _ in batch)
                if time.monotonic() - saved >= _SAVE_SECONDS:
                    states = {stem: w.save() for stem, w in zip(stems, writers, strict=True)}
                    self._save({"batches": done, "writers": states})
                    saved = time.monotonic()
            for stem, writer in zip(stems, writers, strict=True):
                self._finished[stem] = writer.finish()

    def _write_manifest(self, tokenizer: Tokenizer) -> None:
        data = self._data
        entries: list[dict[str, Any]] = []
        manifest: dict[str, Any] = {
            "schema": SCHEMA,
            "settings": data.model_dump(
                mode="json", exclude={"text", "sources", "target", "workers", "temperature"}
            ),
            "tokenizer": {
                "file": self._tokenizer_file.name,
                "sha256": sha256(self._tokenizer_file.read_bytes()),
                "kind": data.tokenizer if data.is_trained else "loaded",
                "vocabulary": tokenizer.vocabulary,
                "special": tokenizer.special,
                "sentinels": len(tokenizer.sentinels),
                "normaliser": tokenizer.normaliser,
                "every": _Texts(self._sources, self._log).every,
            },
            "sources": entries,
        }
        for source in self._sources:
            splits = {
                split: {
                    stream: self._finished[source.stem(split, stream)]
                    for stream in source.corpus.streams
                }
                for split in SPLITS
            }
            digests = zip(source.corpus.all_files, source.contents.digests, strict=True)
            entries.append(
                {
                    "name": source.name,
                    "corpus": [{"file": str(path), "sha256": digest} for path, digest in digests],
                    "documents": source.contents.documents,
                    "left_out": source.contents.left_out,
                    **splits,
                    "unigram_entropy": {
                        stream: self._entropy(splits, stream) for stream in splits["train"]
                    },
                }
            )
        manifest["digest"] = digest_of(files_of(manifest))
        replace(self._folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    def _entropy(self, splits: dict[str, Any], stream: str) -> float:
        train, validation = (
            Tokens(self._folder, splits[split][stream]).counts(self._data.vocabulary)
            for split in SPLITS
        )
        return unigram_entropy(train, validation)


def files_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of `manifest` that describe a file each, all of those of its folder."""
    files = [manifest["tokenizer"]]
    for source in manifest["sources"]:
        for split in SPLITS:
            for entry in source[split].values():
                files += [*entry["shards"], entry["index"]]
    return files


def digest_of(files: list[dict[str, Any]]) -> str:
    """The SHA-256 over those of `files`."""
    return sha256("".join(file["sha256"] for file in files).encode())


class _Texts:
    """The pieces of documents that the tokenizer is trained on, as often as they are wanted."""

    def __init__(self, sources: list[RawSource], log: Log) -> None:
        self._sources, self._log = sources, log
        characters = sum(source.contents.characters for source in sources)
        self.every = max(1, -(-characters // _LEARNT))  # of so many documents, one

    def __iter__(self) -> Iterator[str]:
        for source in self._sources:
            number, last = 0, len(source.corpus.streams) - 1
            what, total = "training the tokenizer", source.training
            with follow(source.corpus.pieces(), self._log, what, total) as pieces:
                for text, ends, stream in _first(pieces, total, last + 1):
                    if number % self.every == 0:
                        yield text
                    number += ends and stream == last


class _Here:
    """Tokenises in this process, with threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, batches: Iterable[Batch]) -> Iterator[list[np.ndarray]]:
        for batch in batches:
            yield list(self._tokenizer.encode_batch(batch))


def _first(pieces: Iterator[Piece], documents: int, streams: int) -> Iterator[Piece]:
    """The pieces of the first `documents` documents; the iterator then stands behind them."""
    for piece in pieces:
        yield piece
        documents -= piece[1] and piece[2] == streams - 1
        if not documents:
            return


def _batched(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
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
