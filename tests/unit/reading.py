"""What tests of readers share: what comes out of a file, and some documents in each format."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from horovod_lm.data.documents import READERS, Corpus
from horovod_lm.data.readers import Faults
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
