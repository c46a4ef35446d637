"""The page of a comparison: one HTML file that needs nothing else.

It holds, in `<script type="application/json" id="data">`, the values of every chart as an object:
`schema` (1); `about`, in words; `runs`, their names; `charts`, by the identity of the figure, each
with `title`, `x` and `y` (what the axes show), `values` (along x), `series` (name -> as many values
along y, null for none) and `plot` (where the page's cursor goes, null for bars). Charts of more
than 600 steps keep the least and the most of each stretch; a run's `metrics.jsonl` has all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from horovod_lm import __version__
from horovod_lm.config import to_toml
from horovod_lm.report.charts import charts
from horovod_lm.report.drawing import PALETTE
from horovod_lm.report.results import Comparison
from horovod_lm.report.runs import Row
from horovod_lm.report.table import Line, aligned, cell, count
from horovod_lm.variants import differing_keys, flat_values

SCHEMA = 1
ABOUT = (
    "charts: by identity, what its axes show (x, y), the values along x, and as many along y for "
    "each series (null: none); plot: where the cursor of the page goes. Charts of more than 600 "
    "steps keep the least and the most of each stretch; metrics.jsonl of a run has every step."
)
_FIGURE_SPACE, _POINT_SPACE = "\u2007", "\u2008"  # as wide as a digit and as a point


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page."""
    path.write_text(render_page(comparison), encoding="utf-8")


def render_page(comparison: Comparison) -> str:
    """The page as text. Whatever comes from a run is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = (
        files("horovod_lm.report").joinpath("templates/page.html").read_text(encoding="utf-8")
    )
    drawn = charts(comparison)
    data = {
        "schema": SCHEMA,
        "about": ABOUT,
        "runs": comparison.names,
        "charts": {chart.identity: chart.data for chart in drawn},
    }
    return environment.from_string(template).render(
        title=_title(comparison),
        names=comparison.names,
        palette=list(enumerate(PALETTE)),
        verdict=comparison.verdict,
        same=comparison.same,
        warnings=comparison.warnings,
        lines=_lines(comparison),
        charts=[(chart, Markup(chart.svg)) for chart in drawn],
        data=_script_json(data),
        differences=_differences(comparison),
        samples=_samples(comparison),
        print_rows=_fine_print(comparison),
        method=_method(comparison),
        toml=to_toml(comparison.runs[0].config),
    )


def _title(comparison: Comparison) -> str:
    names = comparison.names
    ranks = {run.record["ranks"] for run in comparison.runs}
    on = f" on {count(ranks.pop(), 'rank')}" if len(ranks) == 1 else ""
    who = " and ".join(names) if len(names) <= 2 else f"{len(names)} runs"
    return f"{comparison.config.name}: {who}{on}"


def _lines(comparison: Comparison) -> list[tuple[Line, list[tuple[str, str]]]]:
    """The rows of the table: the line, and for each run its value and what is compared in it."""
    lines, runs = comparison.table, len(comparison.runs)
    columns = [
        aligned([cell(line, i) for line in lines], _FIGURE_SPACE, _POINT_SPACE) for i in range(runs)
    ]
    return [
        (line, list(zip_longest(cells, ("", *line.compared), fillvalue="")))
        for line, *cells in zip(lines, *columns, strict=True)
    ]


def _script_json(values: Any) -> Markup:
    """JSON that can't end the `<script>` element it stands in."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _differences(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """The keys in which the runs' configs differ, each with its values; none where the backend
    alone does, which the names of the runs say."""
    configs = [run.config for run in comparison.runs]
    keys = differing_keys(configs)
    if keys == ["launch.backend"]:
        return []
    flat = [flat_values(config) for config in configs]
    return [(key, [_value(values[key]) for values in flat]) for key in keys]


def _value(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def _samples(comparison: Comparison) -> dict[str, Any] | None:
    """The prompt, the true text and what each run made of the prompt."""
    pairs = zip(comparison.names, comparison.runs, strict=True)
    samples = [(name, sample) for name, run in pairs if (sample := run.record.get("sample"))]
    if len(samples) < 2 or len({sample["prompt"] for _, sample in samples}) > 1:
        return None
    first = samples[0][1]
    return {
        "prompt": first["prompt"],
        "rows": [("the true text", first["truth"]), *((n, s["continuation"]) for n, s in samples)],
        "equal": len({sample["continuation"] for _, sample in samples}) == 1,
    }


def _fine_print(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the runs ran on, as rows of (word, [(run, value)]); one value for no run where all have
    the same."""
    words: dict[str, Callable[[Row], str]] = {
        "machine": lambda r: (
            f"{r['machine']['cpu']}, {r['machine']['cores']} cores, "
            f"{r['machine']['memory_gib']} GiB"
        ),
        "system": lambda r: f"{r['machine']['system']}, host {r['machine']['host']}",
        "ranks": lambda r: f"{r['ranks']}; threads of each: {r['threads']}",
        "launcher": lambda r: (
            f"{r['launcher'] or 'none'}; Horovod’s controller: {r['controller'] or 'none'}"
        ),
        "versions": lambda r: ", ".join(f"{n} {v}" for n, v in sorted(r["versions"].items())),
        "model": lambda r: f"{r['parameters']:,} parameters",
        "run": lambda r: (
            f"{count(r['steps'], 'step')}, {count(r['updates'], 'update')}, {r['state']}"
        ),
        "digest": lambda r: str(r["digest"]),
    }
    rows = []
    for word, get in words.items():
        values = [get(run.record) for run in comparison.runs]
        alike = len(set(values)) == 1
        rows.append(
            (word, [("", values[0])] if alike else list(zip(comparison.names, values, strict=True)))
        )
    return [*rows, ("written by", [("", f"horovod_lm {__version__}")])]


def _method(comparison: Comparison) -> list[str]:
    """How it was measured, in sentences."""
    turns = _method_of_turns(comparison) if comparison.slices else _method_of_past_runs()
    return [
        *turns,
        "Memory is the peak of resident memory by the end of the run; the time of a step by part "
        "is taken with synchronisation, so its sum may be more than an ordinary step takes.",
        "A loss is in nats per target token of the whole global batch. The unigram entropy is "
        "that of the validation tokens under the training counts, add-one.",
    ]


def _method_of_turns(comparison: Comparison) -> list[str]:
    seconds = [s.end - s.begin for s in comparison.slices]
    same = not any(comparison.changed(which) for which in comparison.others)
    return [
        *["All train the same run: the same initial weights, global batches, dropout masks, loss "
          "and update, from the same configuration and seed."] * same,
        f"All jobs were alive at the same time and took turns, {len(seconds)} slices of "
        f"{min(seconds):.1f} to {max(seconds):.1f} s: those whose turn it was not were stopped "
        "(SIGSTOP), so they used no processor time and did not poll. The order of the turns "
        "alternates.",
        "Tokens per second counts target tokens of all ranks by wall time, in steps that lie "
        "wholly within a turn; the first ten steps, the first whole step of a turn, evaluation, "
        "checkpoints and the synchronised steps (every tenth) are left out.",
        "A speed or a ratio is the median of the rounds, with its bootstrap interval (percentiles "
        "of resampled rounds, at levels widened for few rounds). Faster is only said of a ratio "
        "whose interval excludes 1.",
    ]  # fmt: skip


def _method_of_past_runs() -> list[str]:
    return [
        "These runs were made apart from each other, so nothing is said of which one is faster: "
        "the machine may have been busier, hotter or another one. `horovod-lm compare` lets them "
        "take turns.",
        "Tokens per second counts target tokens of all ranks by wall time; the first ten steps, "
        "evaluation, checkpoints and the synchronised steps (every tenth) are left out. It is the "
        "median over up to 30 equal stretches of the run, with its bootstrap interval.",
    ]
