"""What real files have that their formats' descriptions do not speak of."""

import bz2
import gzip
import io
import json
import lzma
import resource
import signal
import subprocess
import sys
import tarfile
import zipfile

import pyarrow
import pytest
from pyarrow import parquet

from horovod_lm.data import readers
from horovod_lm.data.documents import Corpus
from horovod_lm.data.readers import Faults
from horovod_lm.errors import RunFailed, UserError


def read(path, *, skip=True, **settings):
    """The documents of a file, in pairs where it is parallel, and what was left out."""
    corpus, faults = Corpus((path,), skip=skip, **settings), Faults(skip)
    streams = [[""] for _ in corpus.streams]
    for text, ends, stream in corpus.pieces(faults):
        streams[stream][-1] += text
        if ends:
            streams[stream].append("")
    found = [stream[:-1] for stream in streams]
    left_out = faults.found.get(path, readers.Found())
    return found[0] if len(found) == 1 else list(zip(*found, strict=True)), left_out


def refused(path, **settings):
    with pytest.raises(UserError) as caught:
        read(path, skip=False, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# Ends of lines

INNER = "one\rtwo\u2028three\u0085four\x0b"


def test_only_line_feeds_part_lines_of_parallel_text(write):
    source = write("a.en", f"{INNER}\r\nfive\r\n")
    target = write("a.de", f"eins\n{INNER}\n")
    assert read(source, targets=(target,))[0] == [(INNER, "eins"), ("five", INNER)]


def test_only_line_feeds_part_rows_between_tabs(write):
    rows = f"id\ttext\r\n1\t{INNER}\r\n2\tfive"
    assert read(write("a.tsv", rows))[0] == [INNER, "five"]
    rows = f"index\tsentence1\tsentence2\n0\t{INNER}\tsix\n"
    assert read(write("RTE.tsv", rows), format="glue")[0] == [f"{INNER}\nsix"]


def test_only_line_feeds_part_json_lines(write):
    text = INNER.replace("\r", "\\r").replace("\x0b", "")
    path = write("a.jsonl", f'\ufeff{{"text":\r"{text}"}}\r\n{{"text": "five"}}')
    assert read(path)[0] == [INNER.replace("\x0b", ""), "five"]


def test_the_number_of_a_line_is_that_of_other_programs(write):
    path = write("a.tsv", "text\tb\none\rtwo\tb\nthree\n")
    assert "a.tsv, line 3: it has 1 columns" in refused(path, fields=("text",))


# Long lines of CSV: whatever is cut is left out whole


@pytest.mark.parametrize(
    "row",
    [
        "2," + "x" * 200,
        '2,"' + "x" * 200 + '"',
        '2,"' + "x" * 500 + '"',
        '2,"x\ny' + "x" * 200 + '"',
        "2,x" + ",x" * 100,
    ],
)
def test_a_csv_line_that_is_too_long_is_one_broken_place(write, monkeypatch, row):
    monkeypatch.setattr(readers, "LONGEST", 100)
    path = write("a.csv", f"id,text\n1,one\n{row}\n3,three\n4,four\n")
    found, left_out = read(path)
    assert found == ["one", "three", "four"]
    assert left_out.broken == 1
    line = 3 + row.count("\n")
    assert f"line {line}: it is longer than 100 characters; break it up" in refused(path)


# What is broken is shown before what is empty


def test_broken_places_are_shown_first(write):
    rows = ['{"text": ""}'] * 5 + ["broken"] + ['{"text": " "}'] * 5 + ['{"text": 1', '{"text": 2}']
    found, left_out = read(write("a.jsonl", "\n".join(rows)))
    assert found == ["2"] and (left_out.broken, left_out.empty) == (2, 10)
    assert [text.partition(":")[0] for text in left_out.first] == ["line 6", "line 12", "line 1"]


@pytest.mark.parametrize(
    "kind, content, empty",
    [("line", "one\n\n \ntwo\n\n", 3), ("file", "", 1), ("file", " \n\n", 1), ("paragraph", "", 0)],
    ids=["line", "file", "blank file", "paragraph"],
)
def test_empty_documents_of_running_text_are_counted(write, kind, content, empty):
    found, left_out = read(write("a.txt", content), kind=kind)
    assert left_out.empty == empty and found == content.split()


# JSON


@pytest.mark.parametrize(
    "value, reason",
    [
        ("NaN", 'its field "text" is nan, not text'),
        ("-Infinity", 'its field "text" is -inf, not text'),
        ("1e999", 'its field "text" is inf, not text'),
        ("1" * 5000, "it has a number with too many digits"),
    ],
)
def test_numbers_that_are_none(write, value, reason):
    path = write("a.jsonl", f'{{"text": {value}}}\n{{"text": "b"}}\n')
    found, left_out = read(path)
    assert found == ["b"] and left_out.first == [f"line 1: {reason}"]


# Parquet


def table(path, array):
    parquet.write_table(pyarrow.table({"text": array}), path)
    return path


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary", "string_view"])
def test_columns_of_text_of_any_kind(tmp_path, kind):
    texts = ["one", "zwei ü", "one"]
    array = pyarrow.array(texts)
    if kind == "dictionary":
        array = array.dictionary_encode()
    elif kind != "string":
        array = array.cast(getattr(pyarrow, kind)())
    assert read(table(tmp_path / "a.parquet", array))[0] == texts


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_rows_that_are_not_utf8_are_broken(tmp_path, kind):
    buffers = b"\0\0\0\0\3\0\0\0\5\0\0\0\6\0\0\0", b"onea\xffb"
    array = pyarrow.StringArray.from_buffers(3, *map(pyarrow.py_buffer, buffers))
    path = table(
        tmp_path / "a.parquet", array.cast(pyarrow.binary()) if kind == "binary" else array
    )
    found, left_out = read(path)
    assert found == ["one", "b"] and left_out.broken == 1
    assert "a.parquet, row 2: it" in refused(path) and "not UTF-8; mend it" in refused(path)


def test_what_is_no_text_is_called_by_its_name(tmp_path):
    path = table(tmp_path / "a.parquet", pyarrow.array([1], pyarrow.timestamp("s")))
    assert 'its field "text" is of another kind (datetime), not text' in refused(path)
    rows = pyarrow.array([{"en": "a"}, None], pyarrow.struct([("en", pyarrow.string())]))
    path = table(tmp_path / "b.parquet", rows)
    found, left_out = read(path, fields=("text.en",))
    assert found == ["a"]
    assert left_out.first == ['row 2: its field "text.en" is null, not text']


def test_a_decompressed_copy_that_does_not_fit(tmp_path, monkeypatch):
    path = table(tmp_path / "a.parquet", pyarrow.array(["x" * 50] * 9, pyarrow.string()))
    packed = tmp_path / "a.parquet.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    # A limit on the size of files is the nearest to a full disk that needs no root.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(RunFailed, match=r"copy of .*a\.parquet\.gz does not fit into .*TMPDIR"):
            read(packed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(read(packed)[0]) == 9


# SQuAD and TMX


@pytest.mark.parametrize("qas", [None, 5, "text", {"id": 1}, [None], [{"id": "a"}]])
def test_questions_of_another_shape_are_broken(write, qas):
    good = {
        "context": "two words",
        "qas": [{"id": "1", "question": "q", "answers": [{"text": "two", "answer_start": 0}]}],
    }
    articles = [{"title": "t", "paragraphs": [{"context": "a", "qas": qas}, good]}]
    path = write("dev.json", json.dumps({"data": articles}))
    found, left_out = read(path, format="squad", fields=("question", "answer"))
    assert found == ["q\ntwo"] and left_out.broken >= 1
    assert "paragraph 1: it" in refused(path, format="squad", fields=("question",))


def tmx(*pairs, encoding="utf-8"):
    units = "".join(
        f'<tu><tuv xml:lang="en"><seg>{en}</seg></tuv>\n'
        f'<tuv xml:lang="de"><seg>{de}</seg></tuv></tu>'
        for en, de in pairs
    )
    head = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE tmx SYSTEM "tmx14.dtd">\n'
    return f'{head}<tmx version="1.4"><header/><body>{units}</body></tmx>'


def test_entities_that_only_the_dtd_might_define_are_broken(write):
    pairs = ("a&nbsp;b", "c"), ("d &amp; e", "f<ph>&shy;</ph>"), ("g", "&uuml;")
    path = write("a.tmx", tmx(*pairs))
    found, left_out = read(path, fields=("en", "de"), parallel=True)
    assert found == [("d & e", "f")] and left_out.broken == 2
    assert left_out.first[0] == "line 2: its text has &nbsp;, which the file does not define"


@pytest.mark.parametrize("encoding", ["big5", "gb18030", "no-such"])
def test_encodings_that_can_not_be_read_are_told(write, encoding):
    path = write("a.tmx", tmx(("a", "b"), encoding=encoding))
    assert "is in an encoding that can't be read here" in refused(path, fields=("en",))


def test_encodings_of_one_byte_are_read(write):
    content = tmx(("a", "„ü“"), encoding="windows-1252").encode("cp1252")
    assert read(write("a.tmx", content), fields=("de",))[0] == ["„ü“"]


# Stories


def test_an_empty_story_is_empty_and_not_broken(write):
    for content in ("", "\n", "@highlight\n\nonly a summary\n"):
        found, left_out = read(write("a.story", content), parallel=True)
        assert found == [] and (left_out.broken, left_out.empty) == (0, 1)


# How files are packed


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


SKIPPABLE = b"\x5a\x2a\x4d\x18\4\0\0\0none"  # pzstd and seekable files have such frames


@pytest.mark.parametrize(
    "content",
    [
        zstd(b"one\ntw") + zstd(b"") + zstd(b"o\n"),
        SKIPPABLE + zstd(b"one\n") + SKIPPABLE + zstd(b"two\n") + SKIPPABLE,
        gzip.compress(b"one\ntw") + gzip.compress(b"") + gzip.compress(b"o") + bytes(512),
    ],
    ids=["zstd", "skippable", "gzip"],
)
def test_files_of_several_frames_are_read_to_their_end(write, content):
    assert read(write("a.txt", content), kind="line")[0] == ["one", "two"]


def test_a_window_beyond_what_is_decoded_is_no_damage(write):
    # The head of a frame as `zstd --long=31` makes it, of unknown size: a window of 2 GiB.
    path = write("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00")
    message = refused(path)
    assert "compressed with a window that takes too much memory (zstd --long" in message


def archive(how):
    out = io.BytesIO()
    if how == "zip":
        with zipfile.ZipFile(out, "w") as packed:
            packed.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=out, mode="w:gz") as packed:
            packed.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return out.getvalue()


@pytest.mark.parametrize(
    "name, content, how",
    [
        ("a.txt.bz2", bz2.compress(b"text"), "bzip2"),
        ("a.txt.xz", lzma.compress(b"text"), "xz"),
        ("a.zip", archive("zip"), "zip"),
        ("a.tgz", archive("tar"), "tar"),
        ("a.tar.gz", archive("tar"), "tar"),
        ("a.tar", b"a.txt" + bytes(600), "tar"),
    ],
    ids=["bzip2", "xz", "zip", "tgz", "tar.gz", "tar"],
)
def test_other_archives_are_called_by_their_names(write, name, content, how):
    path = write(name, content)
    assert f"{path} is packed by {how}, which is not read here; unpack it" in refused(path)
    with pytest.raises(UserError, match="is packed by"):
        read(path, skip=True)


def test_text_that_begins_like_an_archive_is_text(write):
    assert read(write("a.txt", "BZh1 is how bzip2 begins"))[0] == ["BZh1 is how bzip2 begins"]
    assert read(write("tar.txt", "PK and tar"))[0] == ["PK and tar"]


# Names


@pytest.mark.parametrize(
    "name, packed",
    [
        ("A.JSONL", bytes),
        ("a.Jsonl.GZ", gzip.compress),
        ("a.jsonl.zstd", zstd),
        ("a.jsonl.gzip", gzip.compress),
    ],
)
def test_names_in_capitals_and_with_long_endings(write, name, packed):
    assert read(write(name, packed(b'{"text": "one"}\n')))[0] == ["one"]


def test_parquet_that_is_compressed_as_a_whole(tmp_path):
    path = table(tmp_path / "a.parquet", pyarrow.array(["one"]))
    for name in ("B.PARQUET.GZ", "b.parquet.gzip"):
        (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
        assert read(tmp_path / name)[0] == ["one"]


def test_translations_line_by_line_are_of_running_text(write):
    source, target = write("a.jsonl", '{"text": "one"}\n'), write("b.jsonl", '{"text": "eins"}\n')
    message = refused(source, targets=(target,))
    assert message.startswith(f"{source} is jsonl by its name, and data.target is for running text")
    pairs = read(source, targets=(target,), format="text")[0]
    assert pairs == [('{"text": "one"}', '{"text": "eins"}')]


# Fields that nobody would read


def test_fields_of_running_text_are_refused(write):
    path = write("README.md", "text")
    message = refused(path, fields=("title", "body"))
    assert message.startswith(f"{path} is running text, which has no fields")
    assert '"title", "body"; leave them out, set data.format, or leave such files out' in message
    other = write("a.de", "text")
    assert "data.target is running text" in refused(path, fields=("a", "b"), targets=(other,))


def test_a_label_that_a_file_for_tests_lacks(write):
    path = write("test.tsv", "index\tsentence\n0\tuneasy mishmash .\n")
    message = refused(path, format="glue", fields=("sentence1", "label"))
    assert message.endswith(
        'has no "label"; this file of GLUE has "sentence1": name those in data.fields, or leave '
        "the file out of data.text"
    )


def test_no_traceback_from_the_command(write, tmp_path):
    write("a.txt", "one\n\ntwo")
    write("my.toml", '[data]\ntext = ["a.txt"]\nfields = ["text"]\n')
    done = subprocess.run(
        [sys.executable, "-m", "horovod_lm", "prepare", str(tmp_path / "my.toml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("horovod-lm: ") and done.stderr.count("\n") == 1
