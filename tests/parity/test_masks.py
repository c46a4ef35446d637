"""A sequence gives the same whether it stands alone, is padded or shares its row, in both backends:
for every kind of model and of positions. And what may not be seen has no influence at all."""

from __future__ import annotations

import numpy as np
import pytest

from horovod_lm.backend import EngineSettings, EngineState
from horovod_lm.parity.run import moved_weights
from horovod_lm.spec import ModelSpec
from tests.parity.compare import difference, within
from tests.parity.conftest import SEED
from tests.parity.matrix import AXES, SIZES
from tests.parity.reference import Reference
from tests.parity.test_matrix import without_graphs

LENGTHS = {"": (4, 6, 3), "source_": (5, 2, 4)}  # of three sequences
VARIANTS = [
    {"kind": kind, "positions": positions, "segments": 2 if positions == "learned" else 0}
    for kind in AXES["kind"]
    for positions in AXES["positions"]
] + [
    {"kind": "encoder-decoder", "positions": "rotary", "norm_placement": "post",
     "norm": "rms_norm", "key_value_heads": 2, "gated": True},
    {"kind": "encoder", "positions": "relative", "key_value_heads": 1, "pooler": True},
]  # fmt: skip
TASKS = ({"name": "label", "outputs": 3}, {"name": "tag", "outputs": 2, "over": "token"})


def name_of(variant) -> str:
    return "-".join(str(value) for value in variant.values())


@pytest.fixture(scope="module", params=VARIANTS, ids=name_of)
def model(request, backends):
    fields = SIZES | {"context": 16, "task_heads": TASKS} | request.param
    spec = ModelSpec(**fields)
    weights = moved_weights(spec, SEED)
    engines = {"reference": Reference(spec, weights)}
    with without_graphs():
        for backend, communicator in backends:
            engine = backend.engine(spec, EngineSettings(seed=SEED), communicator)
            engine.load_state(EngineState(weights))
            engines[backend.name] = engine
        yield spec, engines


def sequences(spec: ModelSpec) -> list[dict[str, np.ndarray]]:
    """Each alone, as inputs of one row."""
    generator = np.random.default_rng(9)
    found = []
    for index in range(3):
        inputs = {}
        for side, lengths in LENGTHS.items():
            if side and spec.kind != "encoder-decoder":
                continue
            shape = (1, lengths[index])
            name = "source" if side else "tokens"
            inputs[name] = generator.integers(0, spec.vocabulary, shape).astype(np.int32)
            if spec.segments:
                inputs[f"{side}segments"] = generator.integers(0, 2, shape).astype(np.int32)
        found.append(inputs)
    return found


def filled(rows: list[np.ndarray], length: int, filler: int) -> np.ndarray:
    """(B, length) of rows (1, n), each with `filler` behind."""
    wide = [np.pad(r, ((0, 0), (0, length - r.shape[1])), constant_values=filler) for r in rows]
    return np.concatenate(wide).astype(np.int32)


def padded(alone: list[dict[str, np.ndarray]], filler: int) -> dict[str, np.ndarray]:
    """One row each, with `filler` as tokens of padding; the longest source has padding too."""
    inputs = {}
    for name in alone[0]:
        rows = [one[name] for one in alone]
        length = max(row.shape[1] for row in rows) + 1
        inputs[name] = filled(rows, length, filler if name in ("tokens", "source") else 0)
        blocks = {"tokens": "blocks", "source": "source_blocks"}.get(name)
        if blocks:
            inputs[blocks] = filled([np.ones_like(row) for row in rows], length, 0)
    return inputs


def packed(alone: list[dict[str, np.ndarray]], filler: int) -> dict[str, np.ndarray]:
    """All in one row, and padding."""
    inputs = {}
    for name in alone[0]:
        rows = [one[name] for one in alone]
        length = sum(row.shape[1] for row in rows) + 2
        token = name in ("tokens", "source")
        inputs[name] = filled([np.concatenate(rows, 1)], length, filler if token else 0)
        side = "source_" if name == "source" else ""
        if token:
            blocks = [np.full_like(row, 1 + number) for number, row in enumerate(rows)]
            positions = [np.arange(row.shape[1])[None] for row in rows]
            inputs[f"{side}blocks"] = filled([np.concatenate(blocks, 1)], length, 0)
            inputs[f"{side}positions"] = filled([np.concatenate(positions, 1)], length, 0)
    return inputs


def places() -> list[tuple[int, slice]]:
    """Of each sequence in the row of the packed one."""
    ends = np.cumsum(LENGTHS[""])
    return [(0, slice(end - n, end)) for end, n in zip(ends, LENGTHS[""], strict=True)]


def test_alone_padded_and_packed_give_the_same(model):
    spec, engines = model
    alone = sequences(spec)
    for name, engine in engines.items():
        for head in ("lm", "tag"):
            expected = [engine.logits(one, head=head)[0] for one in alone]
            together = engine.logits(padded(alone, 7), head=head)
            shared = engine.logits(packed(alone, 7), head=head)
            for index, (row, part) in enumerate(places()):
                length = LENGTHS[""][index]
                apart = difference(together[index, :length], expected[index])
                within(f"logits, {name}, padded to alone", apart, 1e-5)
                apart = difference(shared[row, part], expected[index])
                within(f"logits, {name}, packed to alone", apart, 1e-5)
        expected = np.concatenate([engine.logits(one, head="label") for one in alone])
        apart = difference(engine.logits(padded(alone, 7), head="label"), expected)
        within(f"logits of a sequence, {name}, padded to alone", apart, 1e-5)


PREFIXES = (2, 4, 0)  # of the sequences


def test_prefixes_alone_padded_and_packed(model):
    """A prefix is seen by its own sequence and by no other one of the row."""
    spec, engines = model
    if "decoder" not in spec.stacks:
        pytest.skip("only a decoder has a prefix")
    alone = sequences(spec)
    plain = [engines["reference"].logits(one)[0] for one in alone]
    for inputs, prefix in zip(alone, PREFIXES, strict=True):
        inputs["prefix"] = (np.arange(inputs["tokens"].shape[1])[None] < prefix).astype(np.int32)
    expected = [engines["reference"].logits(one)[0] for one in alone]
    for prefix, one, two in zip(PREFIXES, plain, expected, strict=True):
        assert np.array_equal(one, two) == (prefix == 0)
    for name, engine in engines.items():
        together, shared = engine.logits(padded(alone, 7)), engine.logits(packed(alone, 7))
        for index, (row, part) in enumerate(places()):
            one = engine.logits(alone[index])[0]
            given = (one, together[index, : LENGTHS[""][index]], shared[row, part])
            for arranged, array in zip(("alone", "padded", "packed"), given, strict=True):
                title = f"logits with a prefix, {name}, {arranged} to reference"
                within(title, difference(array, expected[index]), 1e-5)


def test_padding_has_no_influence_at_all(model):
    spec, engines = model
    alone = sequences(spec)
    for name, engine in engines.items():
        for arrange in (padded, packed):
            one, two = (engine.logits(arrange(alone, filler)) for filler in (7, 8))
            real = arrange(alone, 7)["blocks"] > 0
            assert np.array_equal(one[real], two[real]), (name, arrange.__name__)
            assert not np.array_equal(one[~real], two[~real]), (name, arrange.__name__)


def test_a_decoder_sees_nothing_later_but_a_prefix_and_an_encoder_everything(model):
    spec, engines = model
    prefixes = (0, 3) if "decoder" in spec.stacks else (None,)
    inputs = sequences(spec)[1]
    tokens, length = inputs["tokens"], LENGTHS[""][1]
    for name, engine in engines.items():
        for prefix in prefixes:
            given = dict(inputs)
            if prefix is not None:
                given |= {"prefix": (np.arange(length)[None] < prefix).astype(np.int32)}
            before = engine.logits(given)[0]
            for changed in range(length):
                other = tokens.copy()
                other[0, changed] = (other[0, changed] + 1) % spec.vocabulary
                after = engine.logits(given | {"tokens": other})[0]
                moved = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
                first = 0 if prefix is None or changed < prefix else changed
                assert moved == [place >= first for place in range(length)], (name, changed)
