"""The page of a comparison as a person sees it: in a real browser, wide and on a phone, light and
dark, touched and printed. Pictures of it are left in build/artefacts."""

import json
import struct
from pathlib import Path

import pytest

from horovod_lm.report.page import write_page
from tests.browser.browser import PROGRAM, Browser, Page
from tests.unit.report_runs import make_comparison
from tests.unit.report_variants import make_variants

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="needs Chromium; scripts/test.sh --system installs it"
)
ARTEFACTS = Path(__file__).resolve().parents[2] / "build" / "artefacts"
# Elements of the page that stick out of it to the right, and do not scroll within a box.
SPILLED = """
[...document.querySelectorAll("body *")].filter((e) =>
  e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, pre, svg")
).map((e) => e.tagName + " " + e.textContent.slice(0, 60))
"""
# The texts of a chart that lie over each other, as pairs.
COLLIDING = """
[...document.querySelectorAll("figure")].flatMap((figure) => {
  const texts = [...figure.querySelectorAll("svg text")].map(
    (e) => [e.textContent, e.getBoundingClientRect()]);
  return texts.flatMap(([a, x], i) => texts.slice(i + 1).filter(([b, y]) =>
    Math.min(x.right, y.right) - Math.max(x.left, y.left) > 1.5 &&
    Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top) > 4
  ).map(([b]) => `${figure.id}: ${a} | ${b}`));
})
"""
CUT = """
[...document.querySelectorAll("figure")].flatMap((figure) => {
  const box = figure.querySelector("svg").getBoundingClientRect();
  return [...figure.querySelectorAll("svg text")].filter((e) => {
    const b = e.getBoundingClientRect();
    return b.left < box.left - 1 || b.right > box.right + 8 || b.top < box.top - 1;
  }).map((e) => `${figure.id}: ${e.textContent}`);
})
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A page of two runs and one of five, with every chart there is."""
    folder = tmp_path_factory.mktemp("pages")
    comparisons = {
        "two": make_comparison(folder / "two-runs"),
        "five": make_variants(folder / "five-runs", 5),
    }
    for name, comparison in comparisons.items():
        write_page(comparison, folder / f"{name}.html")
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    return {name: folder / f"{name}.html" for name in comparisons}


@pytest.fixture
def look(browser, files):
    """Opens a page; at the end nothing may have gone wrong in it."""
    opened = []

    def open_page(name, width, dark=False):
        opened.append((Page(browser, files[name], width, dark), files[name]))
        return opened[-1][0]

    yield open_page
    for page, path in opened:
        assert page.complaints() == []
        assert [url for url in page.requests() if not url.startswith("blob:")] == [path.as_uri()]
        page.close()


@pytest.mark.parametrize("name", ["two", "five"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1200])
def test_nothing_spills_collides_or_complains(look, name, width, dark):
    page = look(name, width, dark)
    page.screenshot(ARTEFACTS / f"page-{name}-{width}-{'dark' if dark else 'light'}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(SPILLED) == []
    assert page.evaluate(COLLIDING) == []
    assert page.evaluate(CUT) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_can_be_read_on_its_paper(look, dark):
    page = look("five", 1200, dark)
    paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper < 0.05) == dark
    colours = page.evaluate(
        "[...new Set([...document.querySelectorAll('p, th, td, figcaption, text, button')]"
        ".map((e) => e.tagName === 'text' ? getComputedStyle(e).fill : getComputedStyle(e).color))]"
    )
    assert len(colours) >= 7  # ink, soft, and five runs
    for colour in colours:
        light, deep = sorted((luminance(colour), paper), reverse=True)
        assert (light + 0.05) / (deep + 0.05) >= 4.5, colour  # WCAG AA


def luminance(colour):
    """Relative luminance (WCAG 2) of `rgb(r, g, b)`."""
    channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_texts_of_charts_are_large_enough_on_a_phone(look):
    page = look("two", 360)
    heights = page.evaluate(
        "[...document.querySelectorAll('svg text')].map((e) => e.getBoundingClientRect().height)"
    )
    assert min(heights) >= 9.5


def test_the_pointer_shows_the_values_below_it(look):
    page = look("two", 1200)
    box = page.evaluate(
        "(() => { const p = document.querySelector('#losses .plot'); p.scrollIntoView();"
        "const b = p.getBoundingClientRect(); return [b.x, b.y, b.width, b.height] })()"
    )
    data = json.loads(page.evaluate("document.getElementById('data').textContent"))
    chart = data["charts"]["losses"]
    left, _, right, _ = chart["plot"]["axes"]
    low, high = chart["plot"]["limits"]
    share = left + (40 - low) / (high - low) * (right - left)  # where step 40 is
    page.move(box[0] + share * box[2], box[1] + box[3] / 2)
    shown = page.evaluate("document.querySelector('#losses .values').innerText.split('\\n')")
    at = chart["values"].index(40)
    wanted = [f"{name} {values[at]}" for name, values in chart["series"].items()]
    assert shown == ["step 40", *wanted]
    cursor = page.evaluate("document.querySelector('#losses .cursor').getBoundingClientRect().x")
    assert cursor == pytest.approx(box[0] + share * box[2], abs=1.5)
    page.screenshot(ARTEFACTS / "page-pointer.png")
    page.move(5, 5)
    assert page.evaluate("document.querySelectorAll('.values, .cursor').length") == 0


def test_the_table_is_copied_as_a_spreadsheet_reads_it(look):
    page = look("two", 1200)
    page.evaluate(
        "document.addEventListener('copy', (e) => setTimeout(() => 0), true);"
        "window.copied = null; const set = DataTransfer.prototype.setData;"
        "DataTransfer.prototype.setData = function (type, text) {"
        "  window.copied = text; return set.call(this, type, text); }"
    )
    page.click("#copy")
    rows = [line.split("\t") for line in page.evaluate("window.copied").splitlines()]
    assert rows[0] == ["", "PyTorch", "TensorFlow", "compared"]
    assert rows[1] == ["loss of the last step, nats", "4.6880", "4.6880", "equal"]
    assert {len(row) for row in rows} == {4}


@pytest.mark.parametrize("selector", ["#losses .save", "#json"])
def test_charts_and_data_can_be_saved(look, selector):
    page = look("two", 1200)
    page.evaluate(
        "window.saved = []; const make = URL.createObjectURL;"
        "URL.createObjectURL = (blob) => { saved.push(blob); return make(blob); };"
        "HTMLAnchorElement.prototype.click = function () { saved.push(this.download); }"
    )
    page.click(selector)
    text, name = page.evaluate("Promise.all([saved[0].text(), saved[1]])")
    if name == "charts.json":
        assert set(json.loads(text)["charts"]) >= {"losses", "apart", "rounds"}
        return
    assert name == "losses.svg" and text.startswith("<svg")
    assert "var(" not in text and "#0072b2" in text  # it stands alone
    # A browser shows a broken SVG as an error: this one parses.
    assert page.evaluate(
        "new DOMParser().parseFromString(" + json.dumps(text) + ", 'image/svg+xml')"
        ".querySelector('parsererror') === null"
    )


def test_paper_shows_all_of_it(look, files):
    page = look("five", 1200, dark=True)
    page.print(ARTEFACTS / "page.pdf")
    assert (ARTEFACTS / "page.pdf").read_bytes().startswith(b"%PDF")
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    page.ask("Emulation.setEmulatedMedia", media="print")
    paper = page.evaluate("getComputedStyle(document.body).getPropertyValue('--paper').trim()")
    assert paper == "#ffffff"  # also where the screen is dark
    hidden = "[...document.querySelectorAll('button')].every((e) => e.offsetParent === null)"
    assert page.evaluate(hidden)
    charts = (
        "[...document.querySelectorAll('svg')].every((e) => e.getBoundingClientRect().width > 99)"
    )
    assert page.evaluate(charts)


def test_a_fault_in_the_page_is_seen(browser, files, tmp_path):
    # The checks above are worth nothing if the browser does not tell.
    broken = tmp_path / "broken.html"
    text = files["two"].read_text().replace(
        "</body>",
        "<script>console.error('hear me'); fetch('https://example.invalid/x').catch(() => 0);"
        "undefined_function()</script><div style='width:3000px'>wide</div></body>",
    )  # fmt: skip
    broken.write_text(text)
    page = Page(browser, broken, 360)
    told = " ".join(page.complaints())
    assert "hear me" in told and "undefined_function is not defined" in told
    assert "https://example.invalid/x" in page.requests()
    assert page.evaluate(SPILLED) == ["DIV wide"]
    page.close()


def test_ten_thousand_steps_open_fast(browser, tmp_path):
    path = tmp_path / "long.html"
    write_page(make_comparison(tmp_path / "runs", steps=10_000), path)
    page = Page(browser, path, 1200)
    milliseconds = page.evaluate("performance.getEntriesByType('navigation')[0].duration")
    assert milliseconds < 3000, "a second on a quiet machine"
    page.screenshot(tmp_path / "long.png")
    width, height = struct.unpack(">II", (tmp_path / "long.png").read_bytes()[16:24])
    assert width == 1200 and 1000 < height < 9000
    page.close()
