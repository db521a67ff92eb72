"""The reference resizes like ONNX Runtime and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.errors import UsageError
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.reference.call import FUNCTIONS

COORDINATES = ("align_corners", "asymmetric", "half_pixel", "pytorch_half_pixel")
SIZES = st.tuples(st.integers(1, 9), st.integers(2, 9))


def picture(size: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 3, *size)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(2, 7), st.integers(2, 7)), SIZES, st.sampled_from(COORDINATES))
def test_linear_and_nearest_resize_agree(agree, before, after, coordinates):
    x, sizes = picture(before), np.array((2, 3, *after), np.int64)
    agree("Resize", x, None, None, sizes, mode="linear", coordinate_transformation_mode=coordinates)
    rounding = "floor" if coordinates == "asymmetric" else "round_prefer_floor"
    # If a coordinate lies exactly between two entries, rounding errors decide; such sizes are skipped.
    if all(m % n == 0 or n % m == 0 for n, m in zip(before, after, strict=True)) and coordinates == "asymmetric":
        agree(
            "Resize", x, None, None, sizes, mode="nearest", nearest_mode=rounding,
            coordinate_transformation_mode=coordinates,
        )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(2, 7), st.integers(2, 7)),
    SIZES,
    st.sampled_from(("bilinear", "bicubic", "nearest")),
    st.booleans(),
)
def test_resize_agrees_with_torch(before, after, mode, align):
    x = picture(before)
    options = {} if mode == "nearest" else {"align_corners": align}
    theirs = torch.nn.functional.interpolate(torch.from_numpy(x), after, mode=mode, **options)
    coordinates = "align_corners" if align else "half_pixel"
    name = {"bilinear": "linear", "bicubic": "cubic", "nearest": "nearest"}[mode]
    attributes = {"mode": name, "coordinate_transformation_mode": coordinates}
    if mode == "nearest":
        attributes |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    ours = FUNCTIONS["Resize"](x, None, None, np.array((2, 3, *after)), **attributes)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["linear", "cubic", "nearest"])
def test_resize_by_scales_agrees(agree, mode):
    agree("Resize", picture((4, 5)), None, np.array([1, 1, 2, 3], np.float32), mode=mode)


def test_resize_of_volumes_agrees(agree):
    sizes = np.array((2, 3, 4, 5, 6), np.int64)
    agree("Resize", picture((2, 3, 4)), None, None, sizes, mode="linear")


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"mode": "lanczos"}, "mode of Resize 'lanczos'"),
        ({"coordinate_transformation_mode": "tf_crop_and_resize"}, "tf_crop_and_resize"),
        ({"nearest_mode": "up"}, "nearest mode of Resize 'up'"),
        ({"antialias": 1}, "antialias"),
    ],
)
def test_unsupported_modes_are_refused(attributes, words):
    with pytest.raises(UsageError, match=words):
        FUNCTIONS["Resize"](picture((2, 2)), None, None, np.array((2, 3, 4, 4)), **attributes)


@pytest.mark.parametrize("name", ["coordinate_transformation_mode", "nearest_mode"])
def test_an_unknown_mode_is_refused_by_plans_too(machine, name):
    node = Node("Resize", ("x", "", "scales"), ("y",), {name: "novel"})
    scales = {"scales": np.array([1, 1, 2, 2], np.float32)}
    graph = Graph((Value("x", (None, 3, 4, 4)),), (Value("y", ()),), (node,), scales, (), 20)
    with pytest.raises(UsageError, match="novel"):
        Plan(graph, {}, (1, 3, 4, 4), machine)
