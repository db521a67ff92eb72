"""Densities from a CSV file: exact counts, tables as they are published, and everything that is wrong at once."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.sparsity.density_file import DensityFile, parse_spec, read_densities
from dsr_tool.sparsity.layers import LayerSpec

SHAPES = {"conv1": (8, 3, 3, 3), "layer1.0.conv1": (16, 8, 3, 3), "layer1.0.conv2": (16, 16, 3, 3), "fc": (10, 16)}
# As STR publishes them: a title over sixteen columns, totals among the layers, sparsity in per cent, a byte order mark.
PUBLISHED = """\ufeffMetric,Params,FLOPs,Sparsity (%),,
Overall,4000,100,79.55,90.23,99.1
Backbone,3840,90,82.07,92.47,99.64
Layer 1 - conv1,216,10,51.46,59.8,77.75
Layer 2 - layer1.0.conv1,1152,20,69.36,83.28,96.51
Layer 3 - layer1.0.conv2,2304,30,77.85,89.48,97
Layer 4 - fc,160,1,50.65,64.5,92.87
AP - adaptive average pool before fc,0,10,0,0,0
"""


def spec(name, shape, role="sparse"):
    weight = len(shape) > 1
    return LayerSpec(f"{name}.weight", shape, "Conv2d", role if weight else "dense", weight, "")


SPECS = {
    spec.name: spec
    for spec in [
        *(spec(name, shape) for name, shape in SHAPES.items()),
        spec("bn", (8,)),
        spec("stem", (4, 4), "dense"),
    ]
}


def read(tmp_path, text, column=None, specs=SPECS):
    path = tmp_path / "d.csv"
    path.write_text(text, encoding="utf-8")
    return read_densities(path, column, specs)


@pytest.mark.parametrize(
    "text",
    [
        "conv1,0.5\nlayer1.0.conv1,0.25\nlayer1.0.conv2,.1\nfc,1\n",
        "name,density\nfc.weight,1.0\nlayer1.0.conv2.weight,1e-1\n\nconv1.weight,0.5\nlayer1.0.conv1,0.25\n",
        "layer,sparsity\nconv1,0.5\nlayer1.0.conv1,0.75\nlayer1.0.conv2,0.9\nfc,0\n",
        "layer;sparsity_percent;\nconv1;50,0;\nlayer1.0.conv1;75;\nlayer1.0.conv2;90;\nfc;0;\n",
        "layer,params,density in per cent\nconv1,9,50\nlayer1.0.conv1,9,25\nlayer1.0.conv2,9,10\nfc,9,100\nstem,9,100",
        "Layer,Other\n1,50%\n2,75%\n3,90.00%\n4,0%\n5,0%\n",
    ],
)
def test_plain_tables_of_many_forms_say_the_same(tmp_path, text):
    found = read(tmp_path, text)
    assert list(found.densities) == [f"{name}.weight" for name in SHAPES]
    assert list(found.densities.values()) == [Fraction(1, 2), Fraction(1, 4), Fraction(1, 10), 1]
    assert found.total == 108 + 288 + 230 + 160
    assert found.spread(found.total) == [108, 288, 230, 160]


def test_published_tables_are_read_as_they_are(tmp_path):
    found = read(tmp_path, PUBLISHED, "90.23")
    assert found.note == "read column '90.23' as sparsity in per cent"
    assert found.densities["conv1.weight"] == 1 - Fraction("0.598")
    assert found.densities["fc.weight"] == 1 - Fraction("0.645")
    assert read(tmp_path, PUBLISHED, "Sparsity (%)").densities["fc.weight"] == 1 - Fraction("0.5065")
    with pytest.raises(UsageError, match=r"3 columns of densities; .* FILE.csv:79.55. It has 79.55, 90.23 and 99.1"):
        read(tmp_path, PUBLISHED)
    with pytest.raises(UsageError, match="has no column '95'"):
        read(tmp_path, PUBLISHED, "95")


def test_a_column_of_per_cent_that_does_not_say_of_what_is_of_zeros_and_says_so(tmp_path):
    text = "Layer,STR,Uniform\n" + "".join(f"{i},{60 + i}.5%,90.00%\n" for i in range(1, 5))
    found = read(tmp_path, text, "str", {name: layer for name, layer in SPECS.items() if name != "stem.weight"})
    assert "sparsity in per cent" in found.note
    assert found.densities["conv1.weight"] == 1 - Fraction("0.615")


def test_layers_of_a_sequential_are_named_by_their_numbers(tmp_path):
    specs = {layer.name: layer for layer in (spec("0", (4, 4)), spec("2", (4, 8)))}
    assert read(tmp_path, "2,0.5\n0,1\n", specs=specs).spread(32) == [16, 16]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 1000)), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_a_spread_is_exact_with_one_factor_for_all_layers_between_floor_and_cap(layers, position):
    sizes = tuple(size for size, _ in layers)
    densities = {str(i): Fraction(thousandths, 1000) for i, (_, thousandths) in enumerate(layers)}
    found = DensityFile(densities, sizes, "")
    assert len(sizes) <= found.total <= sum(sizes)
    for total in (found.total, len(sizes) + round(position * (sum(sizes) - len(sizes)))):
        counts = found.spread(total)
        assert sum(counts) == total
        assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
        # Between floor and cap, counts are within one of the density times one factor.
        free = [
            (count - 1, count + 1, density * size)
            for count, size, density in zip(counts, sizes, densities.values(), strict=True)
            if 1 < count < size and density
        ]
        lows, highs = [low / share for low, _, share in free], [high / share for _, high, share in free]
        assert not free or max(lows) <= min(highs) + 1e-9


def test_the_own_budget_of_a_file_gives_each_layer_its_density(tmp_path):
    found = read(tmp_path, PUBLISHED, "79.55")
    for count, size, density in zip(found.spread(found.total), found.sizes, found.densities.values(), strict=True):
        assert abs(count - density * size) <= 1


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    text = "conv1,0.5\nconv1.weight,0.5\nlayer1.0.conv3,0.1\nlayer1.0.conv2,1.5\nstem,0.5\nfc,nan\n\x1b[2Jx,1\n"
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    for words in (
        "the 4 sparse layers",
        "2 unknown: 'layer1.0.conv3' (meant layer1.0.conv2?), '\\x1b[2Jx'",
        "1 missing: 'layer1.0.conv1.weight'",
        "1 repeated: 'conv1.weight'",
        "2 with a value that gives no density in [0, 1]: 'layer1.0.conv2' ('1.5'), 'fc' ('nan')",
        "1 kept dense by a rule (--sparsify would make them sparse): 'stem'",
    ):
        assert words in message, message


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"\xff\xfe\x00\x01", FormatError, "cannot be read as CSV"),
        (b"", UsageError, "no lines with a name and a value"),
        (b"name,density\n", UsageError, "no lines with a name and a value"),
        (b"conv1\nfc\n", UsageError, "no lines with a name and a value"),
        (b"a,1\n" * (1 << 21), FormatError, "more than 4,194,304 bytes"),
        (b'conv1,"0.5', UsageError, "1 with a value|3 missing"),
        (b"conv1,1e99999999\n", UsageError, "no density"),
    ],
)
def test_files_that_are_no_tables_are_refused(tmp_path, content, error, words):
    path = tmp_path / "d.csv"
    path.write_bytes(content)
    with pytest.raises(error, match=words):
        read_densities(path, None, SPECS)


def test_a_file_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(FileError, match="--distribution file .* does not exist"):
        read_densities(tmp_path / "none.csv", None, SPECS)


def test_a_spec_names_a_file_and_perhaps_a_column(tmp_path):
    path = tmp_path / "a:b.csv"
    path.write_text("x")
    assert parse_spec(f"file:{path}") == (path, None)
    assert parse_spec(f"file:{path}:90.23") == (path, "90.23")
    assert [str(part) for part in parse_spec("file:d.csv")] == ["d.csv", "None"]
    with pytest.raises(UsageError, match="names no file"):
        parse_spec("file:")
