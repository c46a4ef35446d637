"""What parity found: places in order, the first one that is over its tolerance, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from horovod_lm.backend import Precision
from horovod_lm.parity import places
from horovod_lm.parity.measure import TOLERANCES, UNIT_ROUNDOFF

SCHEMA = 1
Kind = Literal["activation", "gradient", "update"]
KINDS: tuple[Kind, ...] = ("activation", "gradient", "update")


@dataclass(frozen=True)
class Place:
    """One compared thing. `name` is canonical, `quantity` says more where the name alone does not
    ("the first update, second moment"). Relative differences: `apart` between the two backends,
    `first` and `second` of each to the referee, `fp64` between both in fp64 (None: not there).
    """

    kind: Kind
    name: str
    apart: float
    tolerance: float
    quantity: str = ""
    first: float | None = None
    second: float | None = None
    fp64: float | None = None
    fp64_tolerance: float = math.inf

    @property
    def words(self) -> str:
        """The place for a person."""
        text = places.words(self.name)
        if self.kind != "activation" and self.name != "norm":
            text = f"{self.kind} of {text}"
        return f"{text} ({self.quantity})" if self.quantity else text

    @property
    def noun(self) -> str:
        """`words` within a sentence."""
        return self.words if self.kind == "activation" else f"the {self.words}"

    @property
    def share(self) -> float:
        """How much of its tolerance is used, over 1 where it is exceeded; inf where something is
        not finite."""
        shares = [self.apart / self.tolerance]
        if self.fp64 is not None:
            shares.append(self.fp64 / self.fp64_tolerance)
        return max(share if math.isfinite(share) else math.inf for share in shares)

    @property
    def hidden(self) -> bool:
        """Whether fp64 alone shows that the backends differ: rounding hides it otherwise."""
        return self.share > 1 and self.apart <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        """Figures that are not finite become null."""
        figures = {
            "apart": self.apart,
            "first_to_referee": self.first,
            "second_to_referee": self.second,
            "fp64_apart": self.fp64,
        }
        return {
            "kind": self.kind,
            "name": self.name,
            "quantity": self.quantity,
            "words": self.words,
            "layer": places.layer(self.name),
            **{k: v if v is not None and math.isfinite(v) else None for k, v in figures.items()},
            "tolerance": self.tolerance,
            "fp64_tolerance": None if self.fp64 is None else self.fp64_tolerance,
            "over": self.share > 1,
        }


@dataclass(frozen=True)
class Result:
    """A finished parity. `backends` are the names of the two; the first one's results, or its fp64
    results (`referee`: whose they are, None without), are what the other is judged against.
    `setting` tells how it was measured; `left_out` what could not be compared, and why."""

    backends: tuple[str, str]
    precision: Precision
    places: Sequence[Place]
    referee: str | None = None
    setting: dict[str, Any] = field(default_factory=dict)
    left_out: Sequence[str] = ()

    @property
    def first(self) -> Place | None:
        """The first place over its tolerance, in order of computation: forward, backward (from
        the output back), update."""
        return next((place for place in self.places if place.share > 1), None)

    @property
    def same(self) -> bool:
        """Whether everything that was compared is within its tolerance."""
        return self.first is None

    def tolerance(self, kind: Kind) -> float:
        """What is allowed of places of a kind; of changes of weights, their rounding comes on
        top."""
        return float(getattr(TOLERANCES[self.precision], kind))

    def layers(self, kind: Kind) -> list[tuple[str, list[Place]]]:
        """The places of one kind by layer, layers in the order in which they come."""
        found: dict[str, list[Place]] = {}
        for place in self.places:
            if place.kind == kind:
                found.setdefault(places.layer(place.name), []).append(place)
        return list(found.items())

    @property
    def verdict(self) -> list[str]:
        """In words: the same or not and where first, then which one is further from fp64, then
        what was left out."""
        sentences = [self._same() if self.first is None else self._differ(self.first)]
        sentences += self._referee()
        return sentences + [f"Not compared: {text}." for text in self.left_out]

    def _same(self) -> str:
        one, other = self.backends
        nearest = max(self.places, key=lambda place: place.share)
        return (
            f"The same: in {self.precision} all {len(self.places)} compared places of {other} are "
            f"within tolerance of {one}; nearest to it is {nearest.noun}, at "
            f"{nearest.share:.0%} of what is allowed."
        )

    def _differ(self, first: Place) -> str:
        one, other = self.backends
        before = self.places[: self.places.index(first)]
        kinds = {place.kind for place in before}
        agree = [f"{kind}s" for kind in KINDS if kind in kinds and kind != first.kind]
        order = ", from the output back," if first.kind == "gradient" else ""
        if first.hidden:
            figure = (
                f"{_figure(first.fp64)} in fp64, allowed {first.fp64_tolerance:.1e}; in "
                f"{self.precision} rounding hides it ({_figure(first.apart)})"
            )
        else:
            figure = f"{_figure(first.apart)}, allowed {first.tolerance:.1e}"
        sentences = [
            f"{other} and {one} differ.",
            f"All {' and '.join(agree)} agree." if agree else "",
            f"The first {first.kind} over its tolerance{order} is {first.noun}: {figure}.",
        ]
        if first.kind == "gradient" and "gradient" not in kinds:
            sentences.append(
                "It is the first of all, so look at the loss too: weights, normaliser, loss scale."
            )
        over = sum(place.share > 1 for place in self.places)
        sentences.append(f"{over} of {len(self.places)} places are over.")
        return " ".join(filter(None, sentences))

    def _referee(self) -> list[str]:
        if self.referee is None:
            return []
        parts = []
        for kind in KINDS:
            found = [p for p in self.places if p.kind == kind and p.first is not None]
            if found:
                distances = [
                    max(_order(p.first) for p in found),
                    max(_order(p.second) for p in found),
                ]
                names = self.backends if distances[0] >= distances[1] else self.backends[::-1]
                far, near = max(distances), min(distances)
                parts.append(f"{names[0]} in {kind}s ({_figure(far)}, {names[1]} {_figure(near)})")
        sentences = [f"Further from the fp64 result of {self.referee}: {', '.join(parts)}."]
        different = [
            p for p in self.places if p.fp64 is not None and not p.fp64 <= p.fp64_tolerance
        ]
        if different:
            sentences.append(
                "In fp64 both differ as well, so it is not a matter of rounding: the two compute "
                f"something else, first at {different[0].words} ({_figure(different[0].fp64)})."
            )
        elif self.first is not None and self.first.fp64 is not None:
            sentences.append(
                "In fp64 both agree there, so the formula is the same and its rounding is not."
            )
        return sentences

    def as_json(self) -> dict[str, Any]:
        """Everything, for a program; `docs/parity.md` describes it."""
        return {
            "schema": SCHEMA,
            "backends": list(self.backends),
            "precision": self.precision,
            "unit_roundoff": UNIT_ROUNDOFF[self.precision],
            "tolerances": {kind: self.tolerance(kind) for kind in KINDS},
            "referee": self.referee,
            "setting": self.setting,
            "same": self.same,
            "first": None if self.first is None else self.first.as_json(),
            "verdict": self.verdict,
            "left_out": list(self.left_out),
            "places": [place.as_json() for place in self.places],
        }


def _order(value: float | None) -> float:
    """For `max`, which a nan would confuse."""
    return value if value is not None and math.isfinite(value) else math.inf


def _figure(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.1e}"
