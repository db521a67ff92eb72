import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.errors import DsrError, FormatError, UsageError
from dsr_tool.recipes.files import families, find_family, find_recipe, parse_toml
from dsr_tool.recipes.recipe import Recipe

FAMILY = """
schema = "dsr-tool/recipes/1"
title = "small"
data = "digits"
sparsities = [0.5, 0.9]
[model]
arch = "resnet18"
sparsity = "@sparsity"
[train]
epochs = 4
[methods.dsr]
options = { target = 10 }
accuracy = { "0.9" = [90.0, 0.5, 3] }
[methods.dense]
model = { sparsity = 0.0 }
accuracy = { dense = [95.5] }
[methods.set.at]
"0.5" = { options = { drop_fraction = 0.1 } }
"0.9" = { options = { drop_fraction = 0.3 }, train = { epochs = 8 } }
[methods.gmp]
model = { from = "dense", sparsity = 0.0 }
options = { final_sparsity = "@sparsity" }
"""


@pytest.fixture
def family(tmp_path):
    (tmp_path / "small.toml").write_text(FAMILY)
    return find_family(str(tmp_path / "small.toml"))


def test_every_shipped_row_is_found_by_its_name():
    for one in families().values():
        rows = list(one.rows())
        assert rows and len({row.name for row in rows}) == len(rows)
        for row in rows:
            assert find_recipe(row.name) == row and row.data and row.source and row.about


def test_method_replaces_base_and_sparsity_replaces_method(family):
    row = family.row("set", 0.9)
    assert row.model == {"arch": "resnet18", "sparsity": 0.9}
    assert row.train == {"method": "set", "epochs": 8} and row.options == {"drop_fraction": 0.3}
    assert family.row("set", 0.5).train["epochs"] == 4
    assert [row.name for row in family.rows()] == [
        "small/dsr@0.5",
        "small/dsr@0.9",
        "small/dense",
        "small/set@0.5",
        "small/set@0.9",
        "small/gmp@0.5",
        "small/gmp@0.9",
    ]


def test_the_sparsity_fills_every_placeholder(family):
    gmp = family.row("gmp", 0.7)
    assert gmp.model["sparsity"] == 0 and gmp.options == {"final_sparsity": 0.7} and gmp.after == "dense"
    assert family.row("dense").model["sparsity"] == 0 and family.row("dense").after is None


def test_published_accuracies_become_fractions(family):
    assert family.row("dsr", 0.9).paper == {"accuracy": 0.9, "sd": 0.005, "n": 3}
    assert family.row("dsr", 0.5).paper == {} and family.row("dense").paper == {"accuracy": 0.955}
    assert find_recipe("wrn-28-2/dsr@0.9").paper == {"accuracy": 0.9359, "sd": 0.0017, "n": 5}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrn-28-2", "is a family of rows; give one of its rows, such as wrn-28-2/dense"),
        ("wrn-28-3/dsr@0.9", "did you mean wrn-28-2"),
        ("nothing/dsr@0.9", "'nothing' is unknown"),
        ("wrn-28-2/dsrr@0.9", "did you mean dsr"),
        ("wrn-28-2/dsr", "needs a sparsity; write wrn-28-2/dsr@0.9"),
        ("wrn-28-2/dense@0.9", "has no sparsity; write wrn-28-2/dense."),
        ("wrn-28-2/set@0.93", "has no values for sparsity 0.93; give one of 0.5, 0.6"),
        ("wrn-28-2/dsr@1.5", "sparsity '1.5' is not in .0, 1."),
        ("none.toml", "recipe 'none.toml' does not exist"),
    ],
)
def test_unknown_names_are_refused_with_close_or_known_ones(name, message):
    with pytest.raises(DsrError, match=message):
        find_recipe(name)


def test_a_recipe_is_read_back_as_it_was_written(tmp_path):
    for one in families().values():
        for row in one.rows():
            path = tmp_path / "row.toml"
            path.write_text(row.to_toml(), encoding="utf-8")
            again = find_recipe(str(path))
            assert all(
                getattr(again, key) == getattr(row, key) for key in ("name", "model", "train", "options", "paper")
            )


PLAIN = st.one_of(st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False, allow_infinity=False))
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


@given(st.dictionaries(st.sampled_from("abc"), st.one_of(PLAIN, TEXT, st.lists(PLAIN, max_size=3)), max_size=3))
def test_any_plain_value_is_written_as_toml(values):
    read = parse_toml(Recipe("x", model=values).to_toml(), "x")
    assert read.get("model", {}) == values


def test_all_errors_of_a_file_are_listed(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(
        "titel = 'x'\nsparsities = [1.5]\ndata = 3\n[methods.dsr]\ntrian = {}\nabout = 1\n[methods.dsr.at]\n'2' = {}\n"
    )
    with pytest.raises(UsageError) as caught:
        find_family(str(path))
    message = str(caught.value)
    assert "key 'titel' is unknown; did you mean title" in message and "data is 3, expected a text" in message
    path.write_text("sparsities = [1.5]\n[methods.dsr]\ntrian = {}\nabout = 1\n[methods.dsr.at]\n'2' = {}\n")
    with pytest.raises(UsageError) as caught:
        find_family(str(path))
    message = str(caught.value)
    for part in (
        "sparsities 1.5 is not",
        "did you mean methods.dsr.train",
        "methods.dsr.about is 1",
        "dsr.at '2' is not",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("a = ", FormatError, "is not valid TOML"),
        ('schema = "dsr-tool/recipes/1"', UsageError, "describes a family"),
        ("model = 3", UsageError, "model is 3, expected a table"),
        ("[trian]", UsageError, "did you mean train"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path, text, kind, message):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(kind, match=message):
        find_recipe(str(tmp_path / "bad.toml"))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="UTF-8"):
        find_recipe(str(tmp_path / "bad.toml"))
