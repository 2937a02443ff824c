"""The pages in a real browser: they load offline, complain of nothing, and can be read on a telephone and on a desk."""

import os

import pytest

from lsr_scale.report.write import write_comparison, write_report
from lsr_scale.run.compare import compare
from tests.helpers.browser import NAMES, Browser, find_browser
from tests.helpers.run_folders import choice_rows, losses, write_run
from tests.report.test_page import HOSTILE, SAMPLES

LOOKS_AT_PICTURES = True
PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"no browser here (none of {', '.join(NAMES)})")

# every text that is shown, with its size on the screen: that of a figure is scaled with it
TEXTS = """
(() => {
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim(), element = walk.currentNode.parentElement;
    if (!text || !element.getClientRects().length) continue;
    const matrix = element.ownerSVGElement ? element.getScreenCTM() : {a: 1, b: 0};
    const scale = Math.hypot(matrix.a, matrix.b);
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height || getComputedStyle(element).clipPath !== 'none') continue;
    if (element.closest('thead') && getComputedStyle(element.closest('thead')).position === 'absolute') continue;
    found.push([text.slice(0, 40), parseFloat(getComputedStyle(element).fontSize) * scale]);
  }
  return found;
})()
"""
FIGURES = """
[...document.querySelectorAll('figure')].map(figure =>
  [...figure.querySelectorAll('svg, img')].map(one => one.getBoundingClientRect())
    .filter(box => box.width > 0 && box.height > 0).map(box => [box.width, box.height]))
"""
WIDEST = """
Math.max(...[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg, thead'))
  .map(e => e.getBoundingClientRect().right))
"""
# WCAG's contrast of each text with the page behind it
CONTRASTS = """
(() => {
  const light = c => {
    const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126*v[0] + 0.7152*v[1] + 0.0722*v[2];
  };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (c !== 'rgba(0, 0, 0, 0)' && c !== 'transparent') return c; } return 'rgb(255, 255, 255)'; };
  const found = [];
  for (const e of document.querySelectorAll('h1,h2,h3,p,td,th,dt,dd,small,li,summary,a,code,figcaption,svg text')) {
    if (!e.textContent.trim()) continue;
    const style = getComputedStyle(e), a = light(e.ownerSVGElement ? style.fill : style.color), b = light(behind(e));
    found.push([e.textContent.trim().slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def browser():
    with Browser(PROGRAM) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    answers = {
        "arc_easy-before": choice_rows([False, True] * 20),
        "arc_easy-after": choice_rows([True] * 30 + [False] * 10),
    }
    runs = []
    for number in range(12):
        metrics = losses(offset=number / 10)
        for row in metrics:
            row["condition_up_median"], row["condition_up_max"] = 1.0, 1.2
        changes = {"adapter": {"rank": number}, "training": {"a_key_of_" + "many_letters" * 8: "long-value-" * 20}}
        notes = {"notes": ["data.train: training.max_length (12) cuts 5 of 64 rows", HOSTILE, "/a/long/path" * 20]}
        run = folder / f"run-{number}-{'with-a-long-name' * 3}"
        runs.append(write_run(run, changes, notes, metrics, answers, samples=SAMPLES))
    found = {"run": write_report(runs[0], folder / "run.html", planned=False)}
    for name, several in (("two", runs[:2]), ("twelve", runs)):
        found[name] = folder / f"{name}.html"
        write_comparison(compare(several), found[name])
    return found


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("page", ["run", "two", "twelve"])
def test_a_page_loads_offline_and_can_be_read(browser, pages, page, width):
    browser.open(pages[page], width)
    assert browser.complaints() == []
    assert [address for address in browser.requests() if not address.startswith("data:")] == [pages[page].as_uri()]
    figures = browser.evaluate(FIGURES)
    assert len(figures) >= 1
    for shown in figures:
        assert len(shown) == 1, "drawn twice, for a wide and a narrow screen, and shown once"
        assert shown[0][0] > 300
        assert shown[0][1] > 200
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(WIDEST) <= width
    texts = browser.evaluate(TEXTS)
    assert len(texts) > 40
    assert [(text, size) for text, size in texts if not 9.5 <= size <= 32] == []
    assert min(size for text, size in texts if text in ("loss, nats per token", "step")) >= 10


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", ["run", "two"])
def test_every_text_stands_out_from_the_page(browser, pages, page, dark):
    browser.open(pages[page], 1400, dark)
    assert (browser.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)") == dark
    assert [(text, contrast) for text, contrast in browser.evaluate(CONTRASTS) if contrast < 4.5] == []


def test_hostile_values_run_nothing(browser, pages):
    browser.open(pages["run"], 1400)
    assert browser.evaluate("document.scripts.length") == 0
    assert "<script>alert(1)</script>" in browser.evaluate("document.body.innerText")


def test_a_page_is_noticed_that_loads_something_or_is_too_wide(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<img src='http://127.0.0.1:9/x.png'><script>console.error(1)</script><div style='width:5000px'>x</div>"
    )
    browser.open(bad, 400)
    assert browser.complaints()
    assert len(browser.requests()) == 2
    assert browser.evaluate("document.documentElement.scrollWidth") > 400


@pytest.mark.skipif(not os.environ.get("KEEP_SCREENSHOTS"), reason="KEEP_SCREENSHOTS=FOLDER keeps pictures to look at")
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_screenshots_to_look_at(browser, pages, tmp_path, width, dark):
    from pathlib import Path

    for name, page in pages.items():
        browser.open(page, width, dark)
        browser.screenshot(Path(os.environ["KEEP_SCREENSHOTS"]) / f"{name}-{width}{'-dark' if dark else ''}.png")
