import hashlib
import json

import numpy as np
import pytest

from horovod_lm.data.shards import Tokens, TokenWriter, token_type


def write(folder, pieces, vocabulary=1000, shard_tokens=7):
    with TokenWriter(folder, "train", vocabulary, shard_tokens) as writer:
        for start in range(0, len(pieces), 2):
            writer.write(pieces[start : start + 2])
    return writer, writer.finish()


PIECES = [
    (np.arange(0, 3, dtype=np.int32), True),
    (np.arange(3, 13, dtype=np.int32), False),
    (np.arange(13, 20, dtype=np.int32), True),
    (np.array([20], dtype=np.int32), True),
]


def test_a_stream_over_several_shards_reads_back(tmp_path):
    _, entry = write(tmp_path, PIECES)
    tokens = Tokens(tmp_path, entry)
    assert len(tokens) == entry["tokens"] == 21
    assert [shard["count"] for shard in entry["shards"]] == [7, 7, 7]
    for start in range(22):
        for count in range(22 - start):
            read = tokens.read(start, count)
            assert read.dtype == np.int32
            assert read.tolist() == list(range(start, start + count))
    assert tokens.documents.tolist() == [0, 3, 20]
    counts = tokens.counts(1000)
    assert counts.sum() == 21 and counts[20] == 1 and counts[21:].sum() == 0


def test_shards_do_not_depend_on_how_the_pieces_came(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    _, entry = write(tmp_path, PIECES)
    with TokenWriter(other, "train", 1000, 7) as writer:
        writer.write(PIECES)
    assert writer.finish() == entry


def test_the_manifest_has_the_digests_of_the_files(tmp_path):
    _, entry = write(tmp_path, PIECES)
    for file in [*entry["shards"], entry["index"]]:
        data = (tmp_path / file["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == file["sha256"]
    named = {file["file"] for file in [*entry["shards"], entry["index"]]}
    assert named == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("vocabulary, kind", [(257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_ids_take_the_smallest_type_that_holds_them(tmp_path, vocabulary, kind):
    assert token_type(vocabulary).str == kind
    ids = np.array([0, vocabulary - 1], dtype=np.int32)
    _, entry = write(tmp_path, [(ids, True)], vocabulary)
    assert Tokens(tmp_path, entry).read(0, 2).tolist() == ids.tolist()


@pytest.mark.parametrize("start, count", [(-1, 2), (20, 2), (0, -1), (22, 0)])
def test_reading_outside_the_stream_is_refused(tmp_path, start, count):
    _, entry = write(tmp_path, PIECES)
    with pytest.raises(IndexError, match="21"):
        Tokens(tmp_path, entry).read(start, count)


def test_a_file_that_is_cut_or_missing_is_found(tmp_path):
    _, entry = write(tmp_path, PIECES)
    shard = tmp_path / entry["shards"][1]["file"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="should have 14 bytes, and has 13"):
        Tokens(tmp_path, entry)
    shard.unlink()
    with pytest.raises(ValueError, match="should have 14 bytes, and has -1"):
        Tokens(tmp_path, entry)


@pytest.mark.parametrize("cut", range(len(PIECES)))
def test_a_writer_goes_on_where_another_was(tmp_path, cut):
    whole = tmp_path / "whole"
    whole.mkdir()
    _, entry = write(whole, PIECES)
    with TokenWriter(tmp_path, "train", 1000, 7) as writer:
        writer.write(PIECES[:cut])
        state = json.loads(json.dumps(writer.save()))
        # What came after the state was saved counts for nothing.
        writer.write(PIECES[cut:] + PIECES)
    with TokenWriter(tmp_path, "train", 1000, 7, state) as writer:
        writer.write(PIECES[cut:])
    assert writer.finish() == entry
    for file in [*entry["shards"], entry["index"]]:
        data = (tmp_path / file["file"]).read_bytes()
        assert data == (whole / file["file"]).read_bytes()


@pytest.mark.parametrize("name", ["train-00000.tokens", "train-00002.tokens", "train.documents"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_writer_does_not_go_on_with_damage(tmp_path, name, cut):
    with TokenWriter(tmp_path, "train", 1000, 7) as writer:
        writer.write(PIECES[:3])
        state = writer.save()
    path = tmp_path / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] if cut else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ValueError, match="is not as it was left"):
        TokenWriter(tmp_path, "train", 1000, 7, state)
