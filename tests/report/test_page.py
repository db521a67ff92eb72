"""The page as text: valid, self-contained, small, the same every time, and safe with hostile names."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from click.testing import CliRunner

from dsr_tool.cli import cli
from dsr_tool.errors import FileError, FormatError
from dsr_tool.report.page import numbers
from dsr_tool.report.page.parts import setup_section
from dsr_tool.report.page.run_view import run_headline, run_section
from dsr_tool.report.runlog import read_log
from dsr_tool.report.sources import read

VOID = {"meta", "link", "br", "img", "input", "hr"}
MEGABYTE = 10**6


class Outline(HTMLParser):
    """Checks nesting while it reads, and keeps what the tests ask about."""

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
def pages(model_folder, run_folder, exported, page, made):
    files = {"folder": model_folder, "run": run_folder, **exported}
    return {
        **{kind: page(path) for kind, path in files.items()},
        "dense": page(made(2, role="dense")),
        "empty": page(made(0)),
        "parts": page(made(2), budget={"asked_bytes": 10**7, "fits": True}, memory=[{"batch": 1, "peak_bytes": 5}]),
    }


KINDS = ("folder", "run", "archive", "onnx", "csr", "dense", "empty", "parts")


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
def test_the_page_asks_for_nothing_and_fits(pages, kind):
    html = pages[kind]
    outline = Outline(html)
    for _, attrs in outline.tags:
        assert "style" not in attrs
        assert not any(name.startswith("on") for name in attrs)
        assert all(attrs.get(name, "data:").startswith(("data:", "#")) for name in ("src", "href"))
    assert "http" not in html.replace("http-equiv", "")
    assert len(html.encode()) < MEGABYTE


def test_the_policy_allows_this_style_and_script_alone(pages):
    html = pages["folder"]
    policy = next(a["content"] for a in Outline(html).attributes("meta") if "Content-Security-Policy" in a.values())
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_largest_pages_stay_below_a_megabyte(made, page, run_folder):
    """As many layers as torchvision's deepest classifier has, and 200 epochs."""
    from dataclasses import replace

    log = read(run_folder).log
    names = [f"features.{i}.block.1.a.long.name.fc2.weight" for i in range(340)]
    rng = np.random.default_rng(0)
    epochs = [replace(epoch, density=dict(zip(names, rng.random(340).tolist(), strict=True))) for epoch in log.epochs]
    source = replace(made(340, "features.{0}.block.1.a.long.name.fc2.weight"), log=replace(log, epochs=tuple(epochs)))
    html = page(source)
    assert len(html.encode()) < MEGABYTE
    assert html.count("<option") == 340
    assert "largest of 2,000 weights" in page(made(2000))


def test_hostile_names_come_out_as_text(hostile, page):
    html = page(hostile, **{"<b>part": {"<i>name": "<u>value"}})
    outline = Outline(html)
    assert [tag for tag, _ in outline.tags].count("script") == 1
    assert not {"b", "i", "u"} & {tag for tag, attrs in outline.tags if not attrs} - {"b"}
    assert "&lt;script&gt;alert(1)" in html
    assert "<script>alert(1)</script>" in outline.texts["h1"]
    assert "\x00" not in html
    html.encode("utf-8")


def test_everything_that_was_measured_is_on_the_page(pages, run_folder, exported):
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


def test_parts_without_a_chart_get_a_section_of_their_own(pages):
    html = pages["parts"]
    assert ">Budget</h2>" in html
    assert "10.00\u00a0MB (10,000,000)" in html
    assert ">Memory</h2>" in html
    assert ">Budget</h2>" not in pages["folder"]


def test_the_same_input_gives_the_same_bytes(made, page):
    assert page(made(4)) == page(made(4))


def test_the_command_writes_the_page_and_still_prints(model_folder, tmp_path):
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


def test_a_damaged_log_is_one_clear_error(run_folder, tmp_path):
    import shutil

    shutil.copytree(run_folder, tmp_path / "run")
    for line in (
        '{"kind": "end"}',
        '{"kind": "epoch", "epoch": 1}',
        "[]",
        '{"kind": "start", "settings": 3, "data": 1}',
    ):
        (tmp_path / "run" / "log.jsonl").write_text(line + "\n")
        with pytest.raises(FormatError, match="is not understood"):
            read(tmp_path / "run")


def test_a_run_without_an_epoch_has_a_page(run_folder, tmp_path, page):
    import shutil

    path = tmp_path / "run"
    shutil.copytree(run_folder, path)
    log = path / "log.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    assert "no epoch was completed" in page(path)


def test_nothing_in_a_log_breaks_the_page(run_folder, tmp_path):
    """Whatever stands where a number should be: a clear error, or a page."""
    rng = Random(0)  # noqa: S311 - nothing secret
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()[:9]]
    strange = [None, "", "x", -1, 0, 1e308, -1e308, 5e-324, 10**400, True, [], {}, {"a": 1}, float("nan"), float("inf")]
    read_anyway = 0
    for _ in range(400):
        line = rng.choice(lines)
        key = rng.choice([key for key in line if key != "kind"])
        inside = line[key] if isinstance(line[key], dict) and line[key] and rng.random() < 0.5 else line
        key = rng.choice(list(inside)) if inside is not line else key
        changed, inside[key] = inside[key], rng.choice(strange)
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        inside[key] = changed
        try:
            log = read_log(tmp_path / "log.jsonl")
        except FormatError:
            continue
        run_headline(log), run_section(log), setup_section(None, log)
        json.dumps(log.summary(), allow_nan=False)
        read_anyway += 1
    assert 50 < read_anyway < 350
