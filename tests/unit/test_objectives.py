"""What the examples of each objective are made of."""

import itertools

import numpy as np
import pytest

from horovod_lm.errors import UserError
from horovod_lm.objectives import Corpus, LossKind
from horovod_lm.objectives.causal_lm import CausalLM, PrefixLM
from horovod_lm.objectives.masked_lm import MaskedLM, Masking, MaskingOptions
from horovod_lm.objectives.sentence_pairs import SentencePairs
from horovod_lm.objectives.sequence_to_sequence import SequenceToSequence
from horovod_lm.objectives.span_corruption import Denoising, SpanCorruption
from horovod_lm.objectives.words import ordinary, sentence_ends
from horovod_lm.randomness import Keys, fractions
from tests.unit.texts import (
    BEGIN,
    CLASSIFY,
    END,
    FIRST,
    MASK,
    SENTINELS,
    SEPARATE,
    STOP,
    VOCABULARY,
    Stream,
    Words,
    corpus,
)

ROOM = 64


def masked(options=None, documents=False, seed=1, text=None):
    loss = LossKind("masked_lm", sparse=True)
    masking = Masking(Words(), loss, options or MaskingOptions())
    text = text or corpus()
    return MaskedLM(text, ROOM, Words(), masking, Keys(seed, "m"), documents=documents)


def pairs(swap=False, masking=None, segments=True, text=None, seed=1):
    loss = LossKind("sentence_order" if swap else "next_sentence", "pair", "sequence")
    return SentencePairs(
        text or corpus(), ROOM, Words(), Keys(seed, "p"), loss=loss, swap=swap, segments=segments,
        masking=masking,
    )  # fmt: skip


def spans(documents=False, text=None, **options):
    loss = LossKind("span_corruption")
    return SpanCorruption(
        text or corpus(), ROOM, Words(), Keys(1, "s"), loss=loss, documents=documents, **options
    )


def noisy(documents=False, text=None, **options):
    loss = LossKind("denoising")
    return Denoising(
        text or corpus(), ROOM, Words(), Keys(1, "d"), loss=loss, documents=documents, **options
    )


def seq2seq():
    return SequenceToSequence(
        corpus(parallel=True), ROOM, Words(), loss=LossKind("sequence_to_sequence")
    )


def causal(kind=CausalLM, documents=False):
    keys, loss = Keys(1, "c"), LossKind("lm")
    return kind(corpus(), ROOM, Words(), documents=documents, keys=keys, loss=loss)


def rider(options=None):
    return Masking(Words(), LossKind("masked_lm", sparse=True), options or MaskingOptions())


ALL = {
    "causal_lm": causal,
    "causal_lm of documents": lambda: causal(documents=True),
    "prefix_lm": lambda: causal(PrefixLM),
    "prefix_lm of documents": lambda: causal(PrefixLM, documents=True),
    "masked_lm": masked,
    "masked_lm of documents": lambda: masked(documents=True),
    "whole words": lambda: masked(MaskingOptions(whole_words=True)),
    "next_sentence": pairs,
    "sentence_order": lambda: pairs(swap=True),
    "masked pairs": lambda: pairs(masking=rider()),
    "whole words in pairs": lambda: pairs(masking=rider(MaskingOptions(whole_words=True))),
    "span_corruption": spans,
    "span_corruption of documents": lambda: spans(documents=True),
    "denoising": noisy,
    "denoising of documents": lambda: noisy(documents=True),
    "sequence_to_sequence": seq2seq,
}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_lengths_and_counts_are_those_of_the_examples(make):
    objective = make()
    numbers = np.arange(len(objective.lengths))
    assert len(numbers) > 50
    assert objective.lengths.max() <= ROOM and objective.lengths.min() >= 1
    for epoch in (0, 3):
        epochs = np.full_like(numbers, epoch)
        counts, real = objective.counts(numbers, epochs), objective.real(numbers, epochs)
        assert list(counts) and set(counts) == {kind.name for kind in objective.losses}
        assert (real <= objective.lengths).all()
        for number in numbers.tolist():
            example = objective.example(number, epoch)
            lengths = [len(example.inputs[name]) for name in objective.streams]
            assert lengths == real[number].tolist()
            for name in objective.extras:
                assert len(example.inputs[name]) == lengths[-1]
            for kind in objective.losses:
                targets = example.targets[kind.name]
                assert len(targets.values) == counts[kind.name][number]
                if kind.sparse:
                    assert len(targets.values) <= objective.places[number]
                    assert (np.diff(targets.places) > 0).all()


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_an_example_depends_on_its_number_and_epoch_alone(make):
    one, two = make(), make()
    changed = 0
    for number in range(20):
        for epoch in (0, 1):
            given, again = two.example(number, epoch), one.example(number, epoch)
            for name, ids in given.inputs.items():
                assert np.array_equal(ids, again.inputs[name])
        first, other = one.example(number, 0), one.example(number, 1)
        same = all(np.array_equal(first.inputs[n], other.inputs[n]) for n in first.inputs)
        changed += not same
    dynamic = type(one) not in (CausalLM, SequenceToSequence)
    assert changed > 10 if dynamic else not changed


def test_causal_documents_predict_every_token_of_their_own():
    objective = causal(documents=True)
    text = corpus().tokens
    found = np.concatenate([objective.example(n, 0).targets["lm"].values
                            for n in range(len(objective.lengths))])  # fmt: skip
    assert np.array_equal(found, text.read(0, len(text)))
    for number in range(len(objective.lengths)):
        start = int(objective.pieces.starts[number])
        inputs = objective.example(number, 0).inputs["tokens"]
        first = BEGIN if start in text.documents else text.read(start - 1, 1)[0]
        assert inputs[0] == first
        assert np.array_equal(inputs[1:], text.read(start, len(inputs) - 1))


def test_without_a_begin_token_the_end_of_the_text_before_goes_in():
    words = Words(special={})
    objective = CausalLM(corpus(), ROOM, words, documents=True)
    assert objective.example(0, 0).inputs["tokens"][0] == END


def test_a_prefix_is_seen_whole_and_never_a_target():
    objective = causal(PrefixLM)
    seen = []
    for number in range(len(objective.lengths)):
        example = objective.example(number, 0)
        tokens, prefix = example.inputs["tokens"], example.inputs["prefix"]
        targets = example.targets["lm"]
        count = int(prefix.sum())
        assert prefix[:count].all() and count >= 1
        # Target p is the input at p + 1: none of those may be among what all tokens see.
        places = targets.places + np.arange(len(targets.values))
        assert not prefix[places[:-1] + 1].any() and places[-1] == len(tokens) - 1
        assert np.array_equal(tokens[places[1:]], targets.values[:-1])
        seen.append(count / len(tokens))
    assert 0.4 < np.mean(seen) < 0.6 and min(seen) < 0.1 and max(seen) > 0.9


def originals(objective, text, number):
    """The ids of a masked example as they were."""
    start, length = objective.pieces.starts[number], objective.pieces.lengths[number]
    return np.concatenate([[CLASSIFY], text.read(int(start), int(length)), [SEPARATE]])


@pytest.mark.parametrize("documents", [False, True])
def test_masks_are_80_10_10_of_15_percent_and_never_on_special_tokens(documents):
    objective, text = masked(documents=documents), corpus().tokens
    kinds, candidates, random_ids = np.zeros(3), 0, []
    for number in range(len(objective.lengths)):
        before = originals(objective, text, number)
        for epoch in range(10):
            example = objective.example(number, epoch)
            tokens, targets = example.inputs["tokens"], example.targets["masked_lm"]
            assert (before[targets.places] >= FIRST).all()
            assert np.array_equal(before[targets.places], targets.values)
            others = np.ones(len(tokens), dtype=bool)
            others[targets.places] = False
            assert np.array_equal(tokens[others], before[others])
            put = tokens[targets.places]
            changed = (put != MASK) & (put != targets.values)
            kinds += [(put == MASK).sum(), changed.sum(), (put == targets.values).sum()]
            random_ids += put[changed].tolist()
            candidates += (before >= FIRST).sum()
    total = kinds.sum()
    # Rounding each example's share takes up to half a token, which short documents feel.
    assert total / candidates == pytest.approx(0.15, abs=0.005 if not documents else 0.02)
    margin = 4 * 0.5 / np.sqrt(total)
    assert np.abs(kinds / total - [0.8, 0.1, 0.1]).max() < margin
    assert min(random_ids) >= FIRST
    counts = np.bincount((np.array(random_ids) - FIRST) * 10 // (VOCABULARY - FIRST), minlength=10)
    expected = len(random_ids) / 10
    assert ((counts - expected) ** 2 / expected).sum() < 9 + 4 * np.sqrt(18)


def test_every_place_of_a_window_is_masked_as_often():
    objective = masked()
    counts = np.zeros(ROOM)
    for number in range(60):
        for epoch in range(20):
            counts[objective.example(number, epoch).targets["masked_lm"].places] += 1
    inside = counts[1:-1]
    assert counts[0] == counts[-1] == 0
    expected = inside.mean()
    # The end-of-text tokens, which are never masked, stand at other places in each window.
    assert ((inside - expected) ** 2 / expected).sum() < 61 + 5 * np.sqrt(122)


def test_whole_words_are_masked_whole():
    objective, text = masked(MaskingOptions(whole_words=True)), corpus().tokens
    starts, share = Words().starts_word, []
    for number in range(len(objective.lengths)):
        before = originals(objective, text, number)
        targets = objective.example(number, 0).targets["masked_lm"]
        chosen = np.zeros(len(before), dtype=bool)
        chosen[targets.places] = True
        goes_on = ~starts[before]
        goes_on[1] = False  # the first of the window begins a word
        goes_on &= (before >= FIRST) & (np.roll(before, 1) >= FIRST)
        assert np.array_equal(chosen[goes_on], chosen[np.flatnonzero(goes_on) - 1])
        share.append(len(targets.values) / (before >= FIRST).sum())
    assert 0.12 < np.mean(share) <= 0.16


def test_words_anywhere_in_a_window_are_masked_as_often():
    objective = masked(MaskingOptions(whole_words=True))
    counts = np.zeros(ROOM)
    for number in range(60):
        for epoch in range(20):
            counts[objective.example(number, epoch).targets["masked_lm"].places] += 1
    inside = counts[1:-1] / counts[1:-1].mean()
    assert counts[0] == counts[-1] == 0
    assert inside.min() > 0.7 and inside.max() < 1.4


def test_a_tokenizer_without_the_token_is_refused():
    words = Words(special={"classify": CLASSIFY})
    with pytest.raises(UserError, match="masked_lm needs a tokenizer with a mask token"):
        Masking(words, LossKind("masked_lm", sparse=True), MaskingOptions())
    with pytest.raises(UserError, match="needs a tokenizer with a separate token"):
        SentencePairs(
            corpus(), ROOM, words, Keys(1, ""), loss=LossKind("next_sentence"), swap=False,
            segments=False,
        )  # fmt: skip
    with pytest.raises(UserError, match="needs a tokenizer with sentinel tokens"):
        SpanCorruption(corpus(), ROOM, Words(sentinels=()), Keys(1, ""), loss=LossKind("s"))
    with pytest.raises(UserError, match="one side only"):
        SequenceToSequence(corpus(), ROOM, Words(), loss=LossKind("s"))


def test_ordinary_ids_and_ends_of_sentences():
    assert ordinary(Words()).tolist() == list(range(FIRST, VOCABULARY))
    assert np.flatnonzero(sentence_ends(Words())).tolist() == list(range(STOP, VOCABULARY))


def cut(example):
    """A and B of a pair, from the special tokens."""
    tokens, segments = example.inputs["tokens"], example.inputs["segments"]
    first, second = tokens[segments == 0], tokens[segments == 1]
    assert first[0] == CLASSIFY and first[-1] == second[-1] == SEPARATE
    return first[1:-1], second[:-1]


def test_next_sentence_is_the_next_or_another_documents():
    # Documents of one id each tell whose tokens are whose.
    ids = np.arange(FIRST, FIRST + 80)
    generator = np.random.default_rng(0)
    stream = Stream([np.full(generator.integers(2, 100), number) for number in ids])
    objective = pairs(text=Corpus("corpus", stream))
    labels, others = [], []
    for number in range(len(objective.lengths)):
        for epoch in range(10):
            example = objective.example(number, epoch)
            first, second = cut(example)
            (label,) = example.targets["next_sentence"].values
            assert len(first) and len(second)
            assert len(set(first)) == len(set(second)) == 1
            assert label == (first[0] != second[0])
            assert first[0] == ids[objective.pieces.documents[number]]
            labels.append(label)
            others += [second[0]] * int(label)
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / np.sqrt(len(labels))
    assert len(set(others)) > 70


def sentences(generator, opener, count):
    """Documents of 1 to 5 sentences, each of up to 12 ids and one that ends it; `opener` is the
    first id of a document and of nothing else."""
    documents = []
    for _ in range(count):
        parts = [
            np.append(generator.integers(opener + 1, STOP, generator.integers(3, 13)), STOP)
            for _ in range(generator.integers(1, 6))
        ]
        parts[0][0] = opener
        documents.append(np.concatenate(parts))
    return documents


def test_where_another_documents_sentence_begins_and_ends_says_nothing():
    generator = np.random.default_rng(3)
    stream = Stream(sentences(generator, FIRST, 400))
    objective = pairs(text=Corpus("corpus", stream))
    found = {0: [], 1: []}
    for number in range(len(objective.lengths)):
        for epoch in range(12):
            example = objective.example(number, epoch)
            first, second = cut(example)
            # Of a document of one sentence each part of a pair is a part of that.
            if first[-1] == STOP:
                (label,) = example.targets["next_sentence"].values
                texts = [first, second]
                found[int(label)].append(
                    [part for text in texts for part in (text[0], text[-1], len(text))]
                )
    next_one, other = (np.array(found[label]) for label in (0, 1))
    for pairs_found in (next_one, other):
        assert len(pairs_found) > 1500
        assert (pairs_found[:, [1, 4]] == STOP).all()  # both end with a sentence
        assert (pairs_found[:, 0] == FIRST).all() and (pairs_found[:, 3] != FIRST).all()
    # Nor do lengths: of A they are the same, and of B nearly.
    for column, near in ((2, 0.05), (5, 0.1)):
        means = next_one[:, column].mean(), other[:, column].mean()
        assert means[1] == pytest.approx(means[0], rel=near)


def test_a_text_that_is_cut_within_a_sentence_meets_one_that_begins_within_one():
    generator = np.random.default_rng(3)
    whole = [generator.integers(FIRST, STOP, generator.integers(4, 20)) for _ in range(80)]
    long = [np.tile([FIRST] * 9 + [STOP], 6) for _ in range(80)]
    objective = pairs(text=Corpus("corpus", Stream([*whole, *long])))
    starts = []
    for number in range(80):
        example = objective.example(number, 0)
        if example.targets["next_sentence"].values[0]:
            first, second = cut(example)
            assert len(first) + len(second) == len(whole[number])
            starts.append(int((second == STOP).argmax()) if STOP in second else None)
    assert len(starts) > 25 and len(set(starts)) > 5


def test_positive_pairs_are_the_text():
    objective, text = pairs(), corpus().tokens
    ends, at_end = 0, 0
    for number in range(len(objective.lengths)):
        example = objective.example(number, 0)
        if example.targets["next_sentence"].values[0] == 0:
            first, second = cut(example)
            start, length = objective.pieces.starts[number], objective.pieces.lengths[number]
            whole = text.read(int(start), int(length))
            assert np.array_equal(np.concatenate([first, second]), whole)
            has_end = (whole[:-1] >= STOP).any()
            ends += has_end
            at_end += first[-1] >= STOP
    assert ends == at_end > 10


def test_sentence_order_swaps_the_halves():
    objective, text = pairs(swap=True), corpus().tokens
    labels = []
    for number in range(len(objective.lengths)):
        example = objective.example(number, 0)
        first, second = cut(example)
        (label,) = example.targets["sentence_order"].values
        start, length = objective.pieces.starts[number], objective.pieces.lengths[number]
        halves = [second, first] if label else [first, second]
        assert np.array_equal(np.concatenate(halves), text.read(int(start), int(length)))
        labels.append(label)
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / np.sqrt(len(labels))


def test_masks_in_pairs_spare_the_special_tokens():
    plain, both = pairs(), pairs(masking=rider())
    for number in range(100):
        before, after = plain.example(number, 1), both.example(number, 1)
        targets = after.targets["masked_lm"]
        ids = before.inputs["tokens"]
        assert np.array_equal(ids[targets.places], targets.values)
        assert (targets.values >= FIRST).all()
        assert np.array_equal(before.inputs["segments"], after.inputs["segments"])
        others = np.setdiff1d(np.arange(len(ids)), targets.places)
        assert np.array_equal(ids[others], after.inputs["tokens"][others])


def test_masks_in_pairs_are_80_10_10_and_drawn_anew_in_each_epoch():
    plain, both = pairs(), pairs(masking=rider())
    drawn = both._pair
    both._pair = lambda number, epoch: drawn(number, 0)  # so that masks alone may differ
    numbers = range(len(both.lengths))
    kinds, random_ids, changed = np.zeros(3), [], 0
    for number in numbers:
        before, seen = plain.example(number, 0).inputs["tokens"], set()
        for epoch in range(6):
            example = both.example(number, epoch)
            targets = example.targets["masked_lm"]
            assert np.array_equal(before[targets.places], targets.values)
            put = example.inputs["tokens"][targets.places]
            other = (put != MASK) & (put != targets.values)
            kinds += [(put == MASK).sum(), other.sum(), (put == targets.values).sum()]
            random_ids += put[other].tolist()
            seen.add(targets.places.tobytes())
        changed += len(seen) > 1
    assert np.abs(kinds / kinds.sum() - [0.8, 0.1, 0.1]).max() < 2 / np.sqrt(kinds.sum())
    assert min(random_ids) >= FIRST and len(set(random_ids)) > len(random_ids) / 2
    assert changed > 0.8 * len(numbers)


def test_a_pair_needs_two_documents():
    with pytest.raises(UserError, match="needs two documents of at least two tokens"):
        pairs(text=Corpus("corpus", Stream([np.arange(FIRST, FIRST + 500)])))


def rebuilt(example, name):
    """The text that span corruption took apart."""
    source, target = example.inputs["source"], example.targets[name].values
    assert source[-1] == target[-1] == END
    parts, current = {}, None
    for number in target[:-1].tolist():
        if number in SENTINELS:
            current = parts.setdefault(number, [])
        else:
            current.append(number)
    assert list(parts) == list(SENTINELS[: len(parts)]) and all(parts.values())
    text = []
    for number in source[:-1].tolist():
        text += parts.pop(number) if number in SENTINELS else [number]
    assert not parts
    return text


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("options", [{}, {"density": 0.5, "mean_span": 1.0}, {"mean_span": 10.0}])
def test_spans_and_what_is_left_give_back_the_text(documents, options):
    objective, text = spans(documents, **options), corpus().tokens
    for number in range(len(objective.lengths)):
        example = objective.example(number, 2)
        start, length = objective.pieces.starts[number], objective.pieces.lengths[number]
        assert rebuilt(example, "span_corruption") == text.read(int(start), int(length)).tolist()
        source, inputs = example.inputs["source"], example.inputs["tokens"]
        targets = example.targets["span_corruption"].values
        assert inputs[0] == BEGIN and np.array_equal(inputs[1:], targets[:-1])
        # No target token is left in the source: kept and lost tokens add up.
        kept, lost = (source >= FIRST) | (source == END), (targets >= FIRST) | (targets == END)
        assert kept.sum() - 1 + lost.sum() - 1 == length


def test_spans_are_as_many_and_as_long_as_asked():
    objective = spans()
    noise, lengths = [], []
    for number in range(len(objective.lengths)):
        targets = objective.example(number, 0).targets["span_corruption"].values[:-1]
        sentinels = np.isin(targets, SENTINELS)
        noise.append((~sentinels).sum() / objective.pieces.lengths[number])
        lengths.append((~sentinels).sum() / sentinels.sum())
    assert np.mean(noise) == pytest.approx(0.15, abs=0.01)
    assert np.mean(lengths) == pytest.approx(3.0, abs=0.35)
    # The published figures: 512 tokens of input come of 568, with 114 of target.
    whole = SpanCorruption(
        corpus(3000), 512, Words(), Keys(1, ""), loss=LossKind("s"), density=0.15, mean_span=3.0
    )
    assert whole.pieces.lengths[0] == 568 and whole.lengths[0].tolist() == [512, 114]


def test_no_more_spans_than_sentinels():
    words = Words(sentinels=SENTINELS[:2])
    objective = SpanCorruption(corpus(), ROOM, words, Keys(1, ""), loss=LossKind("s"))
    assert np.isin(objective.example(0, 0).inputs["source"], SENTINELS).sum() == 2


def test_infilling_keeps_the_order_and_puts_one_mask_for_each_span():
    # Every token tells its place.
    stream = Stream([np.arange(FIRST, FIRST + 20_000)])
    objective = noisy(permute=False, text=Corpus("corpus", stream))
    sizes = []
    for number in range(len(objective.lengths)):
        example = objective.example(number, 0)
        source, target = example.inputs["source"], example.targets["denoising"].values
        assert source[-1] == target[-1] == END
        assert np.array_equal(example.inputs["tokens"][1:], target[:-1])
        masks = source[:-1] == MASK
        assert not (masks[1:] & masks[:-1]).any()
        places = np.where(masks, -1, source[:-1] - target[0])
        assert set(places[~masks]) <= set(range(len(target) - 1))
        for i in np.flatnonzero(masks):
            before = places[i - 1] if i else -1
            after = places[i + 1] if i + 1 < len(places) else len(target) - 1
            sizes.append(after - before - 1)
        # Where no mask is, nothing is missing.
        unmasked = ~(masks[1:] | masks[:-1])
        assert (np.diff(places)[unmasked] == 1).all()
    assert min(sizes) == 0
    assert sum(sizes) / sum(objective.pieces.lengths) == pytest.approx(0.3, abs=0.01)
    assert np.mean(sizes) == pytest.approx(3.0, abs=0.2)
    # Poisson(3) is 0 in 5% of cases and has the variance 3; spans of a known sum vary a bit less.
    assert 0.02 < np.mean(np.array(sizes) == 0) < 0.08
    assert np.var(sizes) == pytest.approx(3.0, rel=0.2)


def test_denoising_puts_sentences_in_another_order():
    objective = noisy(density=0.001, permute=True)
    moved = 0
    for number in range(len(objective.lengths)):
        example = objective.example(number, 0)
        source = example.inputs["source"][:-1]
        target = example.targets["denoising"].values[:-1]
        assert MASK not in source
        assert np.array_equal(np.sort(source), np.sort(target))
        ends = np.flatnonzero((target[:-1] >= STOP) | (target[:-1] == END)) + 1
        # Each sentence is in the source as it was.
        assert all(part.tobytes() in source.tobytes() for part in np.split(target, ends))
        moved += not np.array_equal(source, target)
    assert moved > len(objective.lengths) / 2


def test_sentences_come_in_every_order_as_often():
    three = [[FIRST + i, FIRST + 9, FIRST + 9, STOP + i] for i in range(3)]
    text = Corpus("corpus", Stream([np.concatenate(three)] * 30))
    objective = noisy(documents=True, text=text, density=0.001)
    orders = []
    for number in range(30):
        for epoch in range(10):
            source = objective.example(number, epoch).inputs["source"]
            orders.append(tuple(source[source >= STOP] - STOP))
    counts = [orders.count(order) for order in itertools.permutations(range(3))]
    assert sum(counts) == 300 and min(counts) > 25


def spread(shares):
    """How often the rarest fifth of the texts' lengths has one of the places `shares`, to the
    mean."""
    counts = np.histogram(shares, 5, (0, 1))[0]
    return counts.min() / counts.mean()


def test_spans_are_anywhere_in_the_text():
    # One span alone: it begins at any of the places that it can have, both ends included.
    objective = spans(mean_span=1000.0)
    shares = []
    for number in range(len(objective.lengths)):
        for epoch in range(5):
            source = objective.example(number, epoch).inputs["source"]
            (place,) = np.flatnonzero(np.isin(source, SENTINELS))
            shares.append(place / (len(source) - 2))
    assert len(shares) > 400 and spread(shares) > 0.5
    # Several: as often at the one end of the text as at the other. Of the places for a span that
    # the kept tokens leave, one more than these, each is the last with the same probability.
    objective = spans()
    ends, expected, shares = np.zeros(2), [], []
    for number in range(len(objective.lengths)):
        for epoch in range(20):
            source = objective.example(number, epoch).inputs["source"][:-1]
            sentinels = np.isin(source, SENTINELS)
            ends += sentinels[[0, -1]]
            expected.append(sentinels.sum() / ((~sentinels).sum() + 1))
            shares += (np.flatnonzero(sentinels) / len(source)).tolist()
    assert spread(shares) > 0.5
    assert np.abs(ends - np.sum(expected)).max() < 4 * np.sqrt(np.sum(expected))


def test_infilled_spans_are_anywhere_in_the_text():
    objective = noisy(permute=False)
    shares = []
    for number in range(len(objective.lengths)):
        for epoch in range(5):
            source = objective.example(number, epoch).inputs["source"][:-1]
            shares += (np.flatnonzero(source == MASK) / len(source)).tolist()
    assert len(shares) > 1000 and spread(shares) > 0.5


def test_parallel_text_is_cut_to_the_room_and_keeps_its_end():
    text = corpus(parallel=True)
    objective = seq2seq()
    for number in range(len(objective.lengths)):
        example = objective.example(number, 0)
        source, target = example.inputs["source"], example.targets["sequence_to_sequence"].values
        assert source[-1] == target[-1] == END and END not in source[:-1]
        assert example.inputs["tokens"][0] == BEGIN
        begin = int(text.source.documents[number])
        assert np.array_equal(source[:-1], text.source.read(begin, len(source) - 1))
    uneven = Corpus("corpus", text.tokens, Stream([[FIRST]]))
    with pytest.raises(UserError, match="has 1 documents, and its target 200"):
        SequenceToSequence(uneven, ROOM, Words(), loss=LossKind("s"))


def test_empty_sides_are_left_out():
    text = Corpus("corpus", Stream([[200], [], [202]]), Stream([[300], [301], []]))
    objective = SequenceToSequence(text, ROOM, Words(), loss=LossKind("s"))
    assert objective.lengths.tolist() == [[2, 2]]


def test_keys_and_fractions():
    keys = Keys(1, "name")
    many = keys(np.arange(1000), np.zeros(1000, dtype=np.int64))
    assert len(np.unique(many)) == 1000
    assert keys(5, 0) == many[5] and keys(5, 1) != many[5] and Keys(2, "name")(5, 0) != many[5]
    drawn = fractions(many, 100)
    assert drawn.shape == (1000, 100) and drawn.min() > 0 and drawn.max() < 1
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 19 + 4 * np.sqrt(38)
    for one, two in ((drawn[:, 0], drawn[:, 1]), (drawn[0], drawn[1])):
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 / np.sqrt(len(one))
