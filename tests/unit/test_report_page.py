"""The page: whole in itself, well-formed, small, and safe whatever a model writes."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from horovod_lm.report.drawing import thin
from horovod_lm.report.page import render_page
from tests.unit.report_runs import make_comparison
from tests.unit.report_variants import make_variants

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = '</script><script>alert(1)</script> & "quoted" <img src=x onerror=alert(1)>'
QUESTIONS = {
    "losses": "Do the losses coincide?",
    "apart": "How far apart are they?",
    "norms": "Do the gradients coincide?",
    "ratios": "Which one is faster?",
    "rounds": "Did the speeds hold from round to round?",
    "parts": "Where does a step’s time go?",
    "memory": "How much memory does it take?",
}


class Checker(HTMLParser):
    """Collects elements, text and script contents; fails on tags that do not match."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.data = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        (self.data if self.open[-1:] == ["script"] else self.text).append(data)


def parse(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def data_of(page):
    return json.loads(parse(page).data[0])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    comparison = make_comparison(tmp_path_factory.mktemp("runs"), sample=HOSTILE)
    return render_page(comparison)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Five runs in fp16, with sketches of their weights, profiles and three seeds."""
    return make_variants(tmp_path_factory.mktemp("many"), 5, HOSTILE)


@pytest.fixture(scope="module")
def page_of_many(many):
    return render_page(many)


def test_the_page_is_well_formed_and_says_the_verdict_first(page):
    parsed = parse(page)
    text = "".join(parsed.text)
    assert text.index("The two backends train the same model") < text.index("The figures")
    titles = re.findall(r'<figure id="(\w+)">\s*<h3>(.*?)</h3>', page)
    assert dict(titles) == QUESTIONS
    assert [tag for tag, _ in parsed.tags].count("svg") == len(QUESTIONS)
    assert "[schedule]" in text


def test_the_page_of_many_runs_has_every_chart(many, page_of_many):
    parsed = parse(page_of_many)
    data = data_of(page_of_many)
    weights = {f"weights{which}" for which in many.others}
    assert set(data["charts"]) == {*QUESTIONS, "seeds", "scales", "kinds", *weights}
    assert data["runs"] == many.names and len(set(many.names)) == 5
    text = "".join(parsed.text)
    assert "In what the runs differ" in text and "launch.threads" in text


@pytest.mark.parametrize("which", ["page", "page_of_many"])
def test_the_page_needs_no_network(which, request):
    page = request.getfixturevalue(which)
    for tag, attributes in parse(page).tags:
        assert tag not in {"link", "img", "iframe", "image"}
        for name in ("src", "href", "xlink:href", "action"):
            assert not (attributes.get(name) or "").startswith(("http", "//")), attributes
    assert "@import" not in page and "@font-face" not in page
    assert not re.findall(r"url\((?!#)", page)


@pytest.mark.parametrize("which", ["page", "page_of_many"])
def test_what_a_model_writes_can_not_become_markup(which, request):
    parsed = parse(request.getfixturevalue(which))
    assert HOSTILE in "".join(parsed.text)
    assert [tag for tag, _ in parsed.tags].count("script") == 2


def test_the_charts_follow_the_colours_of_the_page(page_of_many):
    svg = "".join(re.findall(r"<svg.*?</svg>", page_of_many, re.DOTALL))
    for name in ("--run0", "--run4", "--ink", "--faint"):
        assert f"var({name}," in svg
        assert len(re.findall(rf"{name}: #", page_of_many)) == 2  # light (and print), dark
    assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r"var\([^)]*\)", "", svg))
    assert "<text" in svg  # text, not outlines


@pytest.mark.parametrize("which", ["page", "page_of_many"])
def test_identities_are_unique(which, request):
    tags = parse(request.getfixturevalue(which)).tags
    identities = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(identities) == len(set(identities))


def test_the_data_of_every_chart_is_in_the_page(page, page_of_many):
    for data in (data_of(page), data_of(page_of_many)):
        assert data["schema"] == 1
        for chart in data["charts"].values():
            assert chart["title"] and chart["y"] and chart["series"]
            for values in chart["series"].values():
                assert len(values) == len(chart["values"])
    charts = data_of(page)["charts"]
    assert charts["rounds"]["series"]["TensorFlow"][0] == pytest.approx(10240)
    assert charts["losses"]["values"] == list(range(1, 121))
    assert charts["memory"]["series"]["PyTorch"] == [812.3, 1601.2]


def test_skipped_steps_and_the_scale_are_those_of_the_run(many, page_of_many):
    series = data_of(page_of_many)["charts"]["scales"]["series"]
    first = many.runs[0]
    assert series[many.names[0]] == [row["loss_scale"] for row in first.steps]
    skipped = [float(row["overflow"] is not None) for row in first.steps]
    assert series[f"{many.names[0]}, skipped"] == skipped and sum(skipped) == 2


def test_the_drift_of_the_weights_is_the_same_for_programs(many, page_of_many):
    charts = data_of(page_of_many)["charts"]
    for which, variant in enumerate(many.as_json()["variants"]):
        if which == 0:
            assert variant["weight_drift"] is None
            continue
        chart, figures = charts[f"weights{which}"], variant["weight_drift"]
        assert figures["against"] == many.labels[0]
        assert figures["steps"] == chart["values"]
        assert figures["layers"].keys() == chart["series"].keys()
        for name, values in figures["layers"].items():
            assert values == pytest.approx(chart["series"][name], rel=1e-5), name


def test_ten_thousand_steps_stay_small(tmp_path):
    page = render_page(make_comparison(tmp_path, steps=10_000))
    parse(page)
    assert len(page.encode()) < 350_000


def test_five_runs_of_ten_thousand_steps_stay_small(tmp_path):
    page = render_page(make_variants(tmp_path, 5, steps=10_000))
    assert len(page.encode()) < 500_000


def test_thinning_keeps_peaks_and_ends():
    values = np.zeros(5000)
    values[1234], values[4321] = 7.0, -3.0
    gaps = np.where(np.arange(5000) % 2, np.nan, 0.0)
    kept = thin([values, gaps], 200).tolist()
    assert {0, 1234, 4321, 4999} <= set(kept)
    assert len(kept) <= 200 and kept == sorted(kept)
    assert thin([values[:5]], 200).tolist() == [0, 1, 2, 3, 4]


def test_hover_knows_where_the_axes_are_drawn(page_of_many):
    for identity, chart in data_of(page_of_many)["charts"].items():
        if not chart["plot"]:
            continue
        svg = re.search(rf'<figure id="{identity}">.*?</svg>', page_of_many, re.DOTALL).group()
        width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
        # matplotlib's second patch is the background of the axes
        path = re.search(rf'id="{identity}-patch_2">\s*<path d="([^"]*)"', svg).group(1)
        numbers = list(map(float, re.findall(r"-?[\d.]+", path)))
        xs, ys = numbers[0::2], numbers[1::2]
        drawn = [min(xs) / width, min(ys) / height, max(xs) / width, max(ys) / height]
        assert chart["plot"]["axes"] == pytest.approx(drawn, abs=2e-3), identity


def test_names_at_the_ends_of_lines_do_not_overlap(page_of_many):
    for identity in ("losses", "norms", "rounds", "apart"):
        svg = re.search(rf'<figure id="{identity}">.*?</svg>', page_of_many, re.DOTALL).group()
        names = re.findall(r'<text style="[^"]*fill: var\(--run[^>]*>', svg)
        places = [re.search(r'(?: y="|translate\([\d.]+ )([\d.]+)', name)[1] for name in names]
        heights = sorted(map(float, places))
        assert len(heights) >= 4, identity
        gaps = np.diff(heights)
        assert gaps.min() > 10, (identity, heights)
