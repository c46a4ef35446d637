"""Corpora to tokenizer to token shards, once, into a cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from horovod_lm import config as configuration
from horovod_lm.config import Config, Data
from horovod_lm.data.cache import building, cache_folder, locked, replace, writing
from horovod_lm.data.corpora import PREFIX, corpus_file
from horovod_lm.data.digests import are_right
from horovod_lm.data.documents import Corpus, Piece, file_digest, file_format, find_files
from horovod_lm.data.progress import Log as Log
from horovod_lm.data.progress import follow
from horovod_lm.data.readers import Faults
from horovod_lm.data.shards import Tokens, TokenWriter
from horovod_lm.data.tokenizer import Tokenizer
from horovod_lm.data.workers import Batch, Encoder, Workers
from horovod_lm.errors import UserError

SCHEMA = 3  # raise it when prepared data of the same key would come out different
CORPUS = "corpus"  # the name of the only source
SPLITS = ("train", "validation")
_PROGRESS = "progress.json"  # in an unfinished folder: how far it is
_SAVE_SECONDS = 5.0
_BATCH = 2**20  # characters that are tokenised at once
_LEARNT = 2**28  # characters that a tokenizer is trained on; of more, evenly chosen documents
_SMALL = 2**23  # bytes of files for which no process is started
_SHOWN = 20  # files whose faults are said in the log


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
        """The first source's first stream."""
        return next(iter(next(iter(self.sources.values())).train.values()))

    @property
    def validation(self) -> Tokens:
        """The first source's first stream."""
        return next(iter(next(iter(self.sources.values())).validation.values()))

    @property
    def unigram_entropy(self) -> float:
        """Nats per token of the first source's last stream: the validation tokens under the
        training counts, add-one over the whole vocabulary."""
        return float(list(self.manifest["sources"][0]["unigram_entropy"].values())[-1])


@dataclass(frozen=True)
class _Contents:
    """What is in a corpus: the SHA-256 of each file, the number of documents (or of pairs), of
    characters, and what was left out, by file."""

    digests: list[str]
    documents: int
    characters: int
    left_out: dict[str, Any]


@dataclass
class _Source:
    """A corpus that is to be prepared."""

    name: str
    corpus: Corpus
    stamps: list[Any]
    contents: _Contents
    fraction: float

    @property
    def training(self) -> int:
        """How many documents are trained on: all but the last `fraction`, which is one at least."""
        documents = self.contents.documents
        return max(1, documents - max(1, round(documents * self.fraction)))

    def documents(self, split: str) -> int:
        return self.training if split == "train" else self.contents.documents - self.training

    def stem(self, split: str, stream: str) -> str:
        """What the names of files of a stream begin with."""
        name = "" if self.name == CORPUS else f"{self.name}."
        return name + split + ("" if stream == "text" else f".{stream}")


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
        _source(name, corpus, data, cache, log) for name, corpus in _corpora(data, cache, log)
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
                    _Making(unfinished, data, sources, given, log).run()
                prepared = _open(folder, data, log)
    assert prepared is not None
    _check_windows(prepared, config)
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


def _source(name: str, corpus: Corpus, data: Data, cache: Path, log: Log) -> _Source:
    stamps = corpus.stamps()
    contents = _contents(name, corpus, stamps, cache, log)
    return _Source(name, corpus, stamps, contents, data.validation_fraction)


def _settings(corpus: Corpus) -> list[Any]:
    """What decides which documents come out of the same files."""
    targets = len(corpus.targets)
    return [
        corpus.kind, corpus.format, corpus.fields, corpus.parallel, targets, corpus.skip,
    ]  # fmt: skip


def _contents(name: str, corpus: Corpus, stamps: list[Any], cache: Path, log: Log) -> _Contents:
    """Read and check every file, unless all are as they were the last time."""
    seen = _sha256(json.dumps([SCHEMA, _settings(corpus), stamps]).encode())
    known = cache / "known" / f"{seen[:32]}.json"
    if (contents := _known_contents(known)) is not None:
        return contents
    # The ranks of a job come here together; one of them reads for all.
    with locked(known.with_suffix(""), log):
        contents = _known_contents(known)
        if contents is None:
            contents = _read_contents(name, corpus, stamps, log)
            with writing(known):
                replace(known, json.dumps(vars(contents)))
    return contents


def _known_contents(known: Path) -> _Contents | None:
    with suppress(OSError, ValueError, TypeError):  # missing, or damaged by a crash
        return _Contents(**json.loads(known.read_text()))
    return None


def _read_contents(name: str, corpus: Corpus, stamps: list[Any], log: Log) -> _Contents:
    size = sum(stamp[1] for stamp in stamps)
    log(f"reading {size / 1e6:.1f} MB of text in {len(stamps)} file(s)")
    digests = [file_digest(path) for path in corpus.all_files]
    faults, last = Faults(corpus.skip), len(corpus.streams) - 1
    documents = characters = 0
    with follow(corpus.pieces(faults), log, "reading", None) as pieces:
        for text, ends, stream in pieces:
            documents += ends and stream == last
            characters += len(text)
    left_out = {str(path): asdict(found) for path, found in faults.found.items()}
    _say_left_out(left_out, log)
    _check_documents(documents, corpus, name)
    return _Contents(digests, documents, characters, left_out)


def _say_left_out(left_out: dict[str, Any], log: Log) -> None:
    for path, found in list(left_out.items())[:_SHOWN]:
        log(
            f"{path}: left out {found['broken']:,} broken place(s) and {found['empty']:,} empty "
            f"document(s); first {'; '.join(found['first'])}"
        )
    if len(left_out) > _SHOWN:
        rest = list(left_out.values())[_SHOWN:]
        log(
            f"{len(rest)} more file(s): left out {sum(f['broken'] for f in rest):,} broken "
            f"place(s) and {sum(f['empty'] for f in rest):,} empty document(s)"
        )


def _check_documents(documents: int, corpus: Corpus, name: str) -> None:
    of = "data.text" if name == CORPUS else f'the source "{name}" of data.sources'
    if documents == 0:
        raise UserError(
            f"the corpus of {of} is empty: {len(corpus.files)} file(s) without any text that can "
            "be used; give others"
        )
    if documents == 1:
        running = not corpus.targets and file_format(corpus.files[0], corpus.format) == "text"
        how = f' (data.documents = "{corpus.kind}")' if running else ""
        mend = ', or another data.documents: "paragraph", "line" or "file"' if running else ""
        raise UserError(
            f"{of} holds one document only{how}, and at least two are needed, one of them for "
            f"validation; give more text{mend}"
        )


def _key(data: Data, sources: list[_Source]) -> str:
    settings = [
        SCHEMA,
        [[s.name, s.contents.digests, _settings(s.corpus)] for s in sources],
        data.vocabulary,
        data.validation_fraction,
        data.tokenizer if data.is_trained else file_digest(Path(data.tokenizer)),
        [data.normalise, data.special, data.sentinels],
    ]
    return _sha256(json.dumps(settings).encode())[:32]


def _open(folder: Path, data: Data, log: Log) -> Prepared | None:
    """What is in the cache, or None if that is missing or damaged."""
    weights = {source.name: source.weight for source in data.sources}
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        tokenizer, files = folder / "tokenizer.json", _files(manifest)
        record = folder.parent / "known" / f"{folder.name}.json"
        if _digest(files) != manifest["digest"] or not are_right(folder, files, record, log):
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


def _files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of `manifest` that describe a file each, all of those of its folder."""
    files = [manifest["tokenizer"]]
    for source in manifest["sources"]:
        for split in SPLITS:
            for entry in source[split].values():
                files += [*entry["shards"], entry["index"]]
    return files


def _digest(files: list[dict[str, Any]]) -> str:
    return _sha256("".join(file["sha256"] for file in files).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Making:
    """Fills a folder with the tokenizer, the streams and the manifest; goes on where a killed
    process left it."""

    def __init__(
        self,
        folder: Path,
        data: Data,
        sources: list[_Source],
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
            if _sha256(self._tokenizer_file.read_bytes()) != progress["tokenizer"]:
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
            "tokenizer": _sha256(self._tokenizer_file.read_bytes()),
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
        self, source: _Source, tokenizer: Tokenizer, encoder: Encoder, current: dict[str, Any]
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
                "sha256": _sha256(self._tokenizer_file.read_bytes()),
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
        manifest["digest"] = _digest(_files(manifest))
        replace(self._folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    def _entropy(self, splits: dict[str, Any], stream: str) -> float:
        train, validation = (
            Tokens(self._folder, splits[split][stream]).counts(self._data.vocabulary)
            for split in SPLITS
        )
        return unigram_entropy(train, validation)


class _Texts:
    """The pieces of documents that the tokenizer is trained on, as often as they are wanted."""

    def __init__(self, sources: list[_Source], log: Log) -> None:
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


def _check_windows(prepared: Prepared, config: Config) -> None:
    """Each split of running text must fill one window, else there is nothing to learn or to judge
    by."""
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
