"""What every format has in common, and what a config asks for that a file can't give."""

import subprocess
import sys

import pytest

from horovod_lm.data import documents
from horovod_lm.data.documents import Corpus, file_format
from horovod_lm.data.readers import Faults
from horovod_lm.errors import UserError
from tests.unit.reading import DOCUMENTS, FORMATS, packed, texts, write_jsonl, write_text


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("how", ["plain", "gz", "zst"])
def test_the_same_documents_out_of_every_format(tmp_path, suffix, how):
    path = tmp_path / f"data.{suffix}"
    FORMATS[suffix](path)
    expected = [text.replace("\n", " ") for text in DOCUMENTS] if suffix == "tsv" else DOCUMENTS
    assert texts(packed(path, how)) == expected


@pytest.mark.parametrize("how", ["gz", "zst"])
def test_compression_is_known_by_the_content(tmp_path, how):
    write_text(tmp_path / "data.txt")
    path = tmp_path / "packed.txt"
    packed(tmp_path / "data.txt", how).rename(path)
    assert texts(path) == DOCUMENTS


@pytest.mark.parametrize("suffix", ["txt", "parquet"])
@pytest.mark.parametrize("how", ["gz", "zst"])
def test_a_cut_compressed_file_is_refused(tmp_path, how, suffix):
    FORMATS[suffix](tmp_path / f"data.{suffix}")
    path = packed(tmp_path / f"data.{suffix}", how)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"{path} is damaged and can't be decompressed"):
        texts(path)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("a.jsonl", "jsonl"),
        ("a.ndjson.gz", "jsonl"),
        ("a.csv.zst", "csv"),
        ("a.tsv", "tsv"),
        ("a.parquet", "parquet"),
        ("a.tmx.gz", "tmx"),
        ("a.story", "story"),
        ("a.txt", "text"),
        ("train.en", "text"),
        ("a.txt.gz", "text"),
        ("README", "text"),
    ],
)
def test_formats_by_name(tmp_path, name, expected):
    assert file_format(tmp_path / name, "auto") == expected
    assert file_format(tmp_path / name, "glue") == "glue"


def test_a_name_that_might_be_anything_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'data\.json.*set data\.format to "jsonl"'):
        file_format(tmp_path / "data.json", "auto")


def test_empty_documents_are_left_out_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": " \\n"}\n{"text": ""}\n{"text": "two\\n\\n"}\n')
    faults = Faults()
    found = [text for text, _, _ in Corpus((path,)).pieces(faults)]
    assert found == ["one", "two"]
    assert faults.found[path].empty == 2 and faults.found[path].first[0] == "line 2: empty"


PEAK = """
import resource, sys
from pathlib import Path
from horovod_lm.data.documents import Corpus
list(Corpus((Path(sys.argv[1]),)).pieces())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(len(text) for text, _, _ in Corpus((Path(sys.argv[2]),), skip=True).pieces())
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_single_huge_line_takes_bounded_memory(tmp_path, suffix):
    (tmp_path / f"small.{suffix}").write_text('{"text": "small"}')
    path, size = tmp_path / f"huge.{suffix}", 2**27
    with path.open("wb") as stream:
        for _ in range(size // 2**20):
            stream.write(b"a b " * 2**18)
    command = [sys.executable, "-c", PEAK, str(tmp_path / f"small.{suffix}"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, memory = map(int, done.stdout.split())
    assert count == (size if suffix == "txt" else 0)
    assert memory < 100e6


def test_running_text_has_no_pairs(tmp_path):
    write_text(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"is running text, which has no pairs; give .* data\.targ"):
        texts(tmp_path / "a.txt", parallel=True)


def test_pairs_need_two_fields(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"takes two fields, and data\.fields has 0; name the"):
        texts(tmp_path / "a.jsonl", parallel=True)


def test_a_long_record_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 5)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "0123456789ab"}\n{"text": "0123456789"}')
    assert list(Corpus((path,)).pieces()) == [
        ("01234", False, 0), ("56789", False, 0), ("ab", True, 0),
        ("01234", False, 0), ("56789", True, 0),
    ]  # fmt: skip
