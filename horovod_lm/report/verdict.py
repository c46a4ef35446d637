"""The verdict of a comparison: what was found, in sentences with figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from horovod_lm.report.curves import MARGIN, MARGIN_STEPS, Curves
from horovod_lm.report.runs import Row
from horovod_lm.report.table import count, digits
from horovod_lm.statistics import LEAST_ROUNDS, Interval
from horovod_lm.variants import differing_keys

if TYPE_CHECKING:
    from horovod_lm.report.results import Comparison

# A kind of operation is named if it makes at least this share of a difference.
_NAMED, _MOST_NAMED = 0.15, 4


def make_verdict(comparison: Comparison) -> list[str]:
    """The curves, the seeds, the scaler where there is one, the speed and where it comes from."""
    if len(comparison.runs) < 2:
        return [_alone(comparison)]
    return [
        *_about_curves(comparison),
        *_about_seeds(comparison),
        *_about_scaler(comparison),
        *_about_speed(comparison),
        *_about_kinds(comparison),
    ]


def _alone(comparison: Comparison) -> str:
    run, loss = comparison.runs[0], comparison.runs[0].final_loss
    reached = "without a finite loss" if loss is None else f"to a loss of {loss:.4f} nats"
    return f"{comparison.names[0]} trained {count(run.record['steps'], 'step')}, {reached}."


def _about_curves(comparison: Comparison) -> list[str]:
    """Those that are the same in one sentence, then each that differs, then those without a
    margin."""
    same: dict[int, list[int]] = {}  # by the run that they are meant to be the same as
    apart, free, others = [], [], []
    for which in comparison.others:
        twin = comparison.twin(which)
        if twin == which:
            others.append(which)
        elif comparison.curves(which, twin) is None:
            pair = _pair(comparison, twin, which)
            apart.append(f"No step has a finite loss in {pair}, so the curves can't be compared.")
        elif comparison.same_curve(which):
            same.setdefault(twin, []).append(which)
        elif comparison.same_curve(which) is None:
            free.append(_without_margin(comparison, twin, which))
        else:
            apart.append(_differ(comparison, twin, which))
    together = [_train_the_same(comparison, twin, whiches) for twin, whiches in same.items()]
    return [*together, *apart, *free, *([_train_others(comparison, others)] if others else [])]


def _train_the_same(comparison: Comparison, twin: int, same: list[int]) -> str:
    curves = [found for which in same if (found := comparison.curves(which, twin))]
    first = comparison.names[twin]
    if len(same) == 1:
        who, differ = _capital(_pair(comparison, twin, same[0])), "differ"
    else:
        whole = len(same) == len(comparison.others)
        listed = listing([comparison.names[i] for i in (twin, *same)])
        who = f"All {len(comparison.runs)}" if whole else listed
        differ = f"differ from that of {first}"
    said = f"{differ} {_extent(curves)}"
    if not max(found.largest for found in curves):
        said = f"are equal over {count(max(found.steps[-1] for found in curves), 'step')}"
    return f"{who} train the same model: their loss curves {said}.{_hint(comparison, twin, curves)}"


def _differ(comparison: Comparison, twin: int, which: int) -> str:
    curves = comparison.curves(which, twin)
    assert curves is not None
    return (
        f"{_capital(_pair(comparison, twin, which))} differ: their loss curves are apart "
        f"{_extent([curves])}, more than the {MARGIN:.0e} nats of rounding, for the first time at "
        f"step {curves.leaves_at}.{_hint(comparison, twin, [curves])}"
    )


def _hint(comparison: Comparison, twin: int, curves: Sequence[Curves]) -> str:
    """How to learn why curves part, sooner or later."""
    in_fp32 = comparison.runs[twin].config.train.precision == "fp32"
    if not in_fp32 or max(found.largest for found in curves) <= MARGIN:
        return ""
    return " Whether rounding has grown to that shows --set train.precision=fp64."


def _without_margin(comparison: Comparison, twin: int, which: int) -> str:
    curves, precision = (
        comparison.curves(which, twin),
        comparison.runs[which].config.train.precision,
    )
    assert curves is not None
    differ = f"the loss curves of {_pair(comparison, twin, which)} differ {_extent([curves])}"
    if precision not in ("fp32", "fp64"):
        return (
            f"In {precision} {differ}; each framework rounds in its own way there, so no margin is "
            f"set."
        )
    return f"With dropout masks of their own {differ}, and no margin is set."


def _train_others(comparison: Comparison, others: list[int]) -> str:
    """Of those that are to train something else than the first."""
    keys = list(dict.fromkeys(key for which in others for key in comparison.changed(which)))
    many = listing(keys) if len(keys) <= 3 else f"{len(keys)} keys"
    first, who = comparison.names[0], listing([comparison.names[i] for i in others])
    curves = [found for which in others if (found := comparison.curves(which))]
    differ = f"; the loss curves differ {_extent(curves)}" if curves else ""
    seeds = (
        ""
        if len(comparison.seeds) > 1
        else ". Whether they end alike takes a test over several seeds: horovod-lm compare --seeds"
    )
    verb = "are" if len(others) > 1 else is_are(who)
    return f"{who} {verb} to train otherwise than {first} ({many}){differ}{seeds}."


def _extent(curves: Sequence[Curves]) -> str:
    """By how much curves are apart, at most."""
    last = max(found.steps[-1] for found in curves)
    largest, early = max(c.largest for c in curves), max(c.early for c in curves)
    if last > MARGIN_STEPS and early < largest:
        return (
            f"by up to {early:.1e} nats over the first {MARGIN_STEPS} steps and {largest:.1e} over "
            f"all {last}"
        )
    return f"by up to {largest:.1e} nats over {count(last, 'step')}"


def _about_seeds(comparison: Comparison) -> list[str]:
    """What the equivalence tests say; nothing for one seed."""
    sentences = []
    for which in comparison.others if len(comparison.seeds) > 1 else ():
        test = comparison.equivalence(which)
        pair = f"{comparison.names[which]} against {comparison.names[0]}"
        if test is None:
            sentences.append(f"A seed has no final loss, so {pair} was not tested for equivalence.")
            continue
        low, high = test.interval.low, test.interval.high
        if test.same:
            said = f"the same, within {test.margin:g} nats"
        elif low > test.margin or high < -test.margin:
            said = f"different by more than {test.margin:g} nats"
        else:
            said = f"not shown to be the same within {test.margin:g} nats"
        sentences.append(
            f"Over {len(comparison.seeds)} seeds the final loss of {pair} is {test.mean:+.1e} nats "
            f"({100 * test.interval.level:.0f}% interval {low:+.1e} to {high:+.1e}): {said}."
        )
    return sentences


def _about_scaler(comparison: Comparison) -> list[str]:
    """Whether the runs in fp16 skipped the same steps."""
    scaled = [i for i, r in enumerate(comparison.runs) if r.config.train.precision == "fp16"]
    if len(scaled) < 2:
        return []
    skipped = {i: [r["step"] for r in comparison.runs[i].steps if r["overflow"]] for i in scaled}
    first, sentences = scaled[0], []
    for other in scaled[1:]:
        if skipped[first] != skipped[other]:
            step = min(set(skipped[first]) ^ set(skipped[other]))
            pair = f"{comparison.names[first]} and {comparison.names[other]}"
            sentences.append(
                f"{pair} did not skip the same steps: step {step} overflowed in one of them only."
            )
    if sentences:
        return sentences
    who = "Both" if len(scaled) == 2 else f"All {len(scaled)}"
    if len(scaled) < len(comparison.runs) or len(scaled) > 2:
        who += " runs in fp16"
    return [f"{who} skipped the same {count(len(skipped[first]), 'step')} for overflows."]


def _about_speed(comparison: Comparison) -> list[str]:
    rounds, names = len(comparison.rounds), comparison.names
    if not comparison.slices:
        return ["Speeds were not compared: these runs did not take turns."]
    if rounds < LEAST_ROUNDS:
        return [
            f"Speeds were not compared: that takes {LEAST_ROUNDS} rounds in alternation, and there "
            f"were {rounds}."
        ]
    if len(comparison.runs) > 2:
        return _about_speeds(comparison)
    if comparison.faster is None:
        return [
            f"No speed difference shown: {names[1]} ran at {_ratio(comparison, 1, 0)} times the "
            f"speed of {names[0]} ({_interval(comparison, 1, 0)}, {rounds} rounds)."
        ]
    fast, slow = comparison.faster, 1 - comparison.faster
    return [
        f"{names[fast]} is faster: {_ratio(comparison, fast, slow)} times the speed of "
        f"{names[slow]} ({_interval(comparison, fast, slow)}, {rounds} rounds)."
    ]


def _about_speeds(comparison: Comparison) -> list[str]:
    clauses, level = [], 0.0
    for which in comparison.others:
        found = comparison.ratio(which)
        assert found is not None
        level = found[1].level
        outpaces = comparison.outpaces(which)
        word = {True: "faster", False: "slower", None: "no difference shown"}[outpaces]
        clauses.append(f"{comparison.names[which]} {found[0]:.2f} ({span(found[1])}; {word})")
    sentences = [
        f"In times the speed of {comparison.names[0]}, with {100 * level:.0f}% intervals over "
        f"{count(len(comparison.rounds), 'round')}: {', '.join(clauses)}."
    ]
    if comparison.faster is not None:
        name = comparison.names[comparison.faster]
        sentences.append(f"{name} {is_are(name)} faster than every other.")
    return sentences


def _about_kinds(comparison: Comparison) -> list[str]:
    """The kinds of operations that make a difference in speed, where there is one."""
    sentences = []
    for which in comparison.others:
        outpaces = comparison.outpaces(which)
        if outpaces is not None:
            slow, fast = (0, which) if outpaces else (which, 0)
            sentences += _why(comparison, slow, fast)
    return sentences


def _why(comparison: Comparison, slow: int, fast: int) -> list[str]:
    names, profiles = comparison.names, (comparison.profiles[slow], comparison.profiles[fast])
    if profiles[0] is None or profiles[1] is None:
        slept = [
            i for i in (slow, fast) if comparison.runs[i].profile and not comparison.profiles[i]
        ]
        return [
            f"The profile of {names[i]} says nothing: the run slept within its steps."
            for i in slept
        ]
    milliseconds = profiles[0]["step_ms"], profiles[1]["step_ms"]
    longer = milliseconds[0] - milliseconds[1]
    if longer <= 0:
        return [
            f"The profile does not say why: its steps took {digits(milliseconds[0])} ms in "
            f"{names[slow]} and {digits(milliseconds[1])} ms in {names[fast]}."
        ]
    kinds = dict.fromkeys((*profiles[0]["kinds"], *profiles[1]["kinds"]))
    gaps = {kind: kind_ms(profiles[0], kind) - kind_ms(profiles[1], kind) for kind in kinds}
    largest = sorted(gaps, key=lambda kind: -abs(gaps[kind]))[:_MOST_NAMED]
    named = [f"{k} {gaps[k]:+.1f}" for k in largest if abs(gaps[k]) >= _NAMED * longer]
    return [
        f"In the profile a step of {names[slow]} takes {digits(longer)} ms longer than one of "
        f"{names[fast]}: {', '.join(named) or 'a little in every kind'}."
    ]


def kind_ms(profile: Row, kind: str) -> float:
    """Time of a kind of operations in a step of a profile, in ms."""
    return float(profile["kinds"].get(kind, {"ms": 0.0})["ms"])


def _ratio(comparison: Comparison, which: int, to: int) -> str:
    found = comparison.ratio(which, to)
    assert found is not None
    return f"{found[0]:.2f}"


def _interval(comparison: Comparison, which: int, to: int) -> str:
    found = comparison.ratio(which, to)
    assert found is not None
    return f"{100 * found[1].level:.0f}% interval {span(found[1])}"


def span(interval: Interval) -> str:
    """Both ends of the interval of a ratio, with so many decimals that neither is rounded to 1."""
    places = 2
    ends = [end for end in (interval.low, interval.high) if end != 1]
    while places < 5 and any(round(end, places) == 1 for end in ends):
        places += 1
    return f"{interval.low:.{places}f} to {interval.high:.{places}f}"


def _pair(comparison: Comparison, first: int, second: int) -> str:
    """Both runs, as the subject of a sentence."""
    configs = [comparison.runs[i].config for i in (first, second)]
    if len(comparison.runs) == 2 and differing_keys(configs) == ["launch.backend"]:
        return "the two backends"
    return f"{comparison.names[first]} and {comparison.names[second]}"


def is_are(name: str) -> str:
    """The verb after a name: `2 ranks` is plural."""
    return "are" if name.endswith("ranks") else "is"


def _capital(text: str) -> str:
    """The beginning of a sentence; a name, which may be a folder's, stays as it is."""
    return f"The{text[3:]}" if text.startswith("the two ") else text


def listing(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
