"""What is in the corpora that are to be prepared: every file is read and checked once."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from horovod_lm.data.cache import locked, replace, sha256, writing
from horovod_lm.data.documents import Corpus, file_digest, file_format
from horovod_lm.data.progress import Log, follow
from horovod_lm.data.readers import Faults
from horovod_lm.errors import UserError

SCHEMA = 3  # raise it when prepared data of the same key would come out different
CORPUS = "corpus"  # the name of the only source
SPLITS = ("train", "validation")
_SHOWN = 20  # files whose faults are said in the log


@dataclass(frozen=True)
class Contents:
    """What is in a corpus: the SHA-256 of each file, the number of documents (or of pairs), of
    characters, and what was left out, by file."""

    digests: list[str]
    documents: int
    characters: int
    left_out: dict[str, Any]


@dataclass
class RawSource:
    """A corpus that is to be prepared; the last `fraction` of its documents is for validation."""

    name: str
    corpus: Corpus
    stamps: list[Any]
    contents: Contents
    fraction: float

    @property
    def training(self) -> int:
        """How many documents are trained on: all but the last `fraction`, at least one."""
        documents = self.contents.documents
        return max(1, documents - max(1, round(documents * self.fraction)))

    def documents(self, split: str) -> int:
        """How many documents the split has."""
        return self.training if split == "train" else self.contents.documents - self.training

    def stem(self, split: str, stream: str) -> str:
        """What the names of files of a stream begin with."""
        name = "" if self.name == CORPUS else f"{self.name}."
        return name + split + ("" if stream == "text" else f".{stream}")


def raw_source(name: str, corpus: Corpus, fraction: float, cache: Path, log: Log) -> RawSource:
    """A corpus with what is in it. Raises `UserError` for what can't be read or is too little."""
    stamps = corpus.stamps()
    contents = _contents(name, corpus, stamps, cache, log)
    return RawSource(name, corpus, stamps, contents, fraction)


def settings_of(corpus: Corpus) -> list[Any]:
    """What decides which documents come out of the same files."""
    # Where the format is "auto", the same bytes under another name may be read in another way.
    formats = [file_format(path, corpus.format) for path in corpus.all_files]
    targets = len(corpus.targets)
    return [corpus.kind, formats, corpus.fields, corpus.parallel, targets, corpus.skip]


def _contents(name: str, corpus: Corpus, stamps: list[Any], cache: Path, log: Log) -> Contents:
    """Read and check every file, unless all are as they were the last time."""
    seen = sha256(json.dumps([SCHEMA, settings_of(corpus), stamps]).encode())
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


def _known_contents(known: Path) -> Contents | None:
    with suppress(OSError, ValueError, TypeError):  # missing, or damaged by a crash
        return Contents(**json.loads(known.read_text()))
    return None


def _read_contents(name: str, corpus: Corpus, stamps: list[Any], log: Log) -> Contents:
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
    return Contents(digests, documents, characters, left_out)


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
