"""The page is valid, self-contained, small, deterministic, and safe with hostile names."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner

from dsr_tool.cli.group import cli
from dsr_tool.errors import FileError
from dsr_tool.report.page import numbers
from dsr_tool.report.page.memory_view import memory_section
from dsr_tool.report.sources import read

VOID = {"meta", "link", "br", "img", "input", "hr"}
MEGABYTE = 10**6


class Outline(HTMLParser):
    """Checks the nesting of tags and collects tags and texts."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data

    def attributes(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def pages(model_folder, run_folder, exported, page, make_source, compacted, extras):
    files = {"folder": model_folder, "run": run_folder, **exported}
    return {
        **{kind: page(path) for kind, path in files.items()},
        "dense": page(make_source(2, role="dense")),
        "empty": page(make_source(0)),
        "extras": page(compacted, **extras),
    }


KINDS = ("folder", "run", "archive", "onnx", "csr", "dense", "empty", "extras")


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_valid_and_accessible_markup(pages, kind):
    outline = Outline(pages[kind])
    every = [attrs for _, attrs in outline.tags]
    ids = [attrs["id"] for attrs in every if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert outline.attributes("html") == [{"lang": "en"}]
    assert outline.texts["title"].strip()
    pointing = [attrs[key] for attrs in every for key in ("for", "aria-labelledby") if key in attrs]
    pointing += [attrs["href"][1:] for attrs in every if attrs.get("href", "").startswith("#")]
    assert set(pointing) <= set(ids)
    assert {"layer"} <= {attrs["for"] for attrs in outline.attributes("label")} or not outline.attributes("select")
    assert all("alt" in attrs for attrs in outline.attributes("img"))
    assert all("scope" in attrs for attrs in outline.attributes("th"))
    assert len(outline.attributes("caption")) == len(outline.attributes("table"))
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_loads_nothing_and_is_below_a_megabyte(pages, kind):
    html = pages[kind]
    outline = Outline(html)
    for _, attrs in outline.tags:
        assert "style" not in attrs
        assert not any(name.startswith("on") for name in attrs)
        assert all(attrs.get(name, "data:").startswith(("data:", "#")) for name in ("src", "href"))
    assert "http" not in html.replace("http-equiv", "")
    assert len(html.encode()) < MEGABYTE


def test_the_policy_allows_only_the_style_and_script_of_the_page(pages):
    html = pages["folder"]
    policy = next(a["content"] for a in Outline(html).attributes("meta") if "Content-Security-Policy" in a.values())
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_largest_pages_stay_below_a_megabyte(make_source, page, run_folder):
    """340 layers, as torchvision's deepest classifier has, and 200 epochs."""
    log = read(run_folder).log
    names = [f"features.{i}.block.1.a.long.name.fc2.weight" for i in range(340)]
    rng = np.random.default_rng(0)
    epochs = [replace(epoch, density=dict(zip(names, rng.random(340).tolist(), strict=True))) for epoch in log.epochs]
    source = replace(
        make_source(340, "features.{0}.block.1.a.long.name.fc2.weight"), log=replace(log, epochs=tuple(epochs))
    )
    html = page(source)
    assert len(html.encode()) < MEGABYTE
    assert html.count("<option") == 340
    assert "largest of 2,000 weights" in page(make_source(2000))


def test_hostile_names_are_shown_as_text(hostile, page, extras):
    html = page(hostile, **extras)
    outline = Outline(html)
    assert [tag for tag, _ in outline.tags].count("script") == 1
    assert "&lt;script&gt;alert(1)" in html
    assert "<script>alert(1)</script>" in outline.texts["h1"]
    assert "\x00" not in html
    html.encode("utf-8")


def test_the_page_has_all_measurements(pages, run_folder, exported):
    html = pages["run"]
    source = read(run_folder)
    for title in ("Training", "Where the bytes go", "Formats side by side", "Density by layer", "Work by layer"):
        assert f">{title}</h2>" in html
    assert numbers.percent(source.footprint.sparsity) in html
    assert numbers.percent(source.footprint.model_sparsity) in html
    for layer in source.footprint.layers:
        if layer.spec.role == "sparse":
            assert f">{layer.spec.name}</option>" in html
            assert f"<td>{layer.sizes.active:,}</td>" in html
    assert f"{exported['archive'].stat().st_size:,} bytes" in pages["archive"]


@pytest.mark.parametrize("kind", ["folder", "archive", "onnx", "csr"])
def test_parts_of_the_file_add_up(model_folder, exported, kind):
    source = read({"folder": model_folder, **exported}[kind])
    measured = source.footprint
    stored = sum(map(sum, source.stored.values()))
    others = {"description", "container headers", "graph and manifest", "container header", "nodes and names"}
    rest = sum(nbytes for name, nbytes in measured.parts.items() if name in {*others, "zip container"})
    assert stored + rest == measured.file_bytes
    for layer in measured.layers:
        assert min(source.stored[layer.spec.name]) >= 0
        if layer.spec.role == "sparse" and kind != "folder":
            assert source.stored[layer.spec.name].positions > 0


def rows(html, caption):
    """Returns the rows of the table with this caption, as texts."""
    table = html[html.index(f'<caption class="hidden">{caption}</caption>') :].partition("</table>")[0]
    lines = [re.findall(r"<(?:th|td)[^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    return [[cell.replace("\u00a0", " ") for cell in line] for line in lines]


def test_compaction_is_shown_before_and_after(pages):
    html = pages["extras"]
    assert "Removed filters that had no effect: 4; input channels: 7; layers that lost any: 1. All other" in html
    assert rows(html, "What compaction saved")[1:] == [
        ["Weights", "2,000", "1,500", "25.00 %"],
        ["Active weights", "300", "240", "20.00 %"],
        ["Multiply-adds with every weight", "80,000", "60,000", "25.00 %"],
        ["Multiply-adds with active weights", "8,000", "6,000", "25.00 %"],
        ["Bytes of the file", "20,000", "12,100", "39.50 %"],
    ]
    assert rows(html, "Filters and input channels removed, by layer")[1] == ["conv.weight", "4", "64", "7", "16"]
    assert rows(html, "Conversion") == [["name", "value"], ["seed", "3"]]
    assert "Compaction" not in pages["folder"]


def test_nodes_that_no_kernel_computes_are_a_headline(make_source, page, pages):
    assert '<dd class="value">121 of 124</dd>' in pages["extras"]
    assert "on the reference: Tile, &lt;script&gt;" in pages["extras"]
    assert "none on the reference" in page(make_source(1), fallback={"nodes": 7, "on_reference": 0, "operators": []})
    assert "on the reference" not in pages["folder"]


def test_an_exceeded_budget_is_a_headline_and_a_chart(pages):
    html = pages["extras"]
    assert '<dd class="value">does not fit</dd>' in html
    assert "Budget 10.00 MB: does not fit" in html
    assert rows(html, "Budget in bytes")[1:] == [
        ["Budget", "10,000,000", "100.00 %"],
        ["Found, on disk", "12,000,000", "120.00 %"],
    ]
    assert ">Budget</h2>" not in pages["folder"]


def test_memory_is_shown_by_runtime_and_for_a_training_step(pages):
    html = pages["extras"]
    assert "For a batch of 4, each input 3 \u00d7 32 \u00d7 32" in html
    assert "Nothing was measured twice" in html
    running = rows(html, "Memory of running, by runtime")
    assert running[1][:7] == ["PyTorch", "400 B", "5.000 kB", "5.400 kB", "6.000 kB", "-10.0 %", "9.000 kB"]
    assert running[2][3:7] == ["1.234 kB", "\u2013", "\u2013", "\u2013"]
    assert running[3][3:7] == ["\u2013", "7.000 kB", "\u2013", "8.000 kB"]
    assert set(running[4][1:]) == {"\u2013"}
    assert "ONNX Runtime, measured" in html  # the label of its bar
    step = {name: cells for name, *cells in rows(html, "Bytes of a training step")}
    assert step["activations"] == ["300", "250"]
    assert step["scratch"] == ["0", "600"]
    assert step["in all"] == ["", "5,400"]
    assert ["adam", "4.000 kB"] in rows(html, "State that each optimizer keeps, masked storage")


def test_memory_of_training_is_shown_for_each_storage(extras):
    masked = extras["memory"]["training"]
    compact = dict(masked)
    for key in ("held_bytes", "at_peak_bytes"):
        kept = {name: nbytes for name, nbytes in masked[key].items() if name != "masks"}
        compact[key] = {**kept, "positions": 100, "plans": 400}
    both = memory_section({**extras["memory"], "training_compact": compact})
    steps = {figure.title: figure for figure in both.figures if figure.title.startswith("A training step")}
    assert list(steps) == [
        "A training step with sgd in masked storage, at its peak",
        "A training step with sgd in compact storage, at its peak",
    ]
    rows_of = [[row[0] for row in figure.table.rows] for figure in steps.values()]
    assert "masks" in rows_of[0] and "masks" not in rows_of[1] and {"positions", "plans"} <= set(rows_of[1])
    older = memory_section(extras["memory"])  # has no key of compact storage
    assert not any("compact storage" in figure.title for figure in older.figures)
    without = memory_section({**extras["memory"], "training_compact": None, "training_compact_note": "no sparse layer"})
    assert "No sparse layer." in without.notes


def test_the_order_of_layers_is_named(pages):
    assert "in the order of the model" in pages["archive"]
    assert "in the order of the model" not in pages["onnx"]
    assert "in the order of the file" in pages["onnx"]


def test_the_same_input_gives_the_same_bytes(make_source, page):
    assert page(make_source(4)) == page(make_source(4))


def test_the_command_writes_the_page_and_prints_the_report(model_folder, tmp_path):
    target = tmp_path / "page.html"
    arguments = ["report", str(model_folder), "--html", str(target), "--json"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["schema"] == "dsr-tool/report/1"
    first = target.read_bytes()
    assert isinstance(CliRunner().invoke(cli, arguments).exception, FileError)
    assert CliRunner().invoke(cli, [*arguments, "--force"]).exit_code == 0
    assert target.read_bytes() == first
    assert list(tmp_path.iterdir()) == [target]
