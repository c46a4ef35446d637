"""What can't be prepared: one message each, and nothing half is left."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from horovod_lm.config import make_config
from horovod_lm.data import contents as module
from horovod_lm.data import progress
from horovod_lm.data.cache import locked
from horovod_lm.data.documents import Corpus
from horovod_lm.data.prepare import prepare
from horovod_lm.errors import UserError
from horovod_lm.objectives.registry import make_feeds
from tests.unit.texts import Words, corpus


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "horovod_lm" / "data"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"the cat number {i} sat on a mat" for i in range(50)))
    return path


def config(*text, **data):
    data = {"text": [str(path) for path in text], "vocabulary": 400, **data}
    return make_config({"model": {"context": 8}, "data": data}, "test")


def refused(settings):
    with pytest.raises(UserError) as caught:
        prepare(settings, lambda line: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Tokenizers that have no unknown token, where the text has something unknown

CLOSED = {
    "WordLevel": lambda words: models.WordLevel(words, "[UNK]"),
    "WordPiece": lambda words: models.WordPiece(words, unk_token="[UNK]"),
    "Unigram": lambda words: models.Unigram([(word, -1.0) for word in words]),
}
WORDS = ["the", "cat", "number", "sat", "on", "mat", *map(str, range(50)), *"abcehimnorstu", "</s>"]


def closed(kind, words, path):
    model = CLOSED[kind]({word: number for number, word in enumerate(words)})
    made = tokenizers.Tokenizer(model)
    made.add_special_tokens(["</s>"])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(path))
    return str(path)


@pytest.mark.parametrize("kind", CLOSED)
@pytest.mark.parametrize("workers", [1, 2])
def test_text_that_a_tokenizer_has_no_ids_for(text, tmp_path, cache, capfd, kind, workers):
    path = closed(kind, WORDS, tmp_path / "whole.json")
    prepared = prepare(config(text, tokenizer=path, workers=workers), lambda line: None)
    assert prepared.tokenizer.encode("the mat").tolist() == [0, 5]
    lacks = [word for word in WORDS if word not in ("mat", "m")]  # Unigram would spell it
    path = closed(kind, lacks, tmp_path / "lacks.json")
    message = refused(config(text, tokenizer=path, workers=workers))
    assert message.startswith("the tokenizer has no ids for some of the text (")
    assert "give one that has an unknown token, or one over bytes" in message
    assert not list(cache.glob("*.partial"))
    assert capfd.readouterr().err == ""


# Corpora that are empty or too small, by their names


def test_the_source_that_is_empty_is_named(text, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    sources = [
        {"name": "good", "text": [str(text)]},
        {"name": "void", "text": [str(tmp_path / "empty.jsonl")]},
    ]
    settings = make_config({"data": {"sources": sources, "vocabulary": 400}}, "test")
    assert 'the corpus of the source "void" of data.sources is empty: 1 file(s)' in refused(
        settings
    )


def test_documents_are_spoken_of_for_running_text_alone(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "one"}')
    assert refused(config(path)) == (
        "data.text holds one document only, and at least two are needed, one of them for "
        "validation; give more text"
    )
    path = tmp_path / "one.txt"
    path.write_text("one")
    assert 'one document only (data.documents = "paragraph")' in refused(config(path))
    target = refused(config(path, target=[str(path)]))
    assert "data.documents" not in target


def test_a_budget_of_less_than_a_row_is_refused():
    settings = {
        "model": {"width": 8, "heads": 1, "context": 64},
        "data": {"vocabulary": 1000},
        "batching": {"kind": "buckets", "tokens": 63},
    }
    with pytest.raises(
        UserError, match=r"tokens = 63 is too few for a row .* 64; set it to at .*64"
    ):
        make_feeds(make_config(settings, "test"), [corpus(150)], Words(), "train")
    settings["batching"]["tokens"] = 64
    make_feeds(make_config(settings, "test"), [corpus(150)], Words(), "train")
    settings["objective"] = [{"name": "causal_lm", "share": 3}, {"name": "prefix_lm"}]
    with pytest.raises(UserError, match=r"objective causal_lm, .* at least 8\d") as caught:
        make_feeds(make_config(settings, "test"), [corpus(150)], Words(), "train")
    settings["batching"]["tokens"] = 256
    make_feeds(make_config(settings, "test"), [corpus(150)], Words(), "train")
    assert "batching.tokens = 64" in str(caught.value)


# Several ranks


def test_one_process_reads_for_all(text, monkeypatch):
    reads, reading, waiting = [], threading.Event(), threading.Event()
    digest = module.file_digest
    monkeypatch.setattr(module, "file_digest", lambda path: reads.append(path) or digest(path))

    def first_log(line):
        if line.startswith("reading"):
            reading.set()
            assert waiting.wait(30)

    def second_log(line):
        if "another process is preparing" in line:
            waiting.set()

    thread = threading.Thread(target=prepare, args=(config(text), first_log))
    thread.start()
    assert reading.wait(30)
    prepare(config(text), second_log)
    thread.join()
    assert waiting.is_set() and reads == [text]


WAITING = """
import sys
from pathlib import Path
from horovod_lm.data.cache import locked
with locked(Path(sys.argv[1]), print):
    pass
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_says_that_it_waits(tmp_path, rank):
    environment = {**os.environ, "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2"}
    with locked(tmp_path / "folder", print):
        process = subprocess.Popen(
            [sys.executable, "-c", WAITING, str(tmp_path / "folder")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
    shown, _ = process.communicate(timeout=30)
    assert shown == ("another process is preparing folder; waiting for it\n" if rank == 0 else "")


# Where the cache is


def test_a_user_without_a_home(text, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")

    def nobody(number):
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert "this user has no home directory; set XDG_CACHE_HOME" in refused(config(text))


# Progress of few large documents


def test_few_large_documents_are_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    path = tmp_path / "large.jsonl"
    rows = [json.dumps({"text": "word " * 2**17}) for _ in range(5)]
    path.write_text("\n".join(rows))
    lines = []
    with progress.follow(Corpus((path,)).pieces(), lines.append, "reading", 5) as pieces:
        count = sum(len(text) for text, _, _ in pieces)
    assert count == 5 * (5 * 2**17)
    assert lines == [f"reading: {number} of 5 documents" for number in range(1, 6)]


def test_what_is_left_of_a_refusal(text, cache):
    """The files of the cache after a success are those of before."""
    prepare(config(text), lambda line: None)
    before = {path.name for path in cache.iterdir()}
    refused(config(text, documents="file"))
    assert {path.name for path in cache.iterdir()} == before
    assert np.all(prepare(config(text)).train.read(0, 5) >= 0)
