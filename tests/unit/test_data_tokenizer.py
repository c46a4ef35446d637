import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.data.tokenizer import END_OF_TEXT, Tokenizer
from horovod_lm.errors import UserError

TEXTS = [f"The {animal} sat on the mat, and the {animal} ate." for animal in ("cat", "dog")] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 270)


def test_it_learns_merges_and_keeps_to_the_size(tokenizer):
    assert tokenizer.vocabulary == 270
    assert len(tokenizer.encode(" the")) == 1
    assert tokenizer.encode("the").dtype == np.int32


# Surrogates alone are the one thing that UTF-8, and so a text file, can't hold.
@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not (ids == tokenizer.end).any()
    assert len(ids) == 0 or ids.max() < tokenizer.vocabulary


@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}b", f" {END_OF_TEXT}\n" * 3])
def test_the_characters_of_end_of_text_are_text(tokenizer, text, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for one in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json")):
        (ids,) = one.encode_batch([text])
        assert np.array_equal(ids, one.encode(text))
        assert one.end not in ids
        assert one.decode(ids) == text


def test_they_are_not_learnt_as_one_token_either():
    tokenizer = Tokenizer.train([END_OF_TEXT * 50] * 50, 400)
    ids = tokenizer.encode(END_OF_TEXT)
    assert len(ids) > 1 and tokenizer.end not in ids


def test_decoding_shows_end_of_text_and_passes_over_unknown_ids(tokenizer):
    ids = [*tokenizer.encode("the"), tokenizer.end, 100_000, *tokenizer.encode(" mat")]
    assert tokenizer.decode(np.array(ids)) == f"the{END_OF_TEXT} mat"


def test_half_a_character_decodes_to_a_replacement(tokenizer):
    ids = tokenizer.encode("\U0001f642")
    assert "\ufffd" in tokenizer.decode(ids[:-1])


def test_a_small_corpus_fills_fewer_ids():
    tokenizer = Tokenizer.train(["ab ab ab"], 5000)
    assert 257 <= tokenizer.vocabulary < 300
    assert tokenizer.decode(tokenizer.encode("é…")) == "é…"


def test_the_smallest_vocabulary_is_bytes_and_end_of_text():
    tokenizer = Tokenizer.train(TEXTS, 257)
    assert tokenizer.vocabulary == 257
    assert len(tokenizer.encode("cat")) == 3


def test_training_does_not_depend_on_threads():
    code = (
        "import hashlib\nfrom horovod_lm.data.tokenizer import Tokenizer\n"
        "texts = [' '.join(f'w{i * j % 97}' for j in range(50)) for i in range(300)]\n"
        "tokenizer = Tokenizer.train(texts, 600)\n"
        "print(hashlib.sha256(tokenizer._tokenizer.to_str().encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"TOKENIZERS_PARALLELISM": parallel, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for parallel, threads in (("false", "1"), ("true", "2"), ("true", "4"))
    }
    assert len(digests) == 1


def test_it_loads_as_it_was_saved(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.vocabulary, loaded.end) == (tokenizer.vocabulary, tokenizer.end)
    assert np.array_equal(loaded.encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))


@pytest.mark.parametrize("content", [None, "", "{}", "not JSON"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json can't be read"):
        Tokenizer.load(path)
