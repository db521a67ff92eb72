"""The page in a headless Chromium: no errors, nothing outside the window, readable, usable by keyboard.

Without a Chromium these tests are skipped, except where CI is set: there they fail.
"""

import os
import shutil
from contextlib import contextmanager

import pytest

from dsr_tool.report.page.page import write_page
from dsr_tool.report.sources import read
from dsr_tool.report.tables import report_document

ARGUMENTS = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync")
HOSTILE = "<img src=x onerror=alert(1)><script>document.title = 'taken'</script>\u202e{}"
SIZES = {"narrow": (320, 640), "phone": (360, 740), "desk": (1440, 900)}
SCHEMES = ("light", "dark")


def chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


pytestmark = pytest.mark.skipif(chromium() is None and not os.environ.get("CI"), reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    executable = chromium()
    assert executable, "CI is set, so there must be a Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=[*ARGUMENTS, "--no-first-run"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def files(model_folder, run_folder, exported, make_source, compacted, extras, tmp_path_factory):
    """Pages of a run, a model folder, exported files, and of many layers with long names."""
    folder = tmp_path_factory.mktemp("pages")
    long = "features.denseblock{0}.denselayer{0}.a_name_without_any_place_to_break_a_line_at.weight"
    sources = {"run": read(run_folder), "folder": read(model_folder), "many": make_source(120, long, "x" * 90)}
    sources["hostile"] = make_source(3, HOSTILE.format("{0}"), HOSTILE.format(9))
    sources |= {"compacted": compacted, **{kind: read(path) for kind, path in exported.items()}}
    for name, source in sources.items():
        write_page(folder / f"{name}.html", source, {**report_document(source), **extras})
    return {name: folder / f"{name}.html" for name in sources}


@pytest.fixture
def opened(browser, files):
    """Opens pages; at the end, asserts that no page wrote to the console or loaded anything else."""

    @contextmanager
    def call(name, size="desk", **options):
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        tab, messages = context.new_page(), []
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("requestfailed", lambda request: messages.append(f"failed: {request.url[:80]}"))
        address = files[name].as_uri()
        tab.on("request", lambda request: messages.append(request.url) if _elsewhere(request.url, address) else None)
        tab.goto(address)
        yield tab
        context.close()
        assert messages == []

    return call


def _elsewhere(url, address):
    return not url.startswith("data:") and url.partition("#")[0] != address


OUTSIDE = """() => [...document.querySelectorAll('body *')].filter(element => {
  if (element.closest('.scroll, .hidden, .skip, defs, title')) return false;
  const box = element.getBoundingClientRect();
  return box.width > 0 && (box.left < -1 || box.right > innerWidth + 1);
}).map(element => element.outerHTML.slice(0, 120))"""

SMALL = """() => [...document.querySelectorAll('body *')].filter(element =>
  [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
  && !element.closest('title, option, sub, sup')
  && parseFloat(getComputedStyle(element).fontSize) < 12).map(element => element.outerHTML.slice(0, 120))"""

CONTRAST = """
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => numbers(colour).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if ((numbers(colour)[3] ?? 1) === 1) return colour;
    }
  };
  const contrast = (ink, element) => {
    const [a, b] = [light(ink), light(paper(element))].sort((x, y) => x - y);
    return (b + 0.05) / (a + 0.05);
  };
"""
FAINT = f"""() => {{{CONTRAST}
  return [...document.querySelectorAll('body *')].filter(element =>
    [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
    && !element.closest('title, .skip')).map(element => {{
      const style = getComputedStyle(element);
      const ink = element.namespaceURI.endsWith('svg') ? style.fill : style.color;
      return [contrast(ink, element), element.outerHTML.slice(0, 120)];
    }}).filter(([found]) => found < 4.5);
}}"""
PALE = f"""() => {{{CONTRAST}
  const shapes = '.legend rect, .legend line, .bars rect, .plot .line';
  return [...document.querySelectorAll(shapes)].map(shape => {{
    const style = getComputedStyle(shape);
    return [contrast(style.fill === 'none' || shape.matches('line') ? style.stroke : style.fill, shape), style.fill];
  }}).filter(([found]) => found < 3);
}}"""
LABELS = """() => [...document.querySelectorAll('.plot')].flatMap(plot => {
  const texts = [...plot.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  return texts.flatMap(([one, a], i) => texts.slice(i + 1).filter(([, b]) =>
    a.width && b.width && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2
  ).map(([other]) => `${one} and ${other}`));
})"""


def open_tables(tab):
    tab.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")


@pytest.mark.parametrize("name", ["run", "folder", "many", "hostile", "archive", "onnx", "csr", "compacted"])
@pytest.mark.parametrize("size", SIZES)
def test_no_text_is_outside_the_window_or_too_small(opened, name, size):
    with opened(name, size) as tab:
        open_tables(tab)
        assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        assert tab.evaluate(OUTSIDE) == []
        assert tab.evaluate(SMALL) == []
        assert tab.evaluate(LABELS) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_has_contrast_in_light_and_dark_mode(opened, scheme):
    with opened("run", color_scheme=scheme) as tab:
        open_tables(tab)
        assert tab.evaluate(FAINT) == []
        assert tab.evaluate(PALE) == []
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def visible_masks(tab):
    return tab.evaluate(
        "[...document.querySelectorAll('.mask')].filter(mask => mask.getClientRects().length).map(mask => mask.id)"
    )


def test_the_keyboard_can_choose_another_mask(opened):
    with opened("run") as tab:
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.className") == "skip"
        assert tab.evaluate("document.activeElement.getBoundingClientRect().top >= 0")
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        tab.keyboard.press("Enter")
        assert tab.evaluate("document.activeElement.id") == "main"
        for _ in range(60):
            tab.keyboard.press("Tab")
            if tab.evaluate("document.activeElement.id") == "layer":
                break
        before = visible_masks(tab)
        assert len(before) == 1
        tab.keyboard.press("Home")
        tab.keyboard.press("ArrowDown")
        assert visible_masks(tab) == ["mask-1"] != before
        assert tab.evaluate(
            "[...document.querySelectorAll('.layers')].every(c => c.querySelectorAll('.chosen').length === 1)"
        )


def test_every_sparse_layer_has_a_picture_that_loads(opened):
    with opened("many") as tab:
        assert tab.evaluate("document.getElementById('layer').options.length") == 120
        assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_a_click_on_a_column_chooses_its_layer(opened):
    with opened("folder") as tab:
        column = tab.locator(".layers").first.locator("g").nth(3)
        column.locator(".hit").click(force=True)
        assert visible_masks(tab) == ["mask-3"]
        assert tab.evaluate("document.getElementById('layer').value") == "mask-3"


def test_without_script_every_mask_is_shown(opened):
    with opened("folder", java_script_enabled=False) as tab:
        assert tab.locator(".mask").count() > 20
        assert all(tab.locator(".mask").nth(i).is_visible() for i in (0, 1, 5))
        assert not tab.locator("#layer").is_visible()


def test_names_of_layers_are_never_executed(opened):
    with opened("hostile") as tab:
        assert tab.title().startswith("<img src=x")
        assert tab.locator("body script, img[src=x]").count() == 0


def test_the_printed_page_is_light_and_shows_its_tables(opened):
    with opened("run", color_scheme="dark") as tab:
        tab.emulate_media(media="print", color_scheme="dark")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert tab.evaluate(FAINT) == []
        shown = "[...document.querySelectorAll('table')].every(table => table.getBoundingClientRect().height > 20)"
        assert tab.evaluate(shown)
        assert not tab.locator("nav").is_visible()
        printed = tab.pdf(prefer_css_page_size=True)
        assert printed.startswith(b"%PDF")
        assert tab.evaluate("document.querySelectorAll('details[open]').length") == 0


def test_there_is_no_animation_if_the_reader_prefers_none(opened):
    behaviour = "getComputedStyle(document.documentElement).scrollBehavior"
    with opened("folder", reduced_motion="reduce") as tab:
        assert tab.evaluate(behaviour) == "auto"
    with opened("folder", reduced_motion="no-preference") as tab:
        assert tab.evaluate(behaviour) == "smooth"
