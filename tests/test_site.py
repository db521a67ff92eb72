"""The site: built with warnings as errors, whole, without anything from the network, and readable on a phone."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest

import dsr_tool
from dsr_tool.cli.group import cli

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium on this machine")
LOADED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "srcset", "video": "src"}
"""Elements that load something when a page is shown, with the attribute that names it."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


class _Elements(HTMLParser):
    """Collects what a page links to, what it loads, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors.update(values[key] for key in ("id", "name") if values.get(key))
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif values.get(LOADED.get(tag, "")) and values.get("rel") not in {"canonical", "next", "prev"}:
            self.loads.append(values[LOADED[tag]])


@pytest.fixture(scope="module")
def pages(site):
    return {path: _Elements(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_nothing_is_loaded_from_the_network(site, pages):
    outside = {(path.name, url) for path, page in pages.items() for url in page.loads if re.match(r"[a-z]+:|//", url)}
    assert {(name, url) for name, url in outside if not url.startswith("data:")} == set()
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet


def test_every_link_and_anchor_leads_somewhere(site, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            missing = not target.is_file()
            if missing or (
                parts.fragment and target.suffix == ".html" and parts.fragment not in _anchors(pages, target)
            ):
                broken.append((path.relative_to(site).as_posix(), link))
    assert broken == []


def _anchors(pages, target):
    # Material's own: the top of a page, and the state of its drawers.
    return pages[target].anchors | {"", "__top"}


def test_the_pages_name_each_other_by_links(pages):
    named = re.compile(r"<code>docs/[a-z_0-9/-]+\.md</code>")
    assert [path.name for path in pages if named.search(path.read_text(encoding="utf-8"))] == []


def test_the_reference_has_every_command_and_option(site):
    text = (site / "command-line.html").read_text(encoding="utf-8")
    shown = {html.unescape(name) for name in re.findall(r"<dt><code>(.*?)</code></dt>", text)}
    context = click.Context(cli)
    for name in cli.list_commands(context):
        assert f'id="dsr-tool-{name}"' in text
        for option in cli.get_command(context, name).params:
            for flag in option.opts if isinstance(option, click.Option) else ():
                assert any(re.search(rf"(?:^|[ ,/]){re.escape(flag)}(?:$|[ ,/])", one) for one in shown), (name, flag)


def test_the_reference_has_every_public_name(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    assert [name for name in dsr_tool.__all__ if f'id="dsr_tool.{name}"' not in text] == []


def test_every_tutorial_is_a_notebook_too(site):
    names = {path.stem for path in (ROOT / "docs" / "tutorials").glob("*.md")} - {"index"}
    assert {path.stem for path in site.rglob("*.ipynb")} == names
    for name in names:
        assert f'href="{name}.ipynb"' in (site / "tutorials" / f"{name}.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "CI is set, so there must be a Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@contextmanager
def opened(browser, path, width):
    """Opens a page from its folder, without the network; at the end, asserts that it asked for nothing else."""
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    page = context.new_page()
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert said == []


@BROWSER
@pytest.mark.parametrize(
    "name", ["index", "which-command", "support", "command-line", "api", "zoo", "tutorials/compare"]
)
def test_no_page_is_wider_than_a_phone(browser, site, name):
    with opened(browser, site / f"{name}.html", 390) as page:
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 390


@BROWSER
def test_the_search_works_from_a_folder(browser, site):
    with opened(browser, site / "index.html", 1440) as page:
        page.focus("input.md-search__input")
        page.keyboard.type("LBFGS")
        page.wait_for_selector(".md-search-result__link", state="attached")
        found = page.eval_on_selector_all(".md-search-result__link", "links => links.map(link => link.href)")
        assert any("methods.html" in link for link in found)
