"""Global batches of every objective and every way to fill rows, on any number of ranks."""

import numpy as np
import pytest

from horovod_lm.config import make_config
from horovod_lm.data.batches import Batches, validation_batches
from horovod_lm.errors import UserError
from horovod_lm.objectives.registry import (
    factors,
    loss_names,
    make_feeds,
    prompt_begin,
    prompt_is_prefix,
)
from tests.helpers import on_ranks
from tests.numpy_backend import NumpyEngine
from tests.unit.texts import (
    BEGIN,
    CLASSIFY,
    END,
    MASK,
    SENTINELS,
    SEPARATE,
    VOCABULARY,
    Words,
    corpus,
)

CONTEXT = 64
BATCH = 11
SPLITS = [(1, None), (1, 3), (2, None), (2, 2), (4, None), (4, 1)]
ENCODER = {"kind": "encoder", "segments": 2, "pooler": True}
BOTH = {"kind": "encoder-decoder"}
BERT = [{"name": "masked_lm", "on": "next_sentence"}, {"name": "next_sentence"}]

OBJECTIVES = {
    "causal_lm": ({}, [{"name": "causal_lm"}]),
    "prefix_lm": ({}, [{"name": "prefix_lm"}]),
    "both decoders'": (
        {},
        [{"name": "causal_lm", "share": 3, "schedule": [[5, 1.0], [12, 0.0]]},
         {"name": "prefix_lm", "weight": 0.25}],
    ),
    "masked_lm": (ENCODER, [{"name": "masked_lm"}]),
    "whole words": (ENCODER, [{"name": "masked_lm", "whole_words": True}]),
    "next_sentence": (ENCODER, BERT),
    "sentence_order": (ENCODER, [{"name": "sentence_order"}]),
    "separate rows": (ENCODER, [{"name": "masked_lm"}, {"name": "next_sentence", "weight": 0.5}]),
    "span_corruption": (BOTH, [{"name": "span_corruption", "smoothing": 0.1, "z_loss": 1e-4}]),
    "denoising": (BOTH, [{"name": "denoising"}]),
    "sequence_to_sequence": (BOTH, [{"name": "sequence_to_sequence", "source": "pairs"}]),
    "three": (
        BOTH,
        [{"name": "span_corruption"}, {"name": "denoising"},
         {"name": "sequence_to_sequence", "source": "pairs"}],
    ),
}  # fmt: skip
KINDS = ("windows", "packed", "buckets")
PACKED_REFUSES = ("next_sentence", "sentence_order", "separate rows")
CASES = [
    (kind, name)
    for kind in KINDS
    for name in OBJECTIVES
    if kind != "packed" or name not in PACKED_REFUSES
]
CORPORA = [corpus(150), corpus(60, seed=5, name="other"), corpus(80, 9, "pairs", parallel=True)]


def configured(
    kind="windows", model=None, objectives=(), *, batch=BATCH, seed=3, data=None, **batching
):
    return make_config(
        {
            "model": {"width": 8, "heads": 1, "context": CONTEXT, **(model or {})},
            "data": {"vocabulary": VOCABULARY, **(data or {})},
            "batching": {"kind": kind, **batching},
            "objective": [dict(table) for table in objectives],
            "train": {"global_batch_size": batch, "seed": seed},
        },
        "the test",
    )


def case(kind, name, **options):
    model, objectives = OBJECTIVES[name]
    return configured(kind, model, objectives, **options)


def batches(config, ranks=1, micro=None, corpora=CORPORA, split="train"):
    return [
        Batches(
            make_feeds(config, corpora, Words(), split),
            micro_batch_size=micro,
            rank=rank,
            ranks=ranks,
            factors=lambda step: factors(config, step),
        )
        for rank in range(ranks)
    ]


def content(micro, i):
    """What is in row `i` of a micro-batch, losses included, as bytes."""
    found = {name: array[i].tobytes() for name, array in micro.inputs.items()}
    for loss in micro.losses:
        # Silent losses of other objectives have no weight, and no targets.
        parts = (loss.targets[i], loss.weights[i])
        if loss.positions is not None:
            parts += (loss.positions[i],)
        found[loss.name] = b"".join(np.asarray(part).tobytes() for part in parts)
        found[f"{loss.name} in all"] = (loss.normaliser, loss.factor, loss.smoothing, loss.z_loss)
    return found


def assembled(all_ranks, step):
    """Rows of the global batch by their numbers, and the sums of weights."""
    rows, sums, empty = {}, {}, 0
    taken = [one[step] for one in all_ranks]
    for batch in taken:
        for micro in batch.micros:
            for loss in micro.losses:
                sums[loss.name] = sums.get(loss.name, 0.0) + float(loss.weights.sum())
            for i, row in enumerate(micro.rows.tolist()):
                assert row not in rows
                rows[row] = content(micro, i)
                if not micro.inputs["tokens"][i].any():
                    assert not any(np.asarray(loss.weights[i]).any() for loss in micro.losses)
                    empty += 1
    assert len({(b.targets, b.real, b.computed, str(b.factors)) for b in taken}) == 1
    return rows, sums, empty, taken[0]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_ranks_and_micro_batches_see_the_same_global_batches(kind, name):
    config = case(kind, name)
    whole = batches(config)
    for ranks, micro in SPLITS:
        split = batches(config, ranks, micro)
        for step in (0, 1, 50):
            expected, sums, _, one = assembled(whole, step)
            rows, others, empty, batch = assembled(split, step)
            count = len(expected)
            assert {row: rows[row] for row in range(count)} == expected
            assert len(rows) - count == empty
            assert others == sums  # of weights that are whole numbers
            assert (batch.targets, batch.real, batch.computed) == (
                one.targets, one.real, one.computed,
            )  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_normalisers_are_the_weight_sums_of_the_global_batch(kind, name):
    config = case(kind, name)
    (one,) = batches(config)
    names = loss_names(config)
    for step in range(4):
        _, sums, _, batch = assembled([one], step)
        assert tuple(sums) == names
        for micro in batch.micros:
            assert tuple(loss.name for loss in micro.losses) == names
            for loss in micro.losses:
                assert loss.normaliser == sums[loss.name] > 0
        heads = {loss.name: loss.head for loss in batch.micros[0].losses}
        tokens = [total for name, total in sums.items() if heads[name] == "lm"]
        assert batch.targets == int(sum(tokens or sums.values()))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_real_and_computed_tokens_are_those_of_the_arrays(kind, name):
    (one,) = batches(case(kind, name))
    for step in range(4):
        batch = one[step]
        computed = sum(
            micro.inputs[stream].size
            for micro in batch.micros
            for stream in ("tokens", "source")
            if stream in micro.inputs
        )
        assert batch.computed == computed
        assert 0 < batch.real <= computed
        if kind == "packed":
            real = sum(
                int((micro.inputs[blocks] > 0).sum())
                for micro in batch.micros
                for blocks in ("blocks", "source_blocks")
                if blocks in micro.inputs
            )
            assert batch.real == real


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_run_goes_on_from_one_integer(kind, name):
    config = case(kind, name)
    (old,), (new,) = batches(config), batches(config)
    with new.ahead(7) as stream:
        for step in range(7, 12):
            given, expected = next(stream), old[step]
            for one, two in zip(given.micros, expected.micros, strict=True):
                assert np.array_equal(one.rows, two.rows)
                for i in range(len(one.rows)):
                    assert content(one, i) == content(two, i)
    other = batches(case(kind, name, seed=4))[0][7]
    rows = [content(batch.micros[0], 0) for batch in (other, old[7])]
    assert rows[0] != rows[1]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_micro_batches_have_the_same_arrays_at_every_step(kind, name):
    config = case(kind, name)
    ranks = batches(config, 2, 2)
    kinds = [set() for _ in range(100)]
    for step in range(12):
        for one in ranks:
            for index, micro in enumerate(one[step].micros):
                place = 0 if kind == "buckets" else index
                shapes = {key: array.shape for key, array in micro.inputs.items()}
                assert all(array.dtype == np.int32 for array in micro.inputs.values())
                for loss in micro.losses:
                    assert loss.targets.dtype == np.int32 and loss.weights.dtype == np.float32
                    assert loss.targets.shape == loss.weights.shape
                    if loss.positions is not None:
                        assert loss.positions.shape == loss.targets.shape
                names = tuple(sorted(shapes)), tuple(loss.name for loss in micro.losses)
                kinds[place].add(names if kind == "buckets" else str((shapes, names)))
    objectives = sum("on" not in table for table in OBJECTIVES[name][1])
    assert all(len(found) <= (objectives if kind == "buckets" else 1) for found in kinds)


def every_row(config, split="train"):
    """Rows of one epoch of the first feed."""
    feed = make_feeds(config, CORPORA[:1], Words(), split)[0]
    return feed.evenly(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["causal_lm", "masked_lm", "span_corruption"])
def test_an_epoch_has_every_example_once(kind, name):
    config = case(kind, name, batch=7)
    (feed,) = make_feeds(config, CORPORA[:1], Words(), "train")
    wanted = len(feed.objectives[0].lengths)
    seen, step = {}, 0
    while len(seen) < wanted or step < 20:
        part = feed.part(step)
        for example, epoch in zip(part.rows.examples, part.epochs, strict=True):
            seen.setdefault(int(example), []).append(int(epoch))
        step += 1
        assert step < 1000
    for epochs in seen.values():
        assert epochs == list(range(len(epochs)))


def test_packed_rows_hold_whole_examples_in_blocks():
    config = case("packed", "causal_lm")
    text = CORPORA[0].tokens
    found = []
    for part in every_row(config):
        kinds = {kind.name: kind for kind in part.feed.losses}
        micro = part.micro_batch(
            list(range(len(part))), np.arange(len(part)), kinds, {"lm": 1.0}, {"lm": 1.0}
        )
        (loss,) = micro.losses
        blocks, positions = micro.inputs["blocks"], micro.inputs["positions"]
        assert np.array_equal(blocks > 0, loss.weights > 0)
        for row in range(len(part)):
            numbers = blocks[row][blocks[row] > 0]
            assert np.array_equal(np.unique(numbers), np.arange(1, numbers.max() + 1))
            assert (np.diff(numbers) >= 0).all()
            for number in range(1, numbers.max() + 1):
                mine = blocks[row] == number
                assert np.array_equal(positions[row][mine], np.arange(mine.sum()))
                targets, tokens = loss.targets[row][mine], micro.inputs["tokens"][row][mine]
                assert np.array_equal(tokens[1:], targets[:-1])
                found.append(targets)
    everything = np.sort(np.concatenate(found))
    assert np.array_equal(everything, np.sort(text.read(0, len(text))))


@pytest.mark.parametrize("name", ["masked_lm", "span_corruption", "prefix_lm", "denoising"])
def test_packed_targets_are_where_the_single_examples_have_them(name):
    config = case("packed", name)
    (part,) = every_row(config)
    (objective,) = part.feed.objectives
    kinds = {kind.name: kind for kind in part.feed.losses}
    (label,) = kinds
    micro = part.micro_batch(
        list(range(len(part))), np.arange(len(part)), kinds, {label: 1.0}, {label: 1.0}
    )
    (loss,) = micro.losses
    blocks = micro.inputs["blocks"]
    for row in range(len(part)):
        start, stop = part.rows.bounds[row : row + 2]
        for number, index in enumerate(range(start, stop), start=1):
            example = objective.example(int(part.rows.examples[index]), 0)
            mine = np.flatnonzero(blocks[row] == number)
            for stream, array in example.inputs.items():
                inside = mine
                if stream == "source":
                    inside = np.flatnonzero(micro.inputs["source_blocks"][row] == number)
                assert np.array_equal(micro.inputs[stream][row][inside], array)
            targets = example.targets[label]
            if loss.positions is None:
                places = mine[0] + int(targets.places) + np.arange(len(targets.values))
                given = loss.targets[row][places]
                assert loss.weights[row][places].all()
            else:
                used = loss.weights[row] > 0
                inside = used & np.isin(loss.positions[row], mine)
                assert np.array_equal(loss.positions[row][inside], mine[0] + targets.places)
                given = loss.targets[row][inside]
            assert np.array_equal(given, targets.values)
    assert loss.weights.sum() == part.sums()[label]


def test_efficiency_of_packing_and_of_buckets():
    texts = [corpus(3000)]
    efficiency = {}
    for kind in KINDS:
        (one,) = batches(case(kind, "masked_lm", batch=16), corpora=texts)
        sums = np.sum([[one[step].real, one[step].computed] for step in range(60)], axis=0)
        efficiency[kind] = sums[0] / sums[1]
    assert efficiency["windows"] == 1
    assert efficiency["packed"] > 0.97
    assert efficiency["buckets"] > 0.85


def test_buckets_keep_to_their_budget():
    config = case("buckets", "masked_lm", tokens=512, buckets=5)
    (one,) = batches(config, corpora=CORPORA[:1])
    shapes = set()
    for step in range(80):
        batch = one[step]
        (micro,) = batch.micros
        rows, length = micro.inputs["tokens"].shape
        shapes.add(length)
        assert rows * length <= 512
        assert length <= CONTEXT
    assert len(shapes) == 5
    # A micro-batch of rows that are short has more of them.
    (cut,) = batches(config, micro=2, corpora=CORPORA[:1])
    for step in range(80):
        for micro in cut[step].micros:
            assert micro.inputs["tokens"].size <= 2 * CONTEXT


def test_decoders_need_no_blocks_for_padding_and_encoders_do():
    names = {}
    for name in ("causal_lm", "prefix_lm", "masked_lm", "span_corruption", "next_sentence"):
        for kind in ("windows", "buckets"):
            (one,) = batches(case(kind, name))
            names[name, kind] = set(one[0].micros[0].inputs)
    assert names["causal_lm", "windows"] == names["causal_lm", "buckets"] == {"tokens"}
    assert names["prefix_lm", "buckets"] == {"tokens", "prefix"}
    assert names["masked_lm", "windows"] == {"tokens"}
    assert names["masked_lm", "buckets"] == {"tokens", "blocks"}
    assert names["next_sentence", "windows"] == {"tokens", "blocks", "segments"}
    assert names["span_corruption", "windows"] == {"source", "tokens"}
    assert names["span_corruption", "buckets"] == {"source", "source_blocks", "tokens"}


def test_several_corpora_come_in_their_shares():
    config = case("windows", "causal_lm", batch=64)
    (feed,) = make_feeds(config, CORPORA, Words(), "train")
    sizes = np.array([len(one.tokens) for one in CORPORA])
    drawn = np.concatenate([feed.part(step).sources for step in range(200)])
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    assert np.abs(shares - sizes / sizes.sum()).max() < 0.02
    texts = [feed.objectives[i] for i in (0, 1, 2)]
    assert len({id(text) for text in texts}) == 3
    for kind in ("packed", "buckets"):
        (feed,) = make_feeds(case(kind, "causal_lm", batch=64), CORPORA, Words(), "train")
        found = {int(s) for step in range(60) for s in np.unique(feed.part(step).sources)}
        assert found == {0, 1, 2}


def test_rows_are_dealt_to_objectives_by_share():
    (one,) = batches(case("windows", "both decoders'", batch=16))
    first, second = one[0].micros
    assert (len(first.rows), len(second.rows)) == (12, 4)
    assert first.rows.tolist() == list(range(12)) and second.rows.tolist() == [12, 13, 14, 15]
    assert set(first.inputs) == {"tokens"} and set(second.inputs) == {"tokens", "prefix"}
    # The loss of the other objective is there, at one place of weight 0.
    silent = first.losses[1]
    assert silent.name == "prefix_lm" and silent.weights.shape == (12, 1)
    assert (
        not silent.weights.any() and silent.normaliser == one[0].micros[1].losses[1].weights.sum()
    )


def test_weights_of_losses_follow_their_schedules():
    objectives = [
        {"name": "causal_lm", "schedule": [[10, 1.0], [20, 0.5], [20_000, 0.0]]},
        {"name": "prefix_lm", "weight": 0.25},
    ]
    config = configured(objectives=objectives)
    found = [factors(config, step)["lm"] for step in (0, 10, 15, 20, 10_010, 20_000, 10**6)]
    assert found == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0, 0])
    assert factors(config, 7)["prefix_lm"] == 0.25
    (one,) = batches(config)
    micro = one[15].micros[0]
    assert [loss.factor for loss in micro.losses] == pytest.approx([0.75, 0.25])
    assert one[15].factors == {"lm": pytest.approx(0.75), "prefix_lm": 0.25}


def test_smoothing_and_z_loss_reach_the_loss():
    (one,) = batches(case("windows", "span_corruption"))
    (loss,) = one[0].micros[0].losses
    assert (loss.smoothing, loss.z_loss) == (0.1, 1e-4)


def first_objective(model, objectives, corpora=CORPORA, split="train", **options):
    """What the config's first objective with rows of its own makes of the first corpus."""
    feeds = make_feeds(configured("windows", model, objectives, **options), corpora, Words(), split)
    return feeds[0].objectives[0]


def examples(objective, epochs=1):
    for epoch in range(epochs):
        for number in range(len(objective.lengths)):
            yield objective.example(number, epoch)


@pytest.mark.parametrize("on", [None, "next_sentence"])
def test_options_of_masks_reach_the_objective(on):
    table = {"name": "masked_lm", "probability": 0.4, "masked": 0.1, "randomised": 0.7}
    objectives = [{**table, "on": on}, {"name": on}] if on else [table]
    kinds, candidates = np.zeros(3), 0
    for example in examples(first_objective(ENCODER, objectives), 5):
        tokens, targets = example.inputs["tokens"], example.targets["masked_lm"]
        put = tokens[targets.places]
        same = put == targets.values
        kinds += [(put == MASK).sum(), (~same & (put != MASK)).sum(), same.sum()]
        candidates += (~np.isin(tokens, [CLASSIFY, SEPARATE, END])).sum()
    assert np.abs(kinds / kinds.sum() - [0.1, 0.7, 0.2]).max() < 2 / np.sqrt(kinds.sum())
    assert kinds.sum() / candidates == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize(
    ("name", "sign", "lengths", "signs"),
    [
        # Of 63 tokens 32 are taken out, one by one where it goes: of 31 that stay T5 makes no more
        # than 31 spans, and BART's have 32 gaps around these.
        ("span_corruption", SENTINELS, [31 + 31 + 1, 32 + 31 + 1], 31),
        ("denoising", MASK, [31 + 32 + 1, 63 + 1], 32),
    ],
)
def test_options_of_spans_reach_the_objective(name, sign, lengths, signs):
    objective = first_objective(BOTH, [{"name": name, "density": 0.5, "mean_span": 1.0}])
    assert (objective.pieces.lengths == 63).all()
    assert (objective.lengths == lengths).all()
    for example in examples(objective):
        source, targets = example.inputs["source"], example.targets[name].values
        assert [len(source), len(targets)] == lengths
        assert np.isin(source, sign).sum() == signs


@pytest.mark.parametrize("permute", [False, True])
def test_whether_sentences_are_permuted_reaches_the_objective(permute):
    table = {"name": "denoising", "density": 1e-3, "permute": permute}
    found = [
        np.array_equal(example.inputs["source"], example.targets["denoising"].values)
        for example in examples(first_objective(BOTH, [table]))
    ]
    assert np.mean(found) < 0.5 if permute else all(found)


def test_sentence_order_has_the_text_of_one_document_and_next_sentence_that_of_others():
    same = {}
    for name in ("next_sentence", "sentence_order"):
        objective = first_objective(ENCODER, [{"name": name}])
        text = CORPORA[0].tokens
        same[name] = {0: [], 1: []}
        for number in range(len(objective.lengths)):
            example = objective.example(number, 0)
            tokens = example.inputs["tokens"]
            tokens = tokens[~np.isin(tokens, [CLASSIFY, SEPARATE])]
            start, length = objective.pieces.starts[number], objective.pieces.lengths[number]
            whole = text.read(int(start), int(length))
            same[name][int(example.targets[name].values[0])].append(
                np.array_equal(np.sort(tokens), np.sort(whole))
            )
    assert all(same["next_sentence"][0]) and not any(same["next_sentence"][1])
    assert all(same["sentence_order"][0]) and all(same["sentence_order"][1])


@pytest.mark.parametrize(
    "name",
    ["prefix_lm", "masked_lm", "next_sentence", "sentence_order", "span_corruption", "denoising"],
)
def test_what_is_drawn_depends_on_the_seed_the_split_and_the_corpus(name):
    model, objectives = OBJECTIVES[name]

    def drawn(**options):
        found = [
            b"".join(array.tobytes() for array in example.inputs.values())
            for example in examples(first_objective(model, objectives, **options))
        ]
        return np.array(found, dtype=object)

    one = drawn()
    assert (drawn() == one).all()
    for other in ({"seed": 4}, {"split": "validation"}, {"corpora": [corpus(150, name="b")]}):
        # Two draws may be alike, as of a short prefix or of a document of one sentence.
        assert np.mean(drawn(**other) == one) < 0.6, other


def test_weights_and_temperature_make_the_shares_of_corpora():
    sources = [
        {"name": "corpus", "text": ["a.txt"], "weight": 4.0}, {"name": "other", "text": ["b.txt"]},
    ]  # fmt: skip
    one, two = (len(part.tokens) for part in CORPORA[:2])
    for temperature in (1.0, 3.0):
        config = configured(data={"sources": sources, "temperature": temperature})
        (feed,) = make_feeds(config, CORPORA[:2], Words(), "train")
        ratio = (4.0 * one / two) ** (1 / temperature)
        shares = feed.mixer.counts / feed.mixer.counts.sum()
        assert shares == pytest.approx([ratio / (1 + ratio), 1 / (1 + ratio)], abs=1e-3)


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("windows", [0, 5])
def test_validation_is_the_same_on_any_number_of_ranks(kind, name, windows):
    config = case(kind, name)
    results = []
    for ranks in (1, 3):
        rows, sums = set(), {}
        for rank in range(ranks):
            feeds = make_feeds(config, CORPORA, Words(), "validation")
            for micro in validation_batches(feeds, rows=4, windows=windows, rank=rank, ranks=ranks):
                assert len(micro.rows) == len(set(micro.rows.tolist())) == 4
                for i in range(4):
                    if any(np.asarray(loss.weights[i]).any() for loss in micro.losses):
                        rows.add(str(sorted(content(micro, i).items())))
                for loss in micro.losses:
                    sums[loss.name] = sums.get(loss.name, 0) + float(loss.weights.sum())
                    normaliser = {loss.name: loss.normaliser}
                    assert normaliser[loss.name] > 0
        results.append((rows, sums))
    assert results[0] == results[1]
    assert tuple(results[0][1]) == loss_names(config)


@pytest.mark.parametrize("name", ["causal_lm", "prefix_lm", "both decoders'"])
def test_a_prompt_begins_as_the_texts_that_were_trained_on(name):
    for kind in ("packed", "buckets"):
        for words, begin in ((Words(), BEGIN), (Words(special={}), END)):
            config = case(kind, name)
            assert prompt_begin(config, words) == begin
            (feed, *_) = make_feeds(config, CORPORA[:1], words, "train")
            (first, *_) = np.flatnonzero(feed.objectives[0].pieces.starts == 0)
            assert feed.objectives[0].example(int(first), 0).inputs["tokens"][0] == begin
    config = case("windows", name)
    assert prompt_begin(config, Words()) is None
    assert prompt_is_prefix(config) == (name == "prefix_lm")


def test_what_is_missing_is_said():
    for model, objectives, message in [
        (
            {"kind": "encoder"},
            [],
            r'causal_lm, the default objective, needs model.kind = "decoder"',
        ),
        ({}, [{"name": "causal_lm", "source": "none"}], 'no source "none"'),
        (BOTH, [{"name": "sequence_to_sequence"}], "needs parallel text, and corpus has"),
    ]:
        with pytest.raises(UserError, match=message):
            make_feeds(configured(model=model, objectives=objectives), CORPORA, Words(), "train")
    with pytest.raises(UserError, match="is less than the 2 objectives"):
        make_feeds(case("windows", "both decoders'", batch=1), CORPORA, Words(), "train")
    short = [corpus(5, longest=2)]
    with pytest.raises(UserError, match="finds no example in the train documents of corpus"):
        make_feeds(case("windows", "masked_lm"), short, Words(), "train")


def test_two_objectives_draw_the_same_curves_on_any_number_of_ranks():
    objectives = [{"name": "causal_lm"}, {"name": "prefix_lm", "schedule": [[0, 1.0], [8, 0.1]]}]
    config = configured("packed", objectives=objectives, batch=12)

    def train(ranks, micro):
        def work(communicator):
            engine = NumpyEngine(communicator, VOCABULARY, loss_names=loss_names(config))
            one = batches(config, ranks, micro)[communicator.rank]
            curve = []
            for step in range(8):
                for made in one[step].micros:
                    engine.forward_backward(made, step, 1.0)
                curve.append(list(engine.reduce_gradients().losses.values()))
                engine.apply_gradients(1.0, None)
            return np.array(curve)

        return on_ranks(ranks, work)

    (whole,) = train(1, None)
    assert whole.shape == (8, 2) and np.allclose(whole[0], np.log(VOCABULARY))
    assert (whole[-1] < whole[0]).all()
    for ranks, micro in ((2, None), (4, 1)):
        for curve in train(ranks, micro):
            assert np.abs(curve - whole).max() < 1e-12


def test_no_document_is_lost_in_windows_of_masked_text():
    (feed,) = make_feeds(case("windows", "masked_lm"), CORPORA[:1], Words(), "train")
    (objective,) = feed.objectives
    text = CORPORA[0].tokens
    assert len(text) - objective.pieces.lengths.sum() < CONTEXT
    ends = sum((objective.example(n, 0).inputs["tokens"] == END).sum() for n in range(20))
    assert ends > 0
