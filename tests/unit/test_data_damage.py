"""Prepared data that is not what its manifest says is found before anybody trains on it."""

import json
import os

import numpy as np
import pytest

from horovod_lm.config import make_config
from horovod_lm.data import digests
from horovod_lm.data.prepare import prepare

NAMES = ("tokenizer.json", "train-00000.tokens", "validation-00000.tokens", "train.documents")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "horovod_lm" / "data"


@pytest.fixture
def config(tmp_path):
    words = np.random.default_rng(1).choice(["the", "cat", "sat", "on", "a", "mat"], (60, 20))
    (tmp_path / "text.txt").write_text("\n\n".join(map(" ".join, words)))
    data = {"text": [str(tmp_path / "text.txt")], "vocabulary": 300}
    return make_config({"model": {"context": 8}, "data": data}, "test")


def flip(path):
    """Change one byte of a file, and nothing of its size."""
    content = path.read_bytes()
    path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])


@pytest.mark.parametrize("name", NAMES)
def test_a_byte_that_changed_is_found_and_mended(config, name):
    prepared = prepare(config)
    path = prepared.folder / name
    content = path.read_bytes()
    flip(path)
    lines = []
    again = prepare(config, lines.append)
    assert [line for line in lines if "is damaged; making it anew" in line]
    assert again.manifest == prepared.manifest and path.read_bytes() == content


def test_a_manifest_that_was_changed_is_found(config):
    prepared = prepare(config)
    path = prepared.folder / "manifest.json"
    for change in ({"digest": "0" * 64}, {"sources": 3}, {"tokenizer": None}):
        path.write_text(json.dumps({**prepared.manifest, **change}))
        lines = []
        assert prepare(config, lines.append).manifest == prepared.manifest
        assert [line for line in lines if "is damaged; making it anew" in line]


def test_files_that_stayed_as_they_were_are_read_once(config, monkeypatch):
    prepare(config)
    read = []
    digest = digests.hashlib.file_digest
    monkeypatch.setattr(
        digests.hashlib, "file_digest", lambda f, kind: read.append(f.name) or digest(f, kind)
    )
    folder = prepare(config).folder
    assert not read
    os.utime(folder / NAMES[1])  # touched, and perhaps changed
    lines = []
    prepare(config, lines.append)
    assert len(read) == 5 and not lines
    prepare(config)
    assert len(read) == 5


def test_a_record_that_is_lost_or_can_not_be_written_costs_time_only(config, cache, monkeypatch):
    prepared = prepare(config)
    record = cache / "known" / f"{prepared.folder.name}.json"
    for content in ("", "[]", '{"a": 1}'):
        record.write_text(content)
        assert prepare(config).manifest == prepared.manifest
    record.unlink()

    def refuse(path, text):
        raise PermissionError(path)

    monkeypatch.setattr(digests, "replace", refuse)
    assert prepare(config).manifest == prepared.manifest
    assert not record.exists()


def test_reading_that_takes_long_is_said(config, monkeypatch):
    prepared = prepare(config)
    monkeypatch.setattr(digests, "_SAID", 1000)
    os.utime(prepared.folder / NAMES[1])
    lines = []
    prepare(config, lines.append)
    assert lines == ["comparing 0 MB of prepared data with their digests"]
