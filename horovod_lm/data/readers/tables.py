"""Tables: CSV with quotes, TSV without, and the tasks of GLUE."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from horovod_lm.data.readers import (
    LONGEST,
    Faults,
    Line,
    Record,
    limited_lines,
    unfit,
    whole_lines,
)
from horovod_lm.errors import UserError

Rows = Iterator[tuple[int, list[str]]]  # the number of the first line of each row, and its cells


def read_csv(path: Path, fields: tuple[str, ...], faults: Faults) -> Iterator[Record]:
    """Comma-separated values (RFC 4180). Fields are names in the first row, or numbers of columns
    from 1 where there is no such row."""
    return _read(path, fields, faults, _quoted(path, faults))


def read_tsv(path: Path, fields: tuple[str, ...], faults: Faults) -> Iterator[Record]:
    """Values between tabs, in which quotes mean nothing. Fields as in `read_csv`."""
    return _read(path, fields, faults, _tabbed(path, faults))


def _read(path: Path, fields: tuple[str, ...], faults: Faults, rows: Rows) -> Iterator[Record]:
    fields = fields or ("text",)
    columns, width = None, 0
    numbered = all(name.isdecimal() for name in fields)
    for number, row in rows:
        if columns is None:
            width = len(row)
            columns = _columns(path, fields, [] if numbered else row, width)
            if not numbered:
                continue
        if len(row) != width:
            reason = f"it has {len(row)} columns, where the first line has {width}"
            faults.broken(path, f"line {number}", reason)
            continue
        record = {name: row[column] for name, column in zip(fields, columns, strict=True)}
        wrong = [why for text in record.values() if (why := unfit(text))]
        if wrong:
            faults.broken(path, f"line {number}", f"it has {wrong[0]}")
            continue
        yield Record(f"line {number}", record)


def _columns(path: Path, fields: tuple[str, ...], header: list[str], width: int) -> list[int]:
    names = header or [str(number) for number in range(1, width + 1)]
    names = [name.strip() for name in names]
    for name in fields:
        if name not in names:
            shown = ", ".join(f'"{name}"' for name in names)[:300]
            raise UserError(
                f'{path} has no column "{name}"; its columns are {shown}: name those that you want '
                "in data.fields, or count them from 1 where the first line is no header"
            )
    return [names.index(name) for name in fields]


def _tabbed(path: Path, faults: Faults) -> Rows:
    for number, line in whole_lines(path, faults):
        if line:
            yield number, line.split("\t")


def _quoted(path: Path, faults: Faults) -> Rows:
    source = limited_lines(path)
    fed: list[Line] = []  # of the row that is read

    def feed() -> Iterator[str]:
        for line in source:
            fed.append(line)
            if line.text is None:
                return  # whether it opened or closed quotes is lost, and with it the row
            yield line.text

    csv.field_size_limit(LONGEST)
    # Strict, so that an open quote is a fault and doesn't swallow the rest of the file unseen.
    reader = csv.reader(feed(), strict=True)
    while True:
        fed.clear()
        row, reason = [], ""
        try:
            row = next(reader)
        except StopIteration:
            if not fed:
                return
        except csv.Error as error:
            reason = f"it is not CSV ({error})"
        if fed and fed[-1].text is None:
            reader = csv.reader(feed(), strict=True)
        wrong = next((line for line in fed if line.reason), None)
        if wrong and wrong.reason:
            faults.broken(path, f"line {wrong.number}", wrong.reason, wrong.mend)
        elif reason:
            faults.broken(path, f"line {fed[0].number}" if fed else "its end", reason)
        elif row:
            yield fed[0].number, row


# The columns with the sentences, in any task, and those with the label, which a file for tests
# has not.
_SENTENCES = (
    ("#1 String", "#2 String"),  # MRPC
    ("question1", "question2"),  # QQP
    ("question", "sentence"),  # QNLI
    ("Premise", "Hypothesis"),  # the diagnostic set, annotated
    ("sentence1", "sentence2"),  # STS-B, MNLI, RTE, WNLI, the diagnostic set
    ("sentence",),  # SST-2, CoLA's test
)
# MNLI has the labels of single annotators before the gold one.
_LABELS = ("Quality", "is_duplicate", "score", "gold_label", "Label", "label")


def read_glue(path: Path, fields: tuple[str, ...], faults: Faults) -> Iterator[Record]:
    """The files of GLUE (Wang et al., 2019) as they are distributed: CoLA, SST-2, MRPC, QQP, STS-B,
    MNLI, QNLI, RTE, WNLI, AX; train, dev and test. The task is known by the header, CoLA by having
    none. Fields: "sentence1", "sentence2" and "label", where the file has them."""
    layout: tuple[list[int], int | None] | None = None
    width = 0
    for number, row in _tabbed(path, faults):
        if layout is None:
            width = len(row)
            layout = _glue_layout(path, row)
            if not _is_cola(row):
                continue
        if len(row) != width:
            reason = f"it has {len(row)} columns, where the first line has {width}"
            faults.broken(path, f"line {number}", reason)
            continue
        sentences, label = layout
        record = {f"sentence{i}": row[column] for i, column in enumerate(sentences, 1)}
        if label is not None:
            record["label"] = row[label]
        wanted = fields or tuple(name for name in record if name != "label")
        missing = [name for name in wanted if name not in record]
        if missing:
            raise UserError(
                f'{path} has no "{missing[0]}"; this file of GLUE has '
                + ", ".join(f'"{name}"' for name in record)
                + ": name those in data.fields, or leave the file out of data.text"
            )
        yield Record(f"line {number}", {name: record[name] for name in wanted})


def _is_cola(row: list[str]) -> bool:
    """CoLA's train and dev: source, label, the author's own mark, sentence."""
    return len(row) == 4 and row[1] in ("0", "1") and row[2] in ("", "*", "**", "?", "??", "*?")


def _glue_layout(path: Path, header: list[str]) -> tuple[list[int], int | None]:
    if _is_cola(header):
        return [3], 1
    for names in _SENTENCES:
        if all(name in header for name in names):
            label = next((name for name in _LABELS if name in header), None)
            columns = [header.index(name) for name in names]
            return columns, None if label is None else header.index(label)
    raise UserError(
        f"{path} is no file of GLUE: its first line is {header!r:.200}; known are the TSV files of "
        "CoLA, SST-2, MRPC, QQP, STS-B, MNLI, QNLI, RTE, WNLI and AX as they are distributed"
    )
