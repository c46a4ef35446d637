"""Readers of JSON Lines, CSV, TSV and Parquet, on small files written here."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from horovod_lm.data import readers
from horovod_lm.data.readers import tables
from tests.unit.reading import FORMATS, records, refused, texts, write_parquet

# JSON Lines


def test_fields_of_json_lines_in_their_order_and_nested(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": {"b": "inner"}, "c": 3, "d.e": "dotted"}\n')
    assert records("jsonl", path, "c", "a.b", "d.e") == [
        {"c": "3", "a.b": "inner", "d.e": "dotted"}
    ]
    assert texts(path, fields=("c", "a.b")) == ["3\ninner"]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "cut', "it is not JSON (column 10: Unterminated string starting at)"),
        (b'{"text": "a"} x', "it is not JSON (column 15: Extra data)"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'["text"]', "it is JSON, but no object"),
        (b'{"title": "a", "b": 1}', 'it has no field "text"; its fields are "title", "b"'),
        (b'{"text": ["a"]}', 'its field "text" is a list, not text'),
        (b'{"text": null}', 'its field "text" is null, not text'),
        (b'{"text": "a\\u0000"}', 'its field "text" is a text with a NUL character'),
        (b'{"text": "\\ud83d"}', 'its field "text" is a text with half a character, U+D83D'),
        (b'{"text": "a\xff"}', "at byte 11 of the line it has byte 0xff, which is not UTF-8"),
        (b'{"text": "a\0"}', "at byte 11 of the line it has a NUL byte"),
    ],
)
def test_broken_json_lines(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    assert f"{path}, line 3: {reason}; " in refused("jsonl", path)
    found, left_out = records("jsonl", path, skip=True)
    assert found == [{"text": "one"}, {"text": "two"}]
    assert (left_out.broken, left_out.first) == (1, [f"line 3: {reason}"])


@pytest.mark.parametrize("length", [99, 100, 101, 250])
def test_a_line_that_is_too_long_is_one_broken_place(tmp_path, monkeypatch, length):
    monkeypatch.setattr(readers, "LONGEST", 100)
    path = tmp_path / "a.jsonl"
    long = json.dumps({"text": "x" * (length - 12)})
    path.write_text(f'{{"text": "one"}}\n{long}\n{{"text": "two"}}')
    if length < 100:
        assert len(records("jsonl", path)) == 3
        return
    assert "line 2: it is longer than 100 characters; break it up" in refused("jsonl", path)
    found, left_out = records("jsonl", path, skip=True)
    assert found == [{"text": "one"}, {"text": "two"}] and left_out.broken == 1


# Tables


def test_csv_with_quotes_commas_and_line_feeds_in_cells(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeffid,text\n1,"a ""b"", c"\n\n2,"two\r\nlines"\n3,plain\n', "utf-8")
    assert records("csv", path) == [
        {"text": 'a "b", c'},
        {"text": "two\nlines"},
        {"text": "plain"},
    ]
    path.write_text("a,b\nc,d\n")
    assert records("csv", path, "2", "1") == [{"2": "b", "1": "a"}, {"2": "d", "1": "c"}]


def test_tsv_has_no_quotes(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('id\ttext\n1\t"open\n2\tsay "hi"\n')
    assert records("tsv", path) == [{"text": '"open'}, {"text": 'say "hi"'}]


@pytest.mark.parametrize(
    "name, row, line, reason",
    [
        ("csv", b"2,b,c", 3, "it has 3 columns, where the first line has 2"),
        ("tsv", b"2", 3, "it has 1 columns, where the first line has 2"),
        ("csv", b'2,"b"c', 3, "it is not CSV (',' expected after '\"')"),
        ("csv", b"2,b\xff", 3, "at byte 3 of the line it has byte 0xff, which is not UTF-8"),
        ("csv", b'2,"x\nb\xff"', 4, "at byte 1 of the line it has byte 0xff, which is not UTF-8"),
        ("tsv", b"2\tb\0", 3, "at byte 3 of the line it has a NUL byte"),
    ],
)
def test_broken_rows(tmp_path, name, row, line, reason):
    path = tmp_path / f"a.{name}"
    rows = [b"id,text", b"1,one", row, b"3,three"]
    if name == "tsv":
        rows = [r.replace(b",", b"\t") for r in rows]
    path.write_bytes(b"\n".join(rows))
    assert f"{path}, line {line}: {reason}; " in refused(name, path)
    found, left_out = records(name, path, skip=True)
    assert found == [{"text": "one"}, {"text": "three"}]
    assert (left_out.broken, left_out.first) == (1, [f"line {line}: {reason}"])


def test_a_quote_that_stays_open_does_not_swallow_what_follows(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,one\n2,"open\n3,three\n')
    assert "line 3: it is not CSV (unexpected end of data)" in refused("csv", path)
    monkeypatch.setattr(tables, "LONGEST", 10)
    path.write_text('id,text\n1,one\n2,"open\n' + "3,three\n" * 5)
    found, left_out = records("csv", path, skip=True)
    assert left_out.broken >= 1 and {"text": "three"} in found
    assert "line 3: it is not CSV (field larger than field limit" in left_out.first[0]


@pytest.mark.parametrize("name", ["csv", "tsv", "parquet"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path, name):
    path = tmp_path / f"a.{name}"
    FORMATS[name](path)
    assert 'has no column "body"; its columns are "id", "text"' in refused(name, path, "body")


# Parquet


def test_parquet_with_structures_numbers_and_nulls(tmp_path):
    path = tmp_path / "a.parquet"
    pairs = [{"de": "ja", "en": "yes"}, {"de": "nein", "en": None}, {"de": "halt", "en": "stop"}]
    parquet.write_table(pyarrow.table({"translation": pairs, "number": [1, 2, 3]}), path)
    fields = "translation.en", "translation.de", "number"
    found, left_out = records("parquet", path, *fields, skip=True)
    assert [tuple(record.values()) for record in found] == [
        ("yes", "ja", "1"),
        ("stop", "halt", "3"),
    ]
    assert left_out.first == ['row 2: its field "translation.en" is null, not text']
    assert texts(path, fields=fields[:2], parallel=True, skip=True) == [
        ["yes", "stop"],
        ["ja", "halt"],
    ]


@pytest.mark.parametrize("damage", ["other", "cut", "inside"])
def test_what_is_no_parquet_is_refused(tmp_path, damage):
    path = tmp_path / "a.parquet"
    write_parquet(path)
    content = path.read_bytes()
    pages = len(content) - 12 - int.from_bytes(content[-8:-4], "little")  # before the footer
    broken = {
        "other": b"PAR2",
        "cut": content[:-20],
        "inside": content[:4] + bytes(pages) + content[4 + pages :],
    }
    path.write_bytes(broken[damage])
    assert "is no Parquet file, or is damaged (" in refused("parquet", path)
