"""Bars of densities: one a layer, or one a block where the layers are many, and never wider than the terminal."""

from io import StringIO

import pytest
from rich.console import Console

from dsr_tool.cli import progress
from dsr_tool.report.bars import density_bars, groups


def printed(table, width=100):
    text = StringIO()
    Console(file=text, width=width, color_system=None, markup=False, emoji=False, highlight=False).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def test_a_bar_is_as_long_as_the_share_of_active_weights():
    active = {"conv.weight": 50, "block.fc.weight": 10, "head.weight": 3}
    lines = printed(density_bars(active, {"conv.weight": 50, "block.fc.weight": 40, "head.weight": 100}))[2:]
    assert [line.count("━") for line in lines] == [16, 4, 0]
    assert lines[0].split() == ["conv", "━" * 16, "100.00%", "50", "50"]
    assert lines[1].split() == ["block.fc", "━" * 4, "25.00%", "10", "40"]
    assert lines[2].split()[-3:] == ["3.00%", "3", "100"]


@pytest.mark.parametrize("width", [60, 80])
def test_names_give_way_in_a_narrow_terminal_and_numbers_do_not(width):
    name = f"{'a_long_name_of_a_block.' * 6}weight"
    lines = printed(density_bars({name: 1_000_000}, {name: 4_000_000}), width)
    assert all(len(line) <= width for line in lines)
    assert lines[-1].startswith("a_long") and lines[-1].split()[-3:] == ["25.00%", "1,000,000", "4,000,000"]


RESNET = [
    "conv1.weight",
    *(f"layer{s}.{b}.conv{c}.weight" for s in (1, 2, 3, 4) for b in range(5) for c in (1, 2)),
    "fc.weight",
]


def test_long_networks_are_shown_by_their_blocks():
    assert list(groups(RESNET[:7], 20)) == [name.removesuffix(".weight") for name in RESNET[:7]]
    assert list(groups(RESNET, 22)) == ["conv1", *(f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in range(5)), "fc"]
    assert list(groups(RESNET, 20)) == ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    lines = printed(density_bars(dict.fromkeys(RESNET, 1), dict.fromkeys(RESNET, 4)))
    (line,) = [line for line in lines if line.startswith("layer2\u00a0(10) ")]
    assert line.count("━") == 4 and line.split(" ")[-1] == "40" and "25.00%" in line and " 10 " in line


def test_networks_without_blocks_lose_their_middle():
    names = [f"{index}.weight" for index in range(50)]
    found = groups(names, 20)
    assert len(found) == 20 and [name for members in found.values() for name in members] == names
    assert list(found)[9:12] == ["9", "10 ... 40", "41"] and len(found["10 ... 40"]) == 31


def test_bars_are_printed_on_a_terminal_alone(monkeypatch, capsys):
    table = density_bars({"fc.weight": 1}, {"fc.weight": 2})
    progress.show_on_terminal(table, quiet=False)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    progress.show_on_terminal(table, quiet=True)
    assert capsys.readouterr() == ("", "")
    progress.show_on_terminal(table, quiet=False)
    shown = capsys.readouterr()
    assert "50.00%" in shown.err and shown.out == ""
