"""The pictures of the pages: well-formed, small, loading nothing, and named as they are."""

import re
from pathlib import Path
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_BYTES = {".svg": 60_000, ".webp": 150_000}
"""Ending -> largest size in bytes. A page shows several, also on a slow line."""
TERMINALS = ("convert", "train", "bench", "report")
FOREIGN = re.compile(r"@import|@font-face|url\((?!#)|<(?:image|script|use|foreignObject)|(?:href|src)\s*=", re.I)
"""What could load something into an SVG."""
NAMESPACE = "http://www.w3.org/2000/svg"
PICTURES = sorted(path for path in IMAGES.iterdir() if path.suffix in MOST_BYTES)


def test_the_pictures_are_there_and_nothing_else():
    assert {f"{name}.svg" for name in TERMINALS} | {"page.webp"} <= {path.name for path in PICTURES}
    assert [path.name for path in IMAGES.iterdir() if path.suffix not in {*MOST_BYTES, ".py"} and path.is_file()] == []


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_small_and_well_formed(path):
    assert path.stat().st_size < MOST_BYTES[path.suffix]
    if path.suffix == ".svg":
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))  # noqa: S314 - our own file
        assert root.tag == f"{{{NAMESPACE}}}svg" and root.get("viewBox")
    else:
        with Image.open(path) as picture:
            picture.load()
            assert picture.width >= 1000  # sharp in a column of text


@pytest.mark.parametrize("path", [path for path in PICTURES if path.suffix == ".svg"], ids=lambda path: path.name)
def test_an_svg_loads_nothing(path):
    text = path.read_text(encoding="utf-8")
    assert FOREIGN.findall(text) == []
    assert set(re.findall(r"\w+://[^\s\"<]+", text)) <= {NAMESPACE}


@pytest.mark.parametrize("name", TERMINALS)
def test_a_terminal_shows_its_command_and_no_path_of_a_machine(name):
    text = (IMAGES / f"{name}.svg").read_text(encoding="utf-8").replace("&#160;", " ")
    assert f">dsr-tool {name} " in text
    assert re.findall(r"/(?:tmp|home|root|work)/", text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_pictures_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text) + re.findall(
        r"<(?:img|source)[^>]*?\bsrc(?:set)?=\"([^\"]+)", text
    )
    own = [link for link in links if not urlparse(link).scheme]
    assert [link for link in own if not (page.parent / unquote(link)).is_file()] == []
