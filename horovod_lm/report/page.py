"""The comparison page: one HTML file that needs nothing else."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from horovod_lm import __version__
from horovod_lm.config import to_toml
from horovod_lm.report.charts import charts
from horovod_lm.report.results import Comparison
from horovod_lm.report.table import aligned, cell

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
    columns = [
        aligned([cell(line, i) for line in comparison.table], _FIGURE_SPACE, _POINT_SPACE)
        for i in (0, 1)
    ]
    return environment.from_string(template).render(
        name=comparison.config.name,
        names=comparison.names,
        ranks=comparison.config.launch.ranks,
        verdict=comparison.verdict,
        same=comparison.same,
        warnings=comparison.warnings,
        lines=list(zip(comparison.table, *columns, strict=True)),
        charts=[(chart, Markup(chart.svg)) for chart in drawn],
        hover=_script_json({chart.identity: chart.hover for chart in drawn if chart.hover}),
        samples=_samples(comparison),
        print_rows=_fine_print(comparison),
        method=_method(comparison),
        toml=to_toml(comparison.config),
    )


def _script_json(values: Any) -> Markup:
    """JSON that can't end the `<script>` element it stands in."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _samples(comparison: Comparison) -> dict[str, Any] | None:
    """The prompt, the true text and what each backend made of the prompt."""
    samples = [run.record["sample"] for run in comparison.runs if run.record.get("sample")]
    if len(samples) < 2:
        return None
    return {
        "prompt": samples[0]["prompt"],
        "rows": [
            ("the true text", samples[0]["truth"]),
            *((n, s["continuation"]) for n, s in zip(comparison.names, samples, strict=True)),
        ],
        "equal": samples[0]["continuation"] == samples[1]["continuation"],
    }


def _fine_print(comparison: Comparison) -> list[tuple[str, str]]:
    """What the runs ran on, as rows of (word, value)."""
    records = [run.record for run in comparison.runs]
    machine, first = records[0]["machine"], records[0]
    versions = {**records[0]["versions"], **records[1]["versions"]}
    launch = comparison.config.launch
    return [
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"),
        ("system", f"{machine['system']}, host {machine['host']}"),
        ("ranks", f"{first['ranks']}; threads of each: {first['threads']}"),
        ("launcher", f"{launch.launcher}; Horovod’s controller was {first['controller']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))),
        ("model", f"{first['parameters']:,} parameters"),
        ("run", f"{first['steps']} steps, {first['updates']} updates; digest {first['digest']}"),
        ("written by", f"horovod_lm {__version__}"),
    ]


def _method(comparison: Comparison) -> list[str]:
    """How it was measured, in sentences."""
    seconds = [s.end - s.begin for s in comparison.slices]
    slices = (
        f"{len(seconds)} slices of {min(seconds):.1f} to {max(seconds):.1f} s" if seconds else ""
    )
    return [
        "Both backends train the same run: the same initial weights, global batches, dropout "
        "masks, loss and update, from the same configuration and seed.",
        f"Both jobs were alive at the same time and took turns, {slices}: the one whose turn it "
        "was not was stopped (SIGSTOP), so it used no processor time and did not poll. The order "
        "within a pair of turns alternates.",
        "Tokens per second counts target tokens of all ranks by wall time, in steps that lie "
        "wholly within a turn; the first ten steps, the first whole step of a turn, evaluation, "
        "checkpoints and the synchronised steps (every tenth) are left out.",
        "A speed or a ratio is the median of the rounds, with its bootstrap interval (percentiles "
        "of resampled rounds, at levels widened for few rounds). Faster is only said of a ratio "
        "whose interval excludes 1.",
        "Memory is the peak of resident memory by the end of the run; the time of a step by part "
        "is taken with synchronisation, so its sum may be more than an ordinary step takes.",
        "A loss is in nats per target token of the whole global batch. The unigram entropy is "
        "that of the validation tokens under the training counts, add-one.",
    ]
