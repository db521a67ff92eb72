"""Numbers, charts and pictures of a page are right for every value and stay inside their frame."""

import base64
import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dsr_tool.report.page import numbers
from dsr_tool.report.page.axes import axis, layer_ticks
from dsr_tool.report.page.charts import Series, bars, columns
from dsr_tool.report.page.lines import lines
from dsr_tool.report.page.mask_pictures import mask_picture, picture_budget
from dsr_tool.sparsity.mask import Mask


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1814.07, "1,814"), (4.3, "4.300"), (0.00123456, "0.001235"), (999.96, "1,000"), (5e-9, "5.000e-09")],
)
def test_numbers_have_four_significant_digits(value, text):
    assert numbers.significant(value) == text


def test_amounts_have_the_unit_that_suits_them():
    assert numbers.byte_size(999) == "999\u00a0B"
    assert numbers.byte_size(999_960) == "1.000\u00a0MB"
    assert numbers.macs(1_814_073_344) == "1.814\u00a0GMACs"
    assert numbers.short_count(11_689_512) == "11.69\u00a0M"
    assert numbers.named_value("peak_bytes", 12_345_678) == "12.35\u00a0MB (12,345,678)"
    assert numbers.named_value("fits", False) == "no"
    assert numbers.named_value("seed", 7) == "7"


# --- charts ----------------------------------------------------------------------------------------------

FINITE = st.floats(min_value=-1e9, max_value=1e9, allow_nan=False)


@given(st.lists(FINITE, min_size=1))
def test_an_axis_covers_its_values(values):
    scale = axis(min(values), max(values), str)
    places = [scale.at(value) for value in values]
    assert all(-0.1 <= place <= 100.1 for place in places)
    assert 2 <= len(scale.ticks) <= 8
    assert all(0 <= tick.at <= 100 for tick in scale.ticks)


@given(st.lists(st.floats(min_value=1e-12, max_value=1e12), min_size=1))
def test_a_logarithmic_axis_covers_its_values(values):
    scale = axis(min(values), max(values), str, logarithmic=True)
    assert all(-0.1 <= scale.at(value) <= 100.1 for value in values)


@given(st.lists(st.floats(min_value=0, max_value=1, allow_nan=False), min_size=2, max_size=6))
def test_labels_of_lines_do_not_overlap_or_leave_the_plot(ends):
    series = [Series(f"line {i}", "s", [0.5, end]) for i, end in enumerate(ends)]
    places = sorted(line.label_at for line in lines([1, 2], series, str, span=(1, 2)).lines)
    assert places[0] >= 0
    assert places[-1] <= 100
    assert all(b - a >= 8.9 for a, b in pairwise(places))


def test_a_label_is_at_the_end_of_its_line():
    chart = lines([1, 2, 3], [Series("", "s", [5.0, 6.0, float("nan")])], str, span=(1, 5))
    assert [(line.label, line.end) for line in chart.lines] == [("6.0", 25)]


def labels(names):
    return [[tick.label for tick in ticks] for ticks in layer_ticks(names)]


def test_columns_are_labeled_by_the_prefixes_that_fit():
    stages = [f"layer{i}.{j}.weight" for i in range(1, 5) for j in range(5)]
    assert labels(stages) == [["layer1", "layer2", "layer3", "layer4"]] * 2
    assert labels(["conv.weight", *stages])[1][0] == "conv"
    blocks = [f"features.{name}.{j}.weight" for name in ("denseblock1", "denseblock2", "denseblock3") for j in range(9)]
    assert labels(blocks) == [["denseblock1", "denseblock2", "denseblock3"]] * 2
    many = [f"features.denseblock{i}.{j}.weight" for i in range(6) for j in range(4)]
    assert labels(many) == [["1", "10", "24"], [f"denseblock{i}" for i in range(6)]]


def test_labels_that_repeat_are_replaced_by_numbers():
    blocks = [f"features.{i}.block.{j}.weight" for i in range(14) for j in range(4)]
    assert labels(blocks)[0] == labels(blocks)[1] == ["1", "20", "40", "56"]
    assert labels(["weight"]) == [["weight"], ["weight"]]
    long = [f"layers.encoder_layer_{i}.weight" for i in range(3)]
    assert labels(long)[1] == [f"\u2026coder_layer_{i}" for i in range(3)]


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=50))
def test_columns_stack_to_their_sum(values):
    series = [Series("a", "a", values), Series("b", "b", values[::-1])]
    chart = columns([str(i) for i in range(len(values))], series, str, ["t"] * len(values))
    for i, column in enumerate(chart.columns):
        top = min((piece[1] for piece in column.pieces), default=1000)
        total = values[i] + values[-1 - i]
        assert abs(top - 10 * chart.axis.at(total)) <= 9
        assert all(top < bottom for _, top, bottom in column.pieces)


def test_bars_fill_their_length():
    stacked = bars([("a", "1", "s", 1.0), ("b", "3", "s", 3.0)], stacked=True)
    assert [(bar.start, bar.length) for bar in stacked] == [(0, 25), (25, 75)]
    assert [bar.length for bar in bars([("a", "1", "s", 1.0), ("b", "4", "s", 4.0)])] == [25, 100]
    assert bars([("a", "0", "s", 0.0)])[0].length == 0


# --- pictures of masks -----------------------------------------------------------------------------------


def pixels(picture):
    raw = base64.b64decode(picture.address.removeprefix("data:image/png;base64,"))
    image = Image.open(io.BytesIO(raw))
    assert image.size == (picture.width, picture.height)
    return np.asarray(image)


def test_a_small_mask_has_one_block_per_weight():
    active = np.random.default_rng(0).random((24, 4, 3, 3)) < 0.2
    picture = mask_picture(Mask.from_bool(active), 10_000)
    assert picture.block == (1, 1)
    assert np.array_equal(pixels(picture) == 15, active.reshape(24, 36))


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 700)),
    st.floats(0, 1),
    st.integers(1, 3000),
    st.integers(0, 2**32 - 1),
)
def test_a_picture_has_at_most_the_allowed_blocks_and_the_right_shades(shape, density, blocks, seed):
    active = np.random.default_rng(seed).random(shape) < density
    picture = mask_picture(Mask.from_bool(active), blocks)
    assert (picture.rows, picture.columns) == shape
    down, across = -(-shape[0] // picture.block[0]), -(-shape[1] // picture.block[1])
    assert down * across <= max(blocks, 1)
    assert 0.2 <= picture.width / picture.height <= 4.1
    shades = pixels(picture)
    assert shades.max() == (15 if active.any() else 0)
    assert picture.darkest >= active.mean() - 1e-9


def test_pictures_of_many_layers_share_the_bytes_of_a_page():
    assert picture_budget(1) > picture_budget(50) > picture_budget(400)
