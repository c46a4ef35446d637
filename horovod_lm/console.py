"""What rank 0 prints during training: a progress bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from horovod_lm.topology import place


class TrainingConsole(AbstractContextManager["TrainingConsole"]):
    """A sink for metrics rows."""

    def __init__(self, steps: int, start: int, log_every: int) -> None:
        self._steps, self._log_every = steps, log_every
        self._tokens = self._seconds = 0.0
        self._bar: Progress | None = None
        # Under a launcher stdout may be a pseudo-terminal of the launcher's, not a person's.
        if sys.stdout.isatty() and place().launcher is None:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=Console(),
            )
            self._task = self._bar.add_task("", total=steps, completed=start)
            self._bar.start()

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def __call__(self, row: dict[str, Any]) -> None:
        if row["kind"] == "evaluation" and any(x is not None for x in row["losses"].values()):
            self.say(f"step {row['step']}: validation loss {_evaluation(row)}")
        if row["kind"] != "step":
            return
        self._tokens += row["tokens"]
        self._seconds += row["seconds"]
        if row["overflow"]:
            self.say(_skipped(row))
        loss = float("nan") if row["loss"] is None else row["loss"]
        if self._bar:
            rate = row["tokens"] / max(row["seconds"], 1e-9)
            text = f"loss {loss:.4f}, {rate:,.0f} tokens/s"
            self._bar.update(self._task, completed=row["step"], description=text)
        elif row["step"] % self._log_every == 0 or row["step"] in (1, self._steps):
            rate = self._tokens / max(self._seconds, 1e-9)
            norm = float("nan") if row["norm"] is None else row["norm"]
            self.say(
                f"step {row['step']}/{self._steps}  loss {loss:.4f}{_parts(row)}  norm {norm:.3f}  "
                f"rate {row['learning_rate']:.2e}  {rate:,.0f} tokens/s"
            )
            self._tokens = self._seconds = 0.0


def _parts(row: dict[str, Any]) -> str:
    """Each loss, where there are several."""
    losses = row.get("losses") or {}
    if len(losses) < 2:
        return ""
    shown = (f"{name} {float('nan') if x is None else x:.4f}" for name, x in losses.items())
    return f" ({', '.join(shown)})"


def _evaluation(row: dict[str, Any]) -> str:
    """The validation loss, or each of several, with what else is known of it."""
    losses, more = row["losses"], []
    for name, loss in losses.items():
        figure = f"{float('nan') if loss is None else loss:.4f}"
        parts = [f"{name} {figure}"]
        if len(losses) == 1:
            parts = [f"{figure} nats per {'token' if row['perplexities'] else 'sequence'}"]
        if loss is not None and name in row["perplexities"]:
            parts.append(f"perplexity {row['perplexities'][name] or float('inf'):.1f}")
        if row["accuracies"][name] is not None:
            parts.append(f"accuracy {100 * row['accuracies'][name]:.1f}%")
        more.append(", ".join(parts))
    if len(more) == 1:
        return more[0]
    # One that had no target leaves the sum without a meaning, and not the others.
    whole = "" if row["loss"] is None else f"{row['loss']:.4f} nats "
    return f"{whole}({'; '.join(more)})"


def _skipped(row: dict[str, Any]) -> str:
    overflow = row["overflow"]
    rank = "" if overflow["rank"] is None else f", first on rank {overflow['rank']}"
    return (
        f"step {row['step']}: skipped, the gradient overflows in {overflow['tensor']}{rank}; "
        f"loss scale was {row['loss_scale']:g}"
    )
