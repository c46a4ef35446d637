"""The page: whole in itself, well-formed, small, and safe whatever a model writes."""

import json
import re
from html.parser import HTMLParser

import pytest

from horovod_lm.report.charts import thin
from horovod_lm.report.page import render_page
from tests.unit.report_runs import make_comparison

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = '</script><script>alert(1)</script> & "quoted" <img src=x onerror=alert(1)>'


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


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    comparison = make_comparison(tmp_path_factory.mktemp("runs"), sample=HOSTILE)
    return render_page(comparison)


def test_the_page_is_well_formed_and_says_the_verdict_first(page):
    parsed = parse(page)
    text = "".join(parsed.text)
    assert text.index("The two backends train the same model") < text.index("The figures")
    assert [tag for tag, _ in parsed.tags].count("svg") == 4
    for question in (
        "Do the losses coincide?", "How far apart are they?",
        "Which one is faster, round by round?", "Where does a step’s time go?",
    ):  # fmt: skip
        assert question in text
    assert "[schedule]" in text


def test_the_page_needs_no_network(page):
    parsed = parse(page)
    for tag, attributes in parsed.tags:
        assert tag not in {"link", "img", "iframe", "image"}
        for name in ("src", "href", "xlink:href", "action"):
            assert not (attributes.get(name) or "").startswith(("http", "//")), attributes
    assert "@import" not in page and "@font-face" not in page
    assert not re.findall(r"url\((?!#)", page)


def test_what_a_model_writes_can_not_become_markup(page):
    parsed = parse(page)
    assert HOSTILE in "".join(parsed.text)
    assert [tag for tag, _ in parsed.tags].count("script") == 2


def test_the_charts_follow_the_colours_of_the_page(page):
    svg = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--first" in svg and "var(--second" in svg and "var(--ink" in svg
    fixed = set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r"var\([^)]*\)", "", svg)))
    assert fixed <= {"#ffffff"}, fixed
    assert "<text" in svg  # text, not outlines


def test_identities_are_unique(page):
    identities = [a["id"] for _, a in parse(page).tags if "id" in a]
    assert len(identities) == len(set(identities))


def test_the_data_of_the_charts_is_in_the_page(page):
    data = json.loads(parse(page).data[0])
    assert set(data) == {"losses", "apart", "rounds"}
    assert data["rounds"]["series"]["TensorFlow"][0] == pytest.approx(10240)
    assert len(data["losses"]["x"]) == len(data["losses"]["series"]["PyTorch"]) == 120


def test_ten_thousand_steps_stay_small(tmp_path):
    page = render_page(make_comparison(tmp_path, steps=10_000))
    parse(page)
    assert len(page.encode()) < 400_000


def test_thinning_keeps_peaks_and_ends():
    values = [0.0] * 5000
    values[1234], values[4321] = 7.0, -3.0
    kept = thin(range(5000), [values], 200)
    assert {0, 1234, 4321, 4999} <= set(kept)
    assert len(kept) <= 202 and kept == sorted(kept)
    assert thin(range(5), [values[:5]], 200) == [0, 1, 2, 3, 4]


def test_hover_knows_where_the_axes_are_drawn(page):
    data = json.loads(parse(page).data[0])
    for identity, hover in data.items():
        svg = re.search(rf'<figure id="{identity}">.*?</svg>', page, re.DOTALL).group()
        width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
        # matplotlib's second patch is the background of the axes
        path = re.search(rf'id="{identity}-patch_2">\s*<path d="([^"]*)"', svg).group(1)
        numbers = list(map(float, re.findall(r"-?[\d.]+", path)))
        xs, ys = numbers[0::2], numbers[1::2]
        drawn = [min(xs) / width, min(ys) / height, max(xs) / width, max(ys) / height]
        assert hover["axes"] == pytest.approx(drawn, abs=2e-3), identity
