"""The table and the picture of converted trained networks, from the file of rows that a benchmark measures."""

import importlib
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs" / "results" / "trained-networks.csv"
PICTURE = ROOT / "docs" / "images" / "first.svg"


@pytest.fixture(scope="module")
def scripts():
    """The two scripts as modules, by name."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield {name: importlib.import_module(name) for name in ("trained_rows", "first_picture")}
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def rows(scripts, tmp_path):
    """Two rows, written to a file and read back."""
    made = dict.fromkeys(scripts["trained_rows"].COLUMNS, "x")
    made |= {"network": "net", "pictures": "256", "values": "int8", "samples": "100", "others": "200", "threads": "1"}
    made |= {"dense_bytes": "102000000", "dense_top1": "0.83", "kernels": "avx2", "command": "dsr-tool convert net"}
    other = {"sparsity": "0.8", "bytes": "9000000", "top1": "0.57", "agreement": "0.605", "time_ratio": "2.000"}
    one = {"sparsity": "0.5", "bytes": "15000000", "top1": "0.78", "agreement": "0.945", "time_ratio": "1.250"}
    scripts["trained_rows"].write_rows(tmp_path / "rows.csv", [{**made, **other}, {**made, **one}])
    assert scripts["first_picture"].rows_of(tmp_path / "rows.csv", "net", "int8", "0") == []
    return scripts["first_picture"].rows_of(tmp_path / "rows.csv", "net", "int8", "256")


def test_the_table_has_the_figures_of_each_row(scripts, rows):
    _, _, *lines = scripts["trained_rows"].table(rows).splitlines()
    assert lines[0] == "| net | 0.5 | int8 | 15.00 (102.0) | 78 (83) | 94.5 | 1.25 | `dsr-tool convert net` |"
    assert lines[1].startswith("| net | 0.8 | int8 | 9.00 (102.0) | 57 (83) | 60.5 | 2.00 |")


def test_the_picture_has_the_figures_of_each_row_and_bars_in_proportion(scripts, rows):
    text = scripts["first_picture"].picture(rows)
    ElementTree.fromstring(text)  # noqa: S314 - our own
    words = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    figures = [word for word in words if re.fullmatch(r"[\d.]+", word)]
    expected = ["102.0", "15.0", "9.0", "100", "80", "50", "83", "78", "57", "100.0", "94.5", "60.5"]
    assert figures == expected
    lengths = [float(length) for length in re.findall(r"<rect class=\"\w+\"[^>]*width=\"([\d.]+)\"", text)]
    for panel in range(0, len(expected), 3):
        values = [float(value) for value in expected[panel : panel + 3]]
        assert [length / lengths[panel] for length in lengths[panel : panel + 3]] == pytest.approx(
            [value / values[0] for value in values], abs=2e-3
        )


def test_the_first_picture_is_that_of_the_measured_rows(scripts):
    """Nobody drew a figure that is not in the file of rows."""
    if not PICTURE.exists():
        pytest.skip("no picture of measured rows is there")
    made = [
        scripts["first_picture"].picture(group)
        for network, values, pictures in {(r["network"], r["values"], r["pictures"]) for r in _all(scripts)}
        if (group := scripts["first_picture"].rows_of(ROWS, network, values, pictures))
    ]
    assert PICTURE.read_text(encoding="utf-8") in made


def _all(scripts):
    return scripts["trained_rows"].read_rows(ROWS)
