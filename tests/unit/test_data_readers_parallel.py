"""Parallel text as WMT and OPUS distribute it: two files, TSV and TMX."""

import pytest

from horovod_lm.errors import UserError
from tests.unit.reading import packed, records, refused, texts

ENGLISH = ["Resumption of the session", "I declare resumed the session .", "Thank you , Mr X ."]
GERMAN = ["Wiederaufnahme der Sitzungsperiode", "Ich erkläre die Sitzung", "Vielen Dank , Herr X ."]


@pytest.mark.parametrize("how", ["plain", "gz", "zst"])
def test_parallel_plain_text(tmp_path, how):
    files = tmp_path / "europarl-v7.de-en.en", tmp_path / "europarl-v7.de-en.de"
    files[0].write_text("\n".join(ENGLISH) + "\n")
    files[1].write_text("\n".join(GERMAN) + "\n", encoding="utf-8")
    source, target = (packed(path, how) for path in files)
    assert texts(source, targets=(target,)) == [ENGLISH, GERMAN]


def test_pairs_stay_together_where_a_line_is_broken_or_empty(tmp_path):
    source, target = tmp_path / "a.en", tmp_path / "a.de"
    source.write_bytes(b"one\ntwo\n\nfour\nfive\n")
    target.write_bytes(b"eins\nzw\xffi\ndrei\n \nf\xc3\xbcnf")
    assert texts(source, targets=(target,), skip=True) == [["one", "five"], ["eins", "fünf"]]
    with pytest.raises(UserError, match=rf"{target}, line 2: at byte 2 of the line it has byte"):
        texts(source, targets=(target,))


@pytest.mark.parametrize("swapped", [False, True])
def test_files_of_different_lengths_are_no_translations(tmp_path, swapped):
    long, short = tmp_path / "a.long", tmp_path / "a.short"
    long.write_text("one\ntwo\nthree\n")
    short.write_text("one\ntwo\n")
    pair = (short, long) if swapped else (long, short)
    with pytest.raises(UserError, match=rf"{long} has more lines than {short}, which has 2;"):
        texts(pair[0], targets=(pair[1],))
    with pytest.raises(UserError, match=r"data\.text has 2 file\(s\) and data\.target 1; each"):
        texts(long, short, targets=(short,))


def test_parallel_tsv(tmp_path):
    path = tmp_path / "news-commentary-v16.de-en.tsv"
    rows = [f"{g}\t{e}" for g, e in zip(GERMAN, ENGLISH, strict=True)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert texts(path, fields=("2", "1"), parallel=True) == [ENGLISH, GERMAN]


TMX = """<?xml version="1.0" encoding="{encoding}" ?>
<!DOCTYPE tmx SYSTEM "tmx14.dtd">
<tmx version="1.4">
  <header creationtool="Uplug" segtype="sentence" srclang="en" adminlang="en" datatype="unknown"/>
  <body>
    <tu tuid="1">
      <prop type="score">0.9</prop>
      <tuv xml:lang="de"><seg>Größe &amp; Gewicht</seg></tuv>
      <tuv xml:lang="en"><seg>Size &amp; weight</seg></tuv>
    </tu>
    <tu>
      <tuv xml:lang="en-GB"><seg>Click <bpt i="1">&lt;b&gt;</bpt>here<ept i="1">&lt;/b&gt;</ept>,
        <hi>please</hi></seg></tuv>
      <tuv lang="DE_de"><seg>Bitte hier<ph>{{1}}</ph> klicken</seg></tuv>
    </tu>
  </body>
</tmx>
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso-8859-1"])
@pytest.mark.parametrize("how", ["plain", "gz"])
def test_tmx(tmp_path, encoding, how):
    path = tmp_path / "books.de-en.tmx"
    path.write_text(TMX.format(encoding=encoding), encoding=encoding)
    assert texts(packed(path, how), fields=("en", "de"), parallel=True) == [
        ["Size & weight", "Click here, please"],
        ["Größe & Gewicht", "Bitte hier klicken"],
    ]
    assert texts(path, fields=("de",)) == ["Größe & Gewicht", "Bitte hier klicken"]
    assert "must name the languages" in refused("tmx", path)


def test_a_unit_without_a_language_is_broken(tmp_path):
    path = tmp_path / "a.tmx"
    path.write_text(TMX.format(encoding="utf-8").replace('"DE_de"', '"fr"'), encoding="utf-8")
    message = 'line 11: its unit has no "de"; it has "en-gb", "fr"'
    assert f"{path}, {message}; " in refused("tmx", path, "en", "de")
    found, left_out = records("tmx", path, "en", "de", skip=True)
    assert len(found) == 1 and left_out.first == [message]


@pytest.mark.parametrize(
    "change, message",
    [
        (("</tu>\n    <tu>", "</tuv>"), "line 10: it is not XML (mismatched tag)"),
        (("  </body>\n</tmx>\n", ""), "it is not XML (no element found)"),
        (("tu>", "tv>"), "it is not XML (mismatched tag)"),
    ],
)
def test_tmx_that_is_no_xml_is_refused(tmp_path, change, message):
    path = tmp_path / "a.tmx"
    path.write_text(TMX.format(encoding="utf-8").replace(*change), encoding="utf-8")
    assert message in refused("tmx", path, "en", "de")
    path.write_text("<tmx></tmx>")
    assert "has no <tu> in it, so it is no TMX file" in refused("tmx", path, "en", "de")


def test_tmx_that_unfolds_to_more_than_memory_is_refused(tmp_path):
    path = tmp_path / "a.tmx"
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 20}">' for i in range(1, 12))
    path.write_text(
        f'<!DOCTYPE tmx [<!ENTITY e0 "{"x" * 100}">{entities}]><tmx><body><tu>'
        '<tuv xml:lang="en"><seg>&e11;</seg></tuv></tu></body></tmx>'
    )
    assert "it is not XML (limit on input amplification factor" in refused("tmx", path, "en")
