"""The page of a run shows what its log says and claims nothing else."""

import json
import shutil
from dataclasses import replace
from random import Random

import pytest

from dsr_tool.errors import FormatError
from dsr_tool.report.page.parts import setup_section
from dsr_tool.report.page.run_view import run_headline, run_section
from dsr_tool.report.runlog import read_log
from dsr_tool.report.sources import read


def with_densities(log, *epochs):
    """Returns the log cut to epochs with these densities."""
    changed = [replace(epoch, density=density) for epoch, density in zip(log.epochs, epochs, strict=False)]
    return replace(log, epochs=tuple(changed))


@pytest.mark.parametrize(
    ("epochs", "text"),
    [
        ([{"a": 0.5, "b": 0.5}, {"a": 0.6, "b": 0.4}], "a gained the most density and b lost the most. "),
        ([{"a": 0.5, "b": 0.5}, {"a": 0.4, "b": 0.2}], "From the first epoch to the last, b lost the most. "),
        ([{"a": 0.5, "b": 0.5}] * 2, "no layer changed its density. "),
        ([{"a": 0.5, "b": 0.5}], "Each row is a layer"),
    ],
)
def test_the_density_figure_names_the_layers_that_changed_most(run_folder, epochs, text):
    log = with_densities(read(run_folder).log, *epochs)
    finding = run_section(log)[0].figures[-1].finding
    assert text in finding
    assert ("gained" in finding) == ("gained" in text)


def test_the_density_figure_says_how_many_layers_it_shows(run_folder):
    log = read(run_folder).log
    many = {f"layer{i}.weight": 0.1 for i in range(400)}
    figure = run_section(with_densities(log, many, {**many, "layer399.weight": 0.9}))[0].figures[-1]
    assert "Shown are 350 of 400 layers" in figure.finding
    assert "layer399.weight gained" in figure.finding
    assert len(figure.table.rows) == 350
    assert "Shown" not in run_section(log)[0].figures[-1].finding


def test_a_run_that_loses_active_weights_does_not_claim_a_budget(run_folder):
    log = read(run_folder).log
    falling = [replace(epoch, grown=dict.fromkeys(epoch.grown, 0)) for epoch in log.epochs]
    moved = [replace(moved, grown=0) for moved in log.reallocations]
    log = replace(log, epochs=tuple(falling), reallocations=tuple(moved))
    assert "the number of active weights falls" in run_section(log)[0].figures[2].finding
    assert run_headline(log)[-1].note.startswith("0 grown")


def test_a_damaged_log_is_refused_in_one_line(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    for line in (
        '{"kind": "end"}',
        '{"kind": "epoch", "epoch": 1}',
        "[]",
        '{"kind": "start", "settings": 3, "data": 1}',
    ):
        (tmp_path / "run" / "log.jsonl").write_text(line + "\n")
        with pytest.raises(FormatError, match="is not valid"):
            read(tmp_path / "run")


def test_a_run_without_an_epoch_has_a_page(run_folder, tmp_path, page):
    path = tmp_path / "run"
    shutil.copytree(run_folder, path)
    log = path / "log.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    assert "no epoch was completed" in page(path)


def test_any_value_in_a_log_gives_a_page_or_an_error(run_folder, tmp_path):
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
