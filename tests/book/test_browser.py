"""The built pages in a browser, Debian's Chromium: on a desktop and a phone, light and dark.

Nothing is wider than its box, nothing is asked of another address, no script fails, axe-core finds
nothing, the tab key gets through, controls work by keyboard, and a page is light.
"""

import shutil
from pathlib import Path

import axe_core_python
import pytest
from playwright.sync_api import sync_playwright

from .test_built import HTML, PAGES

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VIEWS = {"desktop": (1440, 900), "phone": (390, 844)}
STOPS, COLD, WARM = 120, 2.5e6, 1e6                      # tab stops of a page; bytes, as stored
AXE = next(Path(axe_core_python.__file__).parent.rglob("axe.min.js"))
WIDE = """() => {
  const page = document.documentElement;
  const found = page.scrollWidth > page.clientWidth + 1 ? [`the page: ${page.scrollWidth}`] : [];
  for (const box of document.querySelectorAll(
      ".bd-article pre, .bd-article div.math, .bd-article img, .bd-article .moving")) {
    if (box.scrollWidth > box.clientWidth + 2 && box.clientWidth) {
      found.push(`${box.className || box.tagName}: ${box.scrollWidth} > ${box.clientWidth}: `
        + box.textContent.trim().slice(0, 60));
    }
  }
  return found;
}"""
STOPPED = """() => [...document.querySelectorAll(
  "a[href], button, input, select, textarea, summary, [tabindex]")].filter(
  (one) => one.tabIndex >= 0 && one.checkVisibility()
    && !one.closest("nav, .bd-sidebar-primary, .bd-sidebar-secondary, .bd-header-article")).length"""
# Left out, for time: formulas, which are MathJax's and have MathML beside them, and the insides of
# code, whose colours are the same everywhere and are looked at on the first page.
AXE_RUN = """(within) => axe.run({exclude: [["mjx-container"], ...within]},
                                 {resultTypes: ["violations"]}).then(
  (found) => found.violations.map(({id, nodes}) => `${id}: ${nodes.length}, ${nodes[0].html}`))"""

pytestmark = [
    pytest.mark.skipif(not HTML.is_dir(), reason="the book is not built: make book"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM,
                                         args=["--no-sandbox", "--disable-gpu"])


class Seen:
    """A page as a browser has opened it, with what it asked for and what it complained of."""

    def __init__(self, browser, name, view):
        self.name, self.view = name, view
        width, height = VIEWS[view]
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(240_000)
        self.errors, self.asked = [], set()
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(request.url.split("#")[0]))
        self.page.goto((HTML / "book" / f"{name}.html").as_uri())
        self.page.wait_for_load_state("networkidle")
        self.page.wait_for_function("() => !window.MathJax || MathJax.startup.promise")

    def axe(self):
        self.page.evaluate(AXE.read_text("utf8"))
        return self.page.evaluate(AXE_RUN, [] if self.name == "index" else [[".highlight pre > span"]])

    def files(self):
        return {Path(url[7:].split("?")[0]) for url in self.asked if url.startswith("file://")}


@pytest.fixture(scope="module", params=[(name, view) for name in PAGES for view in VIEWS],
                ids=lambda one: "-".join(one))
def seen(request, browser):
    found = Seen(browser, *request.param)
    yield found
    found.page.close()


def test_a_page_runs_alone_and_without_an_error(seen):
    assert seen.errors == []
    assert {url for url in seen.asked if not url.startswith(("file:", "data:"))} == set()


def test_nothing_is_wider_than_its_box(seen):
    assert seen.page.evaluate(WIDE) == []


def test_axe_finds_nothing_on_a_desktop_in_light_and_a_phone_in_the_dark(seen):
    if seen.view == "phone":
        seen.page.evaluate("() => { document.documentElement.dataset.theme = 'dark'; }")
        seen.page.wait_for_timeout(300)                     # colours fade over
    assert seen.axe() == []


def test_the_tab_key_gets_through(seen):
    assert seen.page.evaluate(STOPPED) <= STOPS


def test_a_page_is_light(seen):
    """When it opens, and once all of its own is there: pictures further down come later."""
    assert sum(path.stat().st_size for path in seen.files() if path.is_file()) < COLD
    pictures = seen.page.evaluate("() => [...document.images].map((image) => image.src)")
    own = {HTML / "book" / f"{seen.name}.html", *(
        Path(url[7:].split("?")[0]) for url in pictures if url.startswith("file://"))}
    weight = sum(path.stat().st_size for path in own)
    assert weight < WARM


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["01_idea", "03_initialization", "05_training",
                                  "07_hyperparameters", "10_real_model", "11_many_adapters"])
def test_every_control_of_a_figure_works_by_keyboard(browser, name, view):
    """A slider, a choice, a number or an answer is reached by Tab and changed by the keyboard."""
    page = Seen(browser, name, view).page
    figures = page.locator(".moving")
    assert figures.count() > 0
    for i in range(figures.count()):
        figure = figures.nth(i)
        for kind, key in (("input[type=range]", "ArrowRight"), ("input[type=number]", "ArrowUp"),
                          ("select", "ArrowDown"), ("input[type=radio]", "Space")):
            for j in range(figure.locator(kind).count()):
                control = figure.locator(kind).nth(j)
                if not (control.is_visible() and control.is_enabled()):    # another choice stands
                    continue
                state = lambda: control.evaluate("(one) => [one.value, one.checked]")
                control.focus()
                assert control.evaluate("(one) => one === document.activeElement")
                before = state()
                page.keyboard.press(key)
                if state() == before:                       # it stood at its end
                    page.keyboard.press({"ArrowRight": "ArrowLeft", "ArrowUp": "ArrowDown",
                                         "ArrowDown": "ArrowUp"}.get(key, key))
                assert state() != before or before[1], f"{kind} {j} of figure {i}"
    page.close()
