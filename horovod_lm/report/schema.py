"""The figures of a comparison for programs: `report.json`, and what `--json` prints.

`docs/report.schema.json` is its JSON Schema, as `python -m horovod_lm.report.schema` prints it;
`docs/report-json.md` says it in words.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from horovod_lm.report.curves import MARGIN, MARGIN_STEPS
from horovod_lm.statistics import Equivalence, Interval
from horovod_lm.variants import differing_keys, flat_values

if TYPE_CHECKING:
    from horovod_lm.report.results import Comparison

VERSION: Literal[2] = 2


class _Figures(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, serialize_by_alias=True
    )


class Estimate(_Figures):
    """A median over the rounds, and its bootstrap interval at `level`."""

    median: float
    low: float
    high: float
    level: float


class CurveFigures(_Figures):
    """The absolute difference of two loss curves, in nats."""

    against: str = Field(
        description="the first variant that is meant to train the same, or else the baseline"
    )
    largest: float = Field(description="over all steps")
    at: int = Field(description="the step of the largest")
    early: float = Field(description="the largest of the first steps, which the margin is for")
    same: bool | None = Field(description="within the margin; null: the two have no margin")


class DriftFigures(_Figures):
    """How far the weights have drifted apart: the norm of their difference / that of how far the
    weights of `against` have moved since their start, estimated from sketches."""

    against: str = Field(description="as of the curves")
    steps: list[int]
    layers: dict[str, list[float]] = Field(description="of each layer, and of all, by step")


class EquivalenceFigures(_Figures):
    """Two one-sided t-tests of the final loss minus the baseline's, over the seeds; nats."""

    mean: float
    low: float
    high: float
    level: float
    margin: float
    same: bool = Field(description="the whole interval lies within the margin")


class KindFigures(_Figures):
    """One kind of operation in a step of the profile."""

    ms: float
    share: float | None = Field(None, description="of the step")
    ceiling_share: float | None = Field(None, description="of what the machine can do at most")


class ProfileFigures(_Figures):
    """Where the time of the profiled steps went."""

    steps: tuple[int, int] = Field(description="the first and the last that was profiled")
    step_ms: float
    kinds: dict[str, KindFigures]


class VariantFigures(_Figures):
    """One variant. What compares it is against the baseline, and null in the baseline itself."""

    label: str = Field(description="names its folder, and its figures here")
    name: str = Field(description="as it is called in the verdict and the table")
    values: dict[str, Any] = Field(description="by key, where the variants are not all alike")
    backend: str
    changed: list[str] = Field(description="keys by which it trains something else")
    loss: float | None = Field(description="of the last step, nats per target token")
    validation_loss: float | None
    final_losses: list[float | None] = Field(description="of every seed, in order")
    curves: CurveFigures | None
    weight_drift: DriftFigures | None = Field(description="null without sketches that fit")
    equivalence: EquivalenceFigures | None = Field(description="null for fewer than two seeds")
    tokens_per_second: Estimate | None
    ratio: Estimate | None = Field(description="tokens per second / the baseline's, round by round")
    faster: bool | None = Field(description="than the baseline; null: not shown")
    step_ms: dict[str, float] | None = Field(description="mean time of a step by part")
    profile: ProfileFigures | None = Field(description="null too if the run slept within its steps")
    memory_mib: dict[str, float] | None = Field(description="largest: of one rank; sum: of all")
    seconds_to_first_step: float | None = Field(description="from the start of its job")
    first_step_seconds: float | None = Field(description="with compilation")
    run: dict[str, Any] = Field(description="its run.json")


class RoundFigures(_Figures):
    """One round, in which every variant was awake in turn."""

    number: int
    tokens_per_second: dict[str, float]


class SliceFigures(_Figures):
    """A time in which one run alone was awake; Unix times."""

    round: int
    label: str
    begin: float
    end: float
    seed: int


class LineFigures(_Figures):
    """A row of the table that people see."""

    quantity: str
    values: dict[str, float | str | None]
    compared: dict[str, str]


class Margins(_Figures):
    """What counts as the same, in nats."""

    curves: float
    curve_steps: int = Field(description="the margin of curves is for so many first steps")
    final_loss: float


class Report(_Figures):
    """A finished comparison."""

    version: Literal[2] = Field(alias="schema")
    state: Literal["finished"] = "finished"
    name: str
    verdict: list[str] = Field(description="what was found, in sentences")
    same: bool | None = Field(description="false: exit code 3; null: nothing was judged")
    faster: str | None = Field(description="the variant that is faster than every other")
    baseline: str = Field(description="the variant that the others are compared with")
    seeds: int = Field(description="runs of each variant")
    seconds_to_first_steps: float | None = Field(
        description="from the command to the first step of all variants, one after the other"
    )
    margins: Margins
    variants: list[VariantFigures]
    rounds: list[RoundFigures]
    slices: list[SliceFigures]
    table: list[LineFigures]
    warnings: list[str]
    config: dict[str, Any] = Field(description="the baseline's, resolved")


class Unfinished(_Figures):
    """A comparison that is not whole: still running, failed or stopped."""

    version: Literal[2] = Field(VERSION, alias="schema")
    state: Literal["running", "failed", "stopped"]
    message: str


def json_schema() -> str:
    """The JSON Schema of whatever `report.json` may hold, as text."""
    schema = TypeAdapter(Report | Unfinished).json_schema(mode="serialization")
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def make_report(comparison: Comparison) -> Report:
    """All figures of a comparison."""
    labels, faster = comparison.labels, comparison.faster
    every = range(len(labels))
    return Report(
        schema=VERSION,
        name=comparison.config.name,
        verdict=comparison.verdict,
        same=comparison.same,
        faster=None if faster is None else labels[faster],
        baseline=labels[0],
        seeds=len(comparison.seeds),
        seconds_to_first_steps=comparison.together,
        margins=Margins(curves=MARGIN, curve_steps=MARGIN_STEPS, final_loss=comparison.margin),
        variants=[_variant(comparison, which) for which in every],
        rounds=[
            RoundFigures(
                number=r.number, tokens_per_second=dict(zip(labels, r.speeds, strict=True))
            )
            for r in comparison.rounds
        ],
        slices=[SliceFigures(**vars(s)) for s in comparison.slices],
        table=[
            LineFigures(
                quantity=line.quantity.strip(),
                values=dict(zip(labels, line.values, strict=True)),
                compared=dict(zip(labels[1:], line.compared, strict=False)),
            )
            for line in comparison.table
        ],
        warnings=comparison.warnings,
        config=comparison.config.model_dump(mode="json"),
    )


def _variant(comparison: Comparison, which: int) -> VariantFigures:
    run, first = comparison.runs[which], which == 0
    flat = flat_values(run.config)
    keys = differing_keys([run.config for run in comparison.runs])
    profile = comparison.profiles[which]
    return VariantFigures(
        label=comparison.labels[which],
        name=comparison.names[which],
        values={key: flat[key] for key in keys},
        backend=run.backend,
        changed=comparison.changed(which),
        loss=run.record.get("loss"),
        validation_loss=run.record.get("validation_loss"),
        final_losses=[runs[which].final_loss for runs in comparison.seeds],
        curves=None if first else _curves(comparison, which),
        weight_drift=_drift(comparison, which),
        equivalence=None if first else _equivalence(comparison.equivalence(which)),
        tokens_per_second=_estimate(comparison.speed(which)),
        ratio=None if first else _estimate(comparison.ratio(which)),
        faster=None if first else comparison.outpaces(which),
        step_ms=comparison.parts[which],
        profile=profile
        and ProfileFigures(
            steps=profile["steps"], step_ms=profile["step_ms"], kinds=profile["kinds"]
        ),
        memory_mib=run.record.get("memory_mib"),
        seconds_to_first_step=comparison.starts[which] if comparison.starts else None,
        first_step_seconds=run.record.get("first_step_seconds"),
        run=run.record,
    )


def _estimate(found: tuple[float, Interval] | None) -> Estimate | None:
    if found is None:
        return None
    return Estimate(median=found[0], **vars(found[1]))


def _curves(comparison: Comparison, which: int) -> CurveFigures | None:
    against = comparison.against(which)
    found = comparison.curves(which, against)
    if found is None:
        return None
    return CurveFigures(
        against=comparison.labels[against],
        largest=found.largest,
        at=found.at,
        early=found.early,
        same=comparison.same_curve(which),
    )


def _drift(comparison: Comparison, which: int) -> DriftFigures | None:
    found = comparison.drift(which)
    if found is None:
        return None
    against = comparison.labels[comparison.against(which)]
    return DriftFigures(against=against, steps=found.steps, layers=found.layers)


def _equivalence(found: Equivalence | None) -> EquivalenceFigures | None:
    if found is None:
        return None
    return EquivalenceFigures(
        mean=found.mean, margin=found.margin, same=found.same, **vars(found.interval)
    )


if __name__ == "__main__":
    print(json_schema(), end="")
