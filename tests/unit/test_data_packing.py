from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from horovod_lm.data.layout import least_padding
from horovod_lm.data.packing import document_pieces, ends_within, pack, windows
from tests.unit.texts import END, Stream, lengths_of_text


def filled(packing, lengths):
    """(rows, D): how full each row is."""
    rows = np.repeat(np.arange(len(packing)), np.diff(packing.bounds))
    totals = np.zeros((len(packing), lengths.shape[1]), dtype=np.int64)
    np.add.at(totals, rows, lengths[packing.order])
    return totals


@given(
    st.lists(st.tuples(st.integers(1, 16), st.integers(1, 9)), min_size=1, max_size=60),
    st.integers(1, 2),
)
def test_every_piece_has_one_place_and_no_row_overflows(sizes, streams):
    lengths, room = np.array(sizes)[:, :streams], (16, 9)[:streams]
    packing = pack(lengths, room)
    assert np.array_equal(np.sort(packing.order), np.arange(len(sizes)))
    assert (np.diff(packing.bounds) > 0).all()
    totals = filled(packing, lengths)
    assert (totals <= np.array(room)).all()
    if streams == 1:
        # Of two rows that are half empty, one would have gone into the other.
        assert (totals <= 8).sum() <= 1


def test_rows_of_text_are_full():
    lengths = np.minimum(lengths_of_text(20_000, seed=1), 128)[:, None]
    packing = pack(lengths, (128,))
    assert lengths.sum() / (len(packing) * 128) > 0.99


def test_rows_have_the_same_lengths_in_whatever_order_the_pieces_come():
    lengths = lengths_of_text(500, seed=2, longest=64)[:, None]
    other = np.random.default_rng(5).permutation(lengths)
    rows = []
    for some in (lengths, other):
        packing = pack(some, (64,))
        taken = np.split(some[packing.order, 0], packing.bounds[1:-1])
        rows.append([sorted(row.tolist()) for row in taken])
    assert rows[0] == rows[1]


def test_packing_two_streams_at_once():
    generator = np.random.default_rng(3)
    source = lengths_of_text(3000, seed=4, longest=100)
    target = np.clip((source * generator.uniform(0.7, 1.3, 3000)).astype(int), 1, 100)
    lengths = np.stack([source, target], axis=1)
    packing = pack(lengths, (128, 128))
    assert (filled(packing, lengths) <= 128).all()
    assert lengths.sum() / (len(packing) * 256) > 0.9


def test_documents_are_cut_where_they_are_longer_than_a_row():
    stream = Stream([[10] * 4, [11] * 9, [], [12] * 10])
    pieces = document_pieces(stream, 5, ends=True)
    assert pieces.lengths.tolist() == [5, 5, 5, 1, 5, 5, 1]
    assert pieces.documents.tolist() == [0, 1, 1, 2, 3, 3, 3]
    texts = [
        stream.read(*pair).tolist() for pair in zip(pieces.starts, pieces.lengths, strict=True)
    ]
    assert texts[2] == [11] * 4 + [END] and texts[3] == [END] and texts[-1] == [END]
    without = document_pieces(stream, 5, ends=False, least=2)
    assert without.lengths.tolist() == [4, 5, 4, 5, 5]
    assert without.documents.tolist() == [0, 1, 1, 3, 3]


def test_windows_with_and_without_the_last():
    assert windows(11, 4, partial=True).lengths.tolist() == [4, 4, 3]
    assert windows(11, 4, partial=False).lengths.tolist() == [4, 4]
    assert windows(12, 4, partial=True).starts.tolist() == [0, 4, 8]


@pytest.mark.parametrize("room", [1, 3, 7, 100])
def test_ends_of_documents_are_counted_from_the_index(room):
    stream = Stream([[10] * n for n in (3, 0, 0, 7, 1, 12)])
    pieces = windows(len(stream), room, partial=True)
    counted = [
        int((stream.read(*pair) == END).sum())
        for pair in zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True)
    ]
    assert ends_within(stream, pieces.starts, pieces.lengths).tolist() == counted


@given(st.lists(st.integers(0, 9), min_size=2, max_size=9), st.integers(1, 4))
def test_buckets_have_the_least_padding(counts, buckets):
    lengths = np.repeat(np.arange(len(counts)), counts)

    def computed(edges):
        return sum(edges[np.searchsorted(edges, length)] for length in lengths)

    edges = least_padding(np.array(counts), buckets)
    assert len(edges) <= buckets and edges[-1] == len(counts) - 1 and edges == sorted(set(edges))
    inner = range(len(counts) - 1)
    others = [
        [*some, len(counts) - 1]
        for number in range(min(buckets, len(counts)))
        for some in combinations(inner, number)
    ]
    assert computed(edges) == min(computed(other) for other in others)
