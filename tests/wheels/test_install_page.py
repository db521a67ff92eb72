"""The page on installation says which versions the metadata allows."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_lowest_version_of_every_package():
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = metadata.partition("\ndependencies = [")[2].partition("\n]")[0]
    required = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)', dependencies, re.M))
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z0-9, ]+) \| ([\d., ]+) \|", page.partition("## Lowest versions")[2], re.M)
    listed = {name: least for row in rows for name, least in zip(*(cell.split(", ") for cell in row), strict=True)}
    assert listed == required
    assert f"Python {re.search('requires-python = .>=([0-9.]+)', metadata)[1]} or newer" in page
