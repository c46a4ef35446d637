"""Every reader on small files written here in exactly the format that is distributed."""

import gzip
import json
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

from horovod_lm.data import documents, readers
from horovod_lm.data.documents import READERS, Corpus, file_format
from horovod_lm.data.readers import Faults, tables
from horovod_lm.errors import UserError


def records(name, path, *fields, skip=False):
    faults = Faults(skip)
    found = [record.fields for record in READERS[name](path, fields, faults)]
    return (found, faults.found.get(path)) if skip else found


def refused(name, path, *fields):
    with pytest.raises(UserError) as caught:
        records(name, path, *fields)
    text = str(caught.value)
    assert text.startswith(str(path)) or "data.fields" in text
    assert "\n" not in text
    return text


def texts(*files, **settings):
    """The documents of a corpus, by stream."""
    corpus = Corpus(files, **settings)
    found = [[""] for _ in corpus.streams]
    for text, ends, stream in corpus.pieces():
        found[stream][-1] += text
        if ends:
            found[stream].append("")
    assert all(stream.pop() == "" for stream in found)
    return found if len(found) > 1 else found[0]


def packed(path, how):
    """A compressed copy of a file."""
    content = path.read_bytes()
    if how == "zst":
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        content = sink.getvalue().to_pybytes()
    elif how == "gz":
        # In two members, as parallel packers and `cat` make them.
        half = len(content) // 2
        content = gzip.compress(content[:half]) + gzip.compress(content[half:])
    else:
        return path
    path = path.with_name(f"{path.name}.{how}")
    path.write_bytes(content)
    return path


DOCUMENTS = ["The first, with “quotes”.", "Zweites: Größe", "третий\nв двух строках", "4, 你好"]


def write_text(path):
    path.write_text("\n\n".join(DOCUMENTS) + "\n", encoding="utf-8")


def write_jsonl(path):
    rows = [json.dumps({"id": i, "text": text}) for i, text in enumerate(DOCUMENTS)]
    path.write_text("\n".join([*rows[:2], "", *rows[2:]]) + "\n")


def write_csv(path):
    cells = ['"' + text.replace('"', '""') + '"' for text in DOCUMENTS]
    path.write_text("id,text\r\n" + "".join(f"{i},{c}\r\n" for i, c in enumerate(cells)), "utf-8")


def write_tsv(path):
    rows = [f'{i}\t{text}\t"' for i, text in enumerate(DOCUMENTS)]
    path.write_text("id\ttext\tother\n" + "\n".join(rows).replace("ий\nв", "ий в"), "utf-8")


def write_parquet(path):
    table = pyarrow.table({"id": [1, 2, 3, 4], "text": DOCUMENTS})
    parquet.write_table(table, path, row_group_size=3)


FORMATS = {
    "txt": write_text,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "tsv": write_tsv,
    "parquet": write_parquet,
}


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


# GLUE: the headers and the first lines have the form of the files in the distributed archives.

GLUE = {
    "CoLA/train.tsv": (
        "gj04\t1\t\tOur friends won't buy this analysis, let alone the next one we propose.\n"
        "gj04\t0\t*\tThe more we study verbs, the crazier they get it.\n",
        [("Our friends won't buy this analysis, let alone the next one we propose.", "1"),
         ("The more we study verbs, the crazier they get it.", "0")],
    ),
    "CoLA/test.tsv": (
        "index\tsentence\n0\tBill whistled past the house.\n",
        [("Bill whistled past the house.",)],
    ),
    "SST-2/train.tsv": (
        "sentence\tlabel\nhide new secretions from the parental units \t0\n",
        [("hide new secretions from the parental units ", "0")],
    ),
    "SST-2/test.tsv": ("index\tsentence\n0\tuneasy mishmash .\n", [("uneasy mishmash .",)]),
    "MRPC/msr_paraphrase_train.txt": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
        '1\t702876\t702977\tAmrozi called him "the witness .\tHe was called "the witness" .\n',
        [('Amrozi called him "the witness .', 'He was called "the witness" .', "1")],
    ),
    "MRPC/test.tsv": (
        "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1089874\t1089925\tOne .\tOther .\n",
        [("One .", "Other .")],
    ),
    "QQP/train.tsv": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n133273\t213221\t213222\tHow?\tWhy?\t0\n",
        [("How?", "Why?", "0")],
    ),
    "QQP/test.tsv": ("id\tquestion1\tquestion2\n0\tHow?\tWhy?\n", [("How?", "Why?")]),
    "STS-B/dev.tsv": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tmain-captions\tMSRvid\t2012test\t0000\tnone\tnone\tA man rides.\tA man walks.\t5.000\n",
        [("A man rides.", "A man walks.", "5.000")],
    ),
    "STS-B/test.tsv": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\n"
        "0\tmain-captions\tMSRvid\t2012test\t0024\tnone\tnone\tA girl.\tA woman.\n",
        [("A girl.", "A woman.")],
    ),
    "MNLI/train.tsv": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t31193\t31193n\tfiction\t( A )\t( B )\t(ROOT A)\t(ROOT B)\tA\tB\tneutral\tneutral\n",
        [("A", "B", "neutral")],
    ),
    "MNLI/dev_matched.tsv": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\t"
        "label5\tgold_label\n"
        "0\t6\t6e\tslate\t( A )\t( B )\t(ROOT A)\t(ROOT B)\tA\tB\te\tn\te\te\te\tentailment\n",
        [("A", "B", "entailment")],
    ),
    "MNLI/test_matched.tsv": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\n"
        "0\t31493\t31493\ttravel\t( A )\t( B )\t(ROOT A)\t(ROOT B)\tA\tB\n",
        [("A", "B")],
    ),
    "QNLI/dev.tsv": (
        "index\tquestion\tsentence\tlabel\n0\tWhat came?\tAs of that day.\tentailment\n",
        [("What came?", "As of that day.", "entailment")],
    ),
    "RTE/train.tsv": (
        "index\tsentence1\tsentence2\tlabel\n0\tNo Weapons.\tWeapons Found.\tnot_entailment\n",
        [("No Weapons.", "Weapons Found.", "not_entailment")],
    ),
    "WNLI/train.tsv": (
        "index\tsentence1\tsentence2\tlabel\n0\tI stuck a pin.\tThe carrot had a hole.\t1\n",
        [("I stuck a pin.", "The carrot had a hole.", "1")],
    ),
    "AX/diagnostic.tsv": (
        "index\tsentence1\tsentence2\n0\tThe cat sat.\tThe cat did not.\n",
        [("The cat sat.", "The cat did not.")],
    ),
    "diagnostic/diagnostic-full.tsv": (
        "Lexical Semantics\tPredicate-Argument Structure\tLogic\tKnowledge\tDomain\tPremise\t"
        "Hypothesis\tLabel\n\t\tNegation\t\tArtificial\tThe cat sat.\tIt did not.\tcontradiction\n",
        [("The cat sat.", "It did not.", "contradiction")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE)
def test_glue_as_distributed(tmp_path, name):
    path = tmp_path / name.rpartition("/")[2]
    content, expected = GLUE[name]
    path.write_text(content, encoding="utf-8")
    labels = "label" if len(expected[0]) > 1 and "test" not in name else None
    one = "sentence1" if name.startswith(("CoLA", "SST")) else None
    fields = [f for f in ("sentence1", None if one else "sentence2", labels) if f]
    if name.startswith("AX"):
        fields = ["sentence1", "sentence2"]
    found = [tuple(record.values()) for record in records("glue", path, *fields)]
    assert found == expected
    sentences = 1 if one else 2
    documents = texts(path, format="glue")
    assert documents == ["\n".join(row[:sentences]) for row in expected]


def test_broken_lines_of_glue(tmp_path):
    path = tmp_path / "train.tsv"
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    good = "1\t2\t3\tHow?\tWhy?\t0\n"
    path.write_text(head + good + "4\t5\tcut in\n" + good)
    assert "line 3: it has 3 columns, where the first line has 6" in refused("glue", path)
    found, left_out = records("glue", path, skip=True)
    assert len(found) == 2 and left_out.broken == 1


def test_what_is_not_of_glue_is_refused(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("name\tvalue\na\tb\n")
    assert "is no file of GLUE: its first line is ['name', 'value']" in refused("glue", path)
    path.write_text(GLUE["SST-2/train.tsv"][0])
    assert 'has no "sentence2"; this file of GLUE has "sentence1", "label"' in refused(
        "glue", path, "sentence2"
    )


# SQuAD

CONTEXT = "The Normans were in Normandy, a region in France, in the 10th century."


def squad(version, **second):
    question = {
        "question": "Where is Normandy?",
        "id": "56ddde6b9a695914005b9628",
        "answers": [{"text": "France", "answer_start": CONTEXT.index("France")}] * 2,
    }
    other = {
        "question": "What is Norse?",
        "id": "5ad39d53604f3c001a3fe8d1",
        "answers": [],
    }
    if version == "v2.0":
        question["is_impossible"] = False
        other["is_impossible"] = True
        other["plausible_answers"] = [{"text": "Normans", "answer_start": 4}]
    else:
        other["answers"] = [{"answer_start": 4, "text": "Normans"}]
    other.update(second)
    paragraph = {"qas": [question, other], "context": CONTEXT}
    more = {"qas": [], "context": "Another context."}
    return {"version": version, "data": [{"title": "Normans", "paragraphs": [paragraph, more]}]}


@pytest.mark.parametrize("version", ["1.1", "v2.0"])
def test_squad_as_distributed(tmp_path, version):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(squad(version)))
    assert texts(path, format="squad") == [CONTEXT, "Another context."]
    fields = "id", "question", "answer", "impossible"
    assert [tuple(record.values()) for record in records("squad", path, *fields)] == [
        ("56ddde6b9a695914005b9628", "Where is Normandy?", "France", "false"),
        ("5ad39d53604f3c001a3fe8d1", "What is Norse?")
        + (("Normans", "false") if version == "1.1" else ("", "true")),
    ]
    streams = texts(path, format="squad", fields=("question", "answer"), parallel=True)
    assert streams[1] == (["France", "Normans"] if version == "1.1" else ["France"])


@pytest.mark.parametrize(
    "second, reason",
    [
        ({"answers": [{"text": "Normans", "answer_start": 5}]}, "its answer 'Normans' is not at"),
        ({"answers": []}, "it is not as SQuAD has it"),
        ({"answers": None}, "it is not as SQuAD has it"),
        ({"question": "a\0"}, "it has a text with a NUL character"),
    ],
)
def test_broken_questions(tmp_path, second, reason):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(squad("1.1", **second)))
    place = "question 5ad39d53604f3c001a3fe8d1 of paragraph 1"
    assert f"{path}, {place}: {reason}" in refused("squad", path, "question", "answer")
    found, left_out = records("squad", path, "question", skip=True)
    assert found == [{"question": "Where is Normandy?"}] and left_out.broken == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"data": [\n{"title": "a",}]}', "line 2: it is not JSON ("),
        (b"[]", 'is not as SQuAD is: an object with a list "data"'),
        (b'{"data": 3}', 'is not as SQuAD is: an object with a list "data"'),
        (b'{"data": [{"title": "a"}]}', 'paragraph 1: it lacks its "context" or "qas"'),
        (b'{"data": ["a"]}', 'paragraph 1: it lacks its "context" or "qas"'),
        (b'{"data": "\xff"}', "is not UTF-8 text: byte 10 is at fault"),
    ],
)
def test_what_is_not_squad_is_refused(tmp_path, content, message):
    path = tmp_path / "train.json"
    path.write_bytes(content)
    assert message in refused("squad", path)
    assert 'SQuAD has no "text"; it has "id", "title"' in refused("squad", path, "text")


# WMT: parallel plain text, TSV and TMX

ENGLISH = ["Resumption of the session", "I declare resumed the session .", "Thank you , Mr X ."]
GERMAN = ["Wiederaufnahme der Sitzungsperiode", "Ich erkläre die Sitzung", "Vielen Dank , Herr X ."]


@pytest.mark.parametrize("how", ["plain", "gz", "zst"])
def test_parallel_plain_text(tmp_path, how):
    files = tmp_path / "europarl-v7.de-en.en", tmp_path / "europarl-v7.de-en.de"
    files[0].write_text("\n".join(ENGLISH) + "\n")
    files[1].write_text("\n".join(GERMAN) + "\n", encoding="utf-8")
    source, target = (packed(path, how) for path in files)
    assert texts(source, targets=(target,)) == [ENGLISH, GERMAN]


def test_pairs_stay_together_where_a_line_is_broken_or_empty(tmp_path):
    source, target = tmp_path / "a.en", tmp_path / "a.de"
    source.write_bytes(b"one\ntwo\n\nfour\nfive\n")
    target.write_bytes(b"eins\nzw\xffi\ndrei\n \nf\xc3\xbcnf")
    assert texts(source, targets=(target,), skip=True) == [["one", "five"], ["eins", "fünf"]]
    with pytest.raises(UserError, match=rf"{target}, line 2: at byte 2 of the line it has byte"):
        texts(source, targets=(target,))


@pytest.mark.parametrize("swapped", [False, True])
def test_files_of_different_lengths_are_no_translations(tmp_path, swapped):
    long, short = tmp_path / "a.long", tmp_path / "a.short"
    long.write_text("one\ntwo\nthree\n")
    short.write_text("one\ntwo\n")
    pair = (short, long) if swapped else (long, short)
    with pytest.raises(UserError, match=rf"{long} has more lines than {short}, which has 2;"):
        texts(pair[0], targets=(pair[1],))
    with pytest.raises(UserError, match=r"data\.text has 2 file\(s\) and data\.target 1; each"):
        texts(long, short, targets=(short,))


def test_parallel_tsv(tmp_path):
    path = tmp_path / "news-commentary-v16.de-en.tsv"
    rows = [f"{g}\t{e}" for g, e in zip(GERMAN, ENGLISH, strict=True)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert texts(path, fields=("2", "1"), parallel=True) == [ENGLISH, GERMAN]


TMX = """<?xml version="1.0" encoding="{encoding}" ?>
<!DOCTYPE tmx SYSTEM "tmx14.dtd">
<tmx version="1.4">
  <header creationtool="Uplug" segtype="sentence" srclang="en" adminlang="en" datatype="unknown"/>
  <body>
    <tu tuid="1">
      <prop type="score">0.9</prop>
      <tuv xml:lang="de"><seg>Größe &amp; Gewicht</seg></tuv>
      <tuv xml:lang="en"><seg>Size &amp; weight</seg></tuv>
    </tu>
    <tu>
      <tuv xml:lang="en-GB"><seg>Click <bpt i="1">&lt;b&gt;</bpt>here<ept i="1">&lt;/b&gt;</ept>,
        <hi>please</hi></seg></tuv>
      <tuv lang="DE_de"><seg>Bitte hier<ph>{{1}}</ph> klicken</seg></tuv>
    </tu>
  </body>
</tmx>
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso-8859-1"])
@pytest.mark.parametrize("how", ["plain", "gz"])
def test_tmx(tmp_path, encoding, how):
    path = tmp_path / "books.de-en.tmx"
    path.write_text(TMX.format(encoding=encoding), encoding=encoding)
    assert texts(packed(path, how), fields=("en", "de"), parallel=True) == [
        ["Size & weight", "Click here, please"],
        ["Größe & Gewicht", "Bitte hier klicken"],
    ]
    assert texts(path, fields=("de",)) == ["Größe & Gewicht", "Bitte hier klicken"]
    assert "must name the languages" in refused("tmx", path)


def test_a_unit_without_a_language_is_broken(tmp_path):
    path = tmp_path / "a.tmx"
    path.write_text(TMX.format(encoding="utf-8").replace('"DE_de"', '"fr"'), encoding="utf-8")
    message = 'line 11: its unit has no "de"; it has "en-gb", "fr"'
    assert f"{path}, {message}; " in refused("tmx", path, "en", "de")
    found, left_out = records("tmx", path, "en", "de", skip=True)
    assert len(found) == 1 and left_out.first == [message]


@pytest.mark.parametrize(
    "change, message",
    [
        (("</tu>\n    <tu>", "</tuv>"), "line 10: it is not XML (mismatched tag)"),
        (("  </body>\n</tmx>\n", ""), "it is not XML (no element found)"),
        (("tu>", "tv>"), "it is not XML (mismatched tag)"),
    ],
)
def test_tmx_that_is_no_xml_is_refused(tmp_path, change, message):
    path = tmp_path / "a.tmx"
    path.write_text(TMX.format(encoding="utf-8").replace(*change), encoding="utf-8")
    assert message in refused("tmx", path, "en", "de")
    path.write_text("<tmx></tmx>")
    assert "has no <tu> in it, so it is no TMX file" in refused("tmx", path, "en", "de")


def test_tmx_that_unfolds_to_more_than_memory_is_refused(tmp_path):
    path = tmp_path / "a.tmx"
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 20}">' for i in range(1, 12))
    path.write_text(
        f'<!DOCTYPE tmx [<!ENTITY e0 "{"x" * 100}">{entities}]><tmx><body><tu>'
        '<tuv xml:lang="en"><seg>&e11;</seg></tuv></tu></body></tmx>'
    )
    assert "it is not XML (limit on input amplification factor" in refused("tmx", path, "en")


# CNN/DailyMail

STORY = """(CNN) -- The first paragraph of the story, in a line of its own.

The second one
goes over two lines.

@highlight

The first point

@highlight

NEW: The second point
"""


def test_stories(tmp_path):
    for number in (1, 2):
        path = tmp_path / f"{number:040x}.story"
        path.write_text(STORY, encoding="utf-8")
    article = (
        "(CNN) -- The first paragraph of the story, in a line of its own.\n"
        "The second one\ngoes over two lines."
    )
    highlights = "The first point\nNEW: The second point"
    files = tuple(sorted(tmp_path.iterdir()))
    assert texts(*files) == [article] * 2
    assert texts(*files, parallel=True) == [[article] * 2, [highlights] * 2]
    assert texts(files[0], fields=("highlights",)) == [highlights]


def test_a_story_without_highlights_has_no_summary(tmp_path):
    path = tmp_path / "a.story"
    path.write_text(STORY.partition("@")[0])
    assert len(texts(path)) == 1
    assert "its end: the story has no @highlight" in refused("story", path, "highlights")
    assert texts(path, parallel=True, skip=True) == [[], []]
    assert 'a story has no "title"; "article" or "highlights"' in refused("story", path, "title")


# What a config asks for and a file can't give


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
