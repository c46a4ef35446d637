"""Parquet files, a batch of rows at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from horovod_lm.data.readers import COMPRESSED, Faults, Record, pick, reading
from horovod_lm.errors import RunFailed, UserError

_ROWS = 256  # at once
_BLOCK = 2**20  # bytes


def read(path: Path, fields: tuple[str, ...], faults: Faults) -> Iterator[Record]:
    """A record for each row; a field is the name of a column of text, or "column.inner" in one of
    structures."""
    import pyarrow
    from pyarrow import parquet

    fields = fields or ("text",)
    with _seekable(path) as stream:
        try:
            with parquet.ParquetFile(stream) as file:
                have = file.schema_arrow.names
                columns = [name if name in have else name.split(".")[0] for name in fields]
                for name, column in zip(fields, columns, strict=True):
                    if column not in have:
                        raise UserError(
                            f'{path} has no column "{name}"; its columns are '
                            + ", ".join(f'"{column}"' for column in have)
                            + ": name those that you want in data.fields"
                        )
                number = 0
                # No threads: so memory holds one group of rows of these columns at most.
                for batch in file.iter_batches(_ROWS, columns=columns, use_threads=False):
                    for row in _rows(batch):
                        number += 1
                        if row is None:
                            faults.broken(path, f"row {number}", "it has text that is not UTF-8")
                            continue
                        try:
                            yield Record(
                                f"row {number}", {name: pick(row, name) for name in fields}
                            )
                        except ValueError as error:
                            faults.broken(path, f"row {number}", str(error))
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is no Parquet file, or is damaged ({reason})") from None


def _rows(batch: Any) -> list[dict[str, Any] | None]:
    """The rows of a batch; None for one with text that is not UTF-8, which nobody checks when it is
    written."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [row for number in range(len(batch)) for row in _rows(batch.slice(number, 1))]


def _seekable(path: Path) -> BinaryIO:
    """The file; if it is compressed as a whole, a decompressed copy that goes when it is closed."""
    if path.suffix.lower() not in COMPRESSED:
        return path.open("rb")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - closed by who asked for it
    with reading(path) as stream:
        while block := stream.read(_BLOCK):
            try:
                copy.write(block)
                copy.flush()
            except OSError as error:
                raise RunFailed(
                    f"a decompressed copy of {path} does not fit into {tempfile.gettempdir()} "
                    f"({error.strerror}); free some space there, set TMPDIR to another place, or "
                    "bring the file decompressed"
                ) from None
    copy.seek(0)
    return cast(BinaryIO, copy)
