"""Readers of GLUE, SQuAD and CNN/DailyMail, on small files in exactly the format distributed."""

import json

import pytest

from tests.unit.reading import records, refused, texts

# GLUE: the headers and the first lines have the form of the files in the distributed archives.

GLUE = {
    "CoLA/train.tsv": (
        "gj04\t1\t\tOur friends won't buy this analysis, let alone the next one we propose.\n"
        "gj04\t0\t*\tThe more we study verbs, the crazier they get it.\n",
        [("Our friends won't buy this analysis, let alone the next one we propose.", "1"),
         ("The more we study verbs, the crazier they get it.", "0")],
    ),
    "CoLA/test.tsv": (
        "index\tsentence\n0\tBill whistled past the house.\n",
        [("Bill whistled past the house.",)],
    ),
    "SST-2/train.tsv": (
        "sentence\tlabel\nhide new secretions from the parental units \t0\n",
        [("hide new secretions from the parental units ", "0")],
    ),
    "SST-2/test.tsv": ("index\tsentence\n0\tuneasy mishmash .\n", [("uneasy mishmash .",)]),
    "MRPC/msr_paraphrase_train.txt": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
        '1\t702876\t702977\tAmrozi called him "the witness .\tHe was called "the witness" .\n',
        [('Amrozi called him "the witness .', 'He was called "the witness" .', "1")],
    ),
    "MRPC/test.tsv": (
        "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1089874\t1089925\tOne .\tOther .\n",
        [("One .", "Other .")],
    ),
    "QQP/train.tsv": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n133273\t213221\t213222\tHow?\tWhy?\t0\n",
        [("How?", "Why?", "0")],
    ),
    "QQP/test.tsv": ("id\tquestion1\tquestion2\n0\tHow?\tWhy?\n", [("How?", "Why?")]),
    "STS-B/dev.tsv": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tmain-captions\tMSRvid\t2012test\t0000\tnone\tnone\tA man rides.\tA man walks.\t5.000\n",
        [("A man rides.", "A man walks.", "5.000")],
    ),
    "STS-B/test.tsv": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\n"
        "0\tmain-captions\tMSRvid\t2012test\t0024\tnone\tnone\tA girl.\tA woman.\n",
        [("A girl.", "A woman.")],
    ),
    "MNLI/train.tsv": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t31193\t31193n\tfiction\t( A )\t( B )\t(ROOT A)\t(ROOT B)\tA\tB\tneutral\tneutral\n",
        [("A", "B", "neutral")],
    ),
    "MNLI/dev_matched.tsv": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\t"
        "label5\tgold_label\n"
        "0\t6\t6e\tslate\t( A )\t( B )\t(ROOT A)\t(ROOT B)\tA\tB\te\tn\te\te\te\tentailment\n",
        [("A", "B", "entailment")],
    ),
    "MNLI/test_matched.tsv": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\n"
        "0\t31493\t31493\ttravel\t( A )\t( B )\t(ROOT A)\t(ROOT B)\tA\tB\n",
        [("A", "B")],
    ),
    "QNLI/dev.tsv": (
        "index\tquestion\tsentence\tlabel\n0\tWhat came?\tAs of that day.\tentailment\n",
        [("What came?", "As of that day.", "entailment")],
    ),
    "RTE/train.tsv": (
        "index\tsentence1\tsentence2\tlabel\n0\tNo Weapons.\tWeapons Found.\tnot_entailment\n",
        [("No Weapons.", "Weapons Found.", "not_entailment")],
    ),
    "WNLI/train.tsv": (
        "index\tsentence1\tsentence2\tlabel\n0\tI stuck a pin.\tThe carrot had a hole.\t1\n",
        [("I stuck a pin.", "The carrot had a hole.", "1")],
    ),
    "AX/diagnostic.tsv": (
        "index\tsentence1\tsentence2\n0\tThe cat sat.\tThe cat did not.\n",
        [("The cat sat.", "The cat did not.")],
    ),
    "diagnostic/diagnostic-full.tsv": (
        "Lexical Semantics\tPredicate-Argument Structure\tLogic\tKnowledge\tDomain\tPremise\t"
        "Hypothesis\tLabel\n\t\tNegation\t\tArtificial\tThe cat sat.\tIt did not.\tcontradiction\n",
        [("The cat sat.", "It did not.", "contradiction")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE)
def test_glue_as_distributed(tmp_path, name):
    path = tmp_path / name.rpartition("/")[2]
    content, expected = GLUE[name]
    path.write_text(content, encoding="utf-8")
    labels = "label" if len(expected[0]) > 1 and "test" not in name else None
    one = "sentence1" if name.startswith(("CoLA", "SST")) else None
    fields = [f for f in ("sentence1", None if one else "sentence2", labels) if f]
    if name.startswith("AX"):
        fields = ["sentence1", "sentence2"]
    found = [tuple(record.values()) for record in records("glue", path, *fields)]
    assert found == expected
    sentences = 1 if one else 2
    documents = texts(path, format="glue")
    assert documents == ["\n".join(row[:sentences]) for row in expected]


def test_broken_lines_of_glue(tmp_path):
    path = tmp_path / "train.tsv"
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    good = "1\t2\t3\tHow?\tWhy?\t0\n"
    path.write_text(head + good + "4\t5\tcut in\n" + good)
    assert "line 3: it has 3 columns, where the first line has 6" in refused("glue", path)
    found, left_out = records("glue", path, skip=True)
    assert len(found) == 2 and left_out.broken == 1


def test_what_is_not_of_glue_is_refused(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("name\tvalue\na\tb\n")
    assert "is no file of GLUE: its first line is ['name', 'value']" in refused("glue", path)
    path.write_text(GLUE["SST-2/train.tsv"][0])
    assert 'has no "sentence2"; this file of GLUE has "sentence1", "label"' in refused(
        "glue", path, "sentence2"
    )


# SQuAD

CONTEXT = "The Normans were in Normandy, a region in France, in the 10th century."


def squad(version, **second):
    question = {
        "question": "Where is Normandy?",
        "id": "56ddde6b9a695914005b9628",
        "answers": [{"text": "France", "answer_start": CONTEXT.index("France")}] * 2,
    }
    other = {
        "question": "What is Norse?",
        "id": "5ad39d53604f3c001a3fe8d1",
        "answers": [],
    }
    if version == "v2.0":
        question["is_impossible"] = False
        other["is_impossible"] = True
        other["plausible_answers"] = [{"text": "Normans", "answer_start": 4}]
    else:
        other["answers"] = [{"answer_start": 4, "text": "Normans"}]
    other.update(second)
    paragraph = {"qas": [question, other], "context": CONTEXT}
    more = {"qas": [], "context": "Another context."}
    return {"version": version, "data": [{"title": "Normans", "paragraphs": [paragraph, more]}]}


@pytest.mark.parametrize("version", ["1.1", "v2.0"])
def test_squad_as_distributed(tmp_path, version):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(squad(version)))
    assert texts(path, format="squad") == [CONTEXT, "Another context."]
    fields = "id", "question", "answer", "impossible"
    assert [tuple(record.values()) for record in records("squad", path, *fields)] == [
        ("56ddde6b9a695914005b9628", "Where is Normandy?", "France", "false"),
        ("5ad39d53604f3c001a3fe8d1", "What is Norse?")
        + (("Normans", "false") if version == "1.1" else ("", "true")),
    ]
    streams = texts(path, format="squad", fields=("question", "answer"), parallel=True)
    assert streams[1] == (["France", "Normans"] if version == "1.1" else ["France"])


@pytest.mark.parametrize(
    "second, reason",
    [
        ({"answers": [{"text": "Normans", "answer_start": 5}]}, "its answer 'Normans' is not at"),
        ({"answers": []}, "it is not as SQuAD has it"),
        ({"answers": None}, "it is not as SQuAD has it"),
        ({"question": "a\0"}, "it has a text with a NUL character"),
    ],
)
def test_broken_questions(tmp_path, second, reason):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(squad("1.1", **second)))
    place = "question 5ad39d53604f3c001a3fe8d1 of paragraph 1"
    assert f"{path}, {place}: {reason}" in refused("squad", path, "question", "answer")
    found, left_out = records("squad", path, "question", skip=True)
    assert found == [{"question": "Where is Normandy?"}] and left_out.broken == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"data": [\n{"title": "a",}]}', "line 2: it is not JSON ("),
        (b"[]", 'is not as SQuAD is: an object with a list "data"'),
        (b'{"data": 3}', 'is not as SQuAD is: an object with a list "data"'),
        (b'{"data": [{"title": "a"}]}', 'paragraph 1: it lacks its "context" or "qas"'),
        (b'{"data": ["a"]}', 'paragraph 1: it lacks its "context" or "qas"'),
        (b'{"data": "\xff"}', "is not UTF-8 text: byte 10 is at fault"),
    ],
)
def test_what_is_not_squad_is_refused(tmp_path, content, message):
    path = tmp_path / "train.json"
    path.write_bytes(content)
    assert message in refused("squad", path)
    assert 'SQuAD has no "text"; it has "id", "title"' in refused("squad", path, "text")


# CNN/DailyMail

STORY = """(CNN) -- The first paragraph of the story, in a line of its own.

The second one
goes over two lines.

@highlight

The first point

@highlight

NEW: The second point
"""


def test_stories(tmp_path):
    for number in (1, 2):
        path = tmp_path / f"{number:040x}.story"
        path.write_text(STORY, encoding="utf-8")
    article = (
        "(CNN) -- The first paragraph of the story, in a line of its own.\n"
        "The second one\ngoes over two lines."
    )
    highlights = "The first point\nNEW: The second point"
    files = tuple(sorted(tmp_path.iterdir()))
    assert texts(*files) == [article] * 2
    assert texts(*files, parallel=True) == [[article] * 2, [highlights] * 2]
    assert texts(files[0], fields=("highlights",)) == [highlights]


def test_a_story_without_highlights_has_no_summary(tmp_path):
    path = tmp_path / "a.story"
    path.write_text(STORY.partition("@")[0])
    assert len(texts(path)) == 1
    assert "its end: the story has no @highlight" in refused("story", path, "highlights")
    assert texts(path, parallel=True, skip=True) == [[], []]
    assert 'a story has no "title"; "article" or "highlights"' in refused("story", path, "title")
