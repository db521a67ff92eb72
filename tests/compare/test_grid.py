import json
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.compare.cells import Comparison, Grid
from dsr_tool.compare.grid import make_grid
from dsr_tool.compare.grid_values import parse_numbers, parse_seeds
from dsr_tool.errors import FileError, FormatError, UsageError


def names(tables):
    return [cell.name for cell in make_grid(tables, "grid").cells]


def test_cells_are_methods_by_sparsities_by_seeds(tables):
    assert names(tables(sparsity=[0.9, 0.95], seeds=2)) == [
        "dsr@0.9-s0",
        "dsr@0.95-s0",
        "static@0.9-s0",
        "static@0.95-s0",
        "dsr@0.9-s1",
        "dsr@0.95-s1",
        "static@0.9-s1",
        "static@0.95-s1",
    ]
    assert names(tables(methods=["dense"], seeds=2)) == ["dense-s0", "dense-s1"]


def test_cells_that_others_start_from_are_added_and_come_first(tables):
    assert names(tables(methods=["gmp", "static"])) == ["static@0.9-s0", "dense-s0", "gmp@0.9-s0"]
    grid = make_grid(tables(methods=["ticket"], seeds=[3], set={"epochs": 7}), "grid")
    assert [(cell.name, cell.needs) for cell in grid.cells] == [("dsr@0.9-s3", None), ("ticket@0.9-s3", "dsr@0.9-s3")]
    assert all(cell.recipe.train["epochs"] == 7 for cell in grid.cells)


def test_a_method_may_have_its_own_seeds_sparsities_and_settings(tables):
    own = {"dsr": {"seeds": [5, 7], "sparsity": [0.8], "set": {"target": 50, "train.epochs": 3}}}
    grid = make_grid(tables(method=own, set={"epochs": 4, "lr": 0.2}), "grid")
    assert [cell.name for cell in grid.cells] == ["static@0.9-s0", "dsr@0.8-s5", "dsr@0.8-s7"]
    static, dsr, _ = (cell.recipe for cell in grid.cells)
    assert dsr.options == {"target": 50} and dsr.train["epochs"] == 3 and dsr.train["lr"] == 0.2
    assert static.options == {} and static.train["epochs"] == 4
    assert names(tables(methods=None, method={"static": {}})) == ["static@0.9-s0"]


def test_options_override_the_tables_of_single_methods(tables):
    own = {"dsr": {"seeds": 5, "sparsity": [0.8], "set": {"epochs": 3, "lr": 0.2}}}
    options = {"seeds": "7", "sparsity": [0.99], "set": {"train.epochs": 1}}
    grid = make_grid(tables(method=own, methods=["dsr", "ticket"]), "grid", options)
    assert [cell.name for cell in grid.cells] == ["dsr@0.99-s7", "ticket@0.99-s7"]
    assert [cell.recipe.train["epochs"] for cell in grid.cells] == [1, 1]
    assert [cell.recipe.train.get("lr") for cell in grid.cells] == [0.2, None]
    # A cell that others start from has the table of its own method, and the options override that too.
    needed = make_grid(tables(method=own, methods=["ticket"]), "grid", options).cells[0]
    assert needed == grid.cells[0]


def test_all_errors_of_a_grid_are_reported_at_once(tables):
    wrong = tables(
        methods=["dsr", "dsr", "sett", "static"],
        sparsity=[0.9, 0.9],
        sed=3,
        data=None,
        set={"sparsity": 0.5, "epohcs": 3},
        method={"static": {"sparsity": [1.5], "seed": 1}},
    )
    with pytest.raises(UsageError) as caught:
        make_grid(wrong, "grid.toml")
    message = str(caught.value)
    for part in (
        "grid.toml: key 'sed' is unknown; did you mean seeds or set?",
        "data is missing.",
        "method 'dsr' is listed twice; list it once.",
        "method 'sett' is unknown",
        "sparsity 0.9 of method dsr is listed twice",
        "set sparsity of method dsr is varied by the grid; remove it.",
        "sparsity 1.5 is not in [0, 1)",
        "key 'method.static.seed' is unknown; did you mean method.static.seeds",
    ):
        assert part in message, message
    with pytest.raises(UsageError) as caught:
        make_grid(tables(set={"epohcs": 3, "lr": -1}, seeds="x", sparsity=[2]), "grid")
    for part in (
        "'epohcs' is unknown; did you mean epochs",
        "train.lr -1 is not",
        "seeds 'x' is not",
        "sparsity 2 is not",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "lenet"}, "recipe 'lenet' is unknown; did you mean .*lenet-300-100"),
        ({"recipe": 3}, "recipe is 3, expected a string"),
        ({"data": None}, "data is missing"),
        ({"methods": []}, "expected a list of names: dsr, static"),
        ({"methods": "dsr"}, "expected a list of names"),
        ({"seeds": 0}, "seeds 0 is not allowed"),
        ({"seeds": True}, "seeds True is not allowed"),
        ({"seeds": [1, 1]}, "seed 1 of method dsr is listed twice"),
        ({"seeds": "4-2"}, "seeds '4-2' is not allowed"),
        ({"sparsity": "0.9"}, "sparsity '0.9' is not in .0, 1."),
        ({"method": {"drs": {"seeds": 5}}}, "table method of 'drs' is unknown; did you mean dsr"),
        ({"method": {"dsr": {"set": 3}}}, "method.dsr.set is 3, expected a table"),
        ({"set": "epochs=3"}, "set is 'epochs=3', expected a table"),
        ({"set": {"epochs": date(2020, 1, 1)}}, "train.epochs is '2020-01-01', expected a whole number"),
        ({"method": {"dsr": 3}}, "expected one table for each method"),
        ({"set": {"target": 5}}, "options.target 5 is not an option of method static"),
        ({"set": {"epochs": 0}}, "train.epochs 0 is not allowed"),
    ],
)
def test_values_that_are_not_allowed_are_named(tables, changes, message):
    with pytest.raises(UsageError, match=message):
        make_grid(tables(**changes), "grid")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_seeds_are_a_number_a_list_or_ranges(chosen):
    assert parse_seeds(chosen) == chosen == parse_seeds(",".join(map(str, chosen)))
    first = chosen[0]
    assert parse_seeds(f"{first}-{first + 3}") == list(range(first, first + 4))
    assert parse_seeds(first + 1) == list(range(first + 1))


def test_numbers_are_separated_by_commas():
    assert parse_numbers(".9,0.95") == [0.9, 0.95]
    with pytest.raises(UsageError, match="not a list of numbers"):
        parse_numbers("0.9;1")


def test_a_grid_round_trips_through_json(tables):
    grid = make_grid(tables(methods=["gmp", "ticket"]), "grid")
    again = Grid.from_dict(json.loads(json.dumps(grid.to_dict())))
    assert again == grid


def test_a_plan_accepts_more_cells_and_refuses_other_settings(tables, tmp_path):
    comparison = Comparison(tmp_path / "out")
    comparison.add(make_grid(tables(), "grid"))
    whole = comparison.add(make_grid(tables(seeds=2), "grid"))
    assert len(whole.cells) == 4 and comparison.plan() == whole
    comparison.run_folder("dsr@0.9-s0").mkdir()
    with pytest.raises(UsageError, match="cell dsr@0.9-s0 began with other settings"):
        comparison.add(make_grid(tables(set={"epochs": 9}), "grid"))
    with pytest.raises(UsageError, match="comparison in this folder is of small with data"):
        comparison.add(make_grid(tables(data="digits"), "grid"))
    # A cell that failed or never began has no results, so its settings may change.
    comparison.write_record("dsr@0.9-s0", {"status": "failed", "error": "x", "at": 0})
    comparison.add(make_grid(tables(set={"epochs": 9}), "grid"))
    assert not comparison.run_folder("dsr@0.9-s0").exists()


def test_a_folder_of_something_else_is_refused(tables, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(FileError, match="a folder of something else"):
        Comparison(tmp_path / "out").add(make_grid(tables(), "grid"))
    with pytest.raises(FileError, match="cannot be read"):
        Comparison(tmp_path / "none").plan()


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', '{"title": 1, "data": 2, "cells": [{}]}'])
def test_damaged_plans_and_records_are_refused(tmp_path, text):
    (tmp_path / "compare.json").write_text(text)
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "a.json").write_text(text)
    with pytest.raises(FormatError, match="plan .* is invalid"):
        Comparison(tmp_path).plan()
    with pytest.raises(FormatError, match="delete it to run the cell again"):
        Comparison(tmp_path).record("a")
