"""TensorBoard files from metrics rows, without TensorFlow."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

_STEP_TAGS = {
    "loss": "train/loss",
    "norm": "train/gradient_norm",
    "learning_rate": "train/learning_rate",
    "loss_scale": "train/loss_scale",
}


class TensorBoardLog:
    """A sink that writes one event file into `folder`. (TensorBoard's own EventFileWriter imports
    TensorFlow where that is installed, which a PyTorch run should not pay for.)"""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{os.uname().nodename}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._writer = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def __call__(self, row: dict[str, Any]) -> None:
        if row["kind"] not in ("step", "evaluation"):
            return
        if row["kind"] == "evaluation":
            values = {"validation/loss": row["loss"], "validation/perplexity": row["perplexity"]}
            values |= _by_name("validation", row)
            values |= _by_name("validation", row, "accuracy", "accuracies")
            values |= _by_name("validation", row, "perplexity", "perplexities")
        else:
            values = {tag: row[key] for key, tag in _STEP_TAGS.items()}
            values |= _by_name("train", row)
            values["train/efficiency"] = row.get("efficiency")
            values["train/tokens_per_second"] = row["tokens"] / max(row["seconds"], 1e-9)
        summary = Summary(
            value=[
                Summary.Value(tag=tag, simple_value=value)
                for tag, value in values.items()
                if value is not None
            ]
        )
        self._write(Event(wall_time=row["time"], step=row["step"], summary=summary))

    def close(self) -> None:
        """Close the file. Every event was written before; what a full disk refused was reported."""
        with suppress(OSError):
            self._file.close()

    def _write(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())
        self._file.flush()


def _by_name(
    part: str, row: dict[str, Any], what: str = "loss", key: str = "losses"
) -> dict[str, float | None]:
    """A figure of each loss, where there are several; of one alone, what is not there already."""
    found, alone = row.get(key) or {}, len(row.get("losses") or {}) == 1
    if not alone:
        return {f"{part}/{what}/{name}": value for name, value in found.items()}
    return {f"{part}/{what}": value for value in found.values() if what == "accuracy"}
