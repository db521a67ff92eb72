"""The reference computes operators on shapes and indices like ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.runtime.reference.call import FUNCTIONS

X = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)


def int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize("shape", [(6, -1), (0, 0, 20), (-1,), (0, -1, 2, 5), (1, 120)])
def test_reshape_agrees(agree, shape):
    agree("Reshape", X, int64(*shape))


def test_reshape_of_empty_arrays_agrees(agree):
    agree("Reshape", np.zeros((0, 4), np.float32), int64(4, 0), allowzero=1)


@pytest.mark.parametrize("axis", range(-4, 5))
def test_flatten_agrees(agree, axis):
    agree("Flatten", X, axis=axis)


def test_squeeze_and_unsqueeze_agree(agree):
    agree("Squeeze", X.reshape(1, 6, 1, 20))
    agree("Squeeze", X.reshape(1, 6, 1, 20), int64(-2))
    agree("Unsqueeze", X, int64(0, -1, 3))


def test_transpose_agrees(agree):
    agree("Transpose", X)
    agree("Transpose", X, perm=(2, 0, 3, 1))


def test_concat_and_split_agree(agree):
    agree("Concat", X, X[:, :1], X, axis=-3)
    agree("Split", X, int64(1, 0, 4), axis=-1, outputs=3)
    agree("Split", X, axis=2, num_outputs=2, outputs=2)
    agree("Split", X, axis=3, num_outputs=3, outputs=3)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_slice_agrees(agree, data):
    axes = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
    near = st.integers(-7, 7)
    starts = int64(*(data.draw(near | st.sampled_from((2**31 - 1, -(2**63)))) for _ in axes))
    steps = int64(*(data.draw(st.sampled_from((1, 2, 3, -1, -2))) for _ in axes))
    # With a negative step, ONNX Runtime takes the largest end for the smallest; the standard does not say so.
    far = [st.sampled_from((2**31 - 1, 2**63 - 1) if step > 0 else (-(2**63),)) for step in steps]
    ends = int64(*(data.draw(near | end) for end in far))
    agree("Slice", X, starts, ends, int64(*(axis - 4 * data.draw(st.booleans()) for axis in axes)), steps)


def test_slice_with_default_axes_and_steps_agrees(agree):
    agree("Slice", X, int64(1, 0), int64(2, -1))


@pytest.mark.parametrize("indices", [int64(0, 2, -1), np.int64(1).reshape(()), int64(0, 1, 2, 0).reshape(2, 2)])
def test_gather_agrees(agree, indices):
    agree("Gather", X, indices, axis=1)
    agree("Gather", X, indices.astype(np.int32), axis=-1)


@pytest.mark.parametrize(
    ("indices", "batch_dims"),
    [
        (int64(1, 2, 0, 1).reshape(2, 2), 0),
        (int64(0, -1).reshape(2, 1), 0),
        (int64(2, 0).reshape(2, 1), 1),
        (int64(*range(3), *range(3)).reshape(2, 3, 1), 2),
        (int64(2, 3, 0, 1, 1, 1, 2, 2).reshape(2, 2, 2), 1),
    ],
)
def test_gather_nd_agrees(agree, indices, batch_dims):
    agree("GatherND", X, indices, batch_dims=batch_dims)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatter_nd_agrees(agree, reduction):
    updates = np.arange(40, dtype=np.float32).reshape(2, 4, 5) - 30
    agree("ScatterND", X, int64(0, 1, 1, -1).reshape(2, 2), updates, reduction=reduction)
    if reduction != "none":
        agree("ScatterND", X, int64(0, 1, 0, 1).reshape(2, 2), updates, reduction=reduction)


def test_scatter_nd_does_not_change_its_input():
    before = X.copy()
    FUNCTIONS["ScatterND"](X, int64(0).reshape(1, 1), np.zeros((1, 3, 4, 5), np.float32))
    np.testing.assert_array_equal(X, before)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_pad_agrees(agree, mode):
    agree("Pad", X, int64(0, 0, 2, 1, 0, 0, 1, 3), mode=mode)
    agree("Pad", X, int64(2, 1, 1, 3), None, int64(-2, 3), mode=mode)


@pytest.mark.parametrize("pads", [(0, 0, 2, 1, 0, 0, 1, 3), (1, 0, 0, 7, 0, 2, 9, 0), (0, 0, 0, 0, 0, 0, 0, 0)])
def test_pad_by_wrapping_agrees_with_the_standard(pads):
    """The referee is onnx itself: ONNX Runtime reads outside the input where a pad is longer than an axis."""
    model = helper.make_node("Pad", ["x", "pads"], ["y"], mode="wrap")
    (expected,) = ReferenceEvaluator(model).run(None, {"x": X, "pads": int64(*pads)})
    np.testing.assert_array_equal(FUNCTIONS["Pad"](X, int64(*pads), mode="wrap"), expected)


def test_pad_by_wrapping_agrees(agree):
    agree("Pad", X, int64(0, 0, 2, 1, 0, 0, 1, 3), mode="wrap")
    agree("Pad", X, int64(2, 1, 1, 3), None, int64(-2, 3), mode="wrap")


def test_tile_agrees(agree):
    agree("Tile", X, int64(1, 2, 3, 1))
    agree("Tile", X[0, 0, 0], int64(0))
    for repeats in (int64(2), int64(1, 1, 1, -1)):
        with pytest.raises(FormatError, match="repeats"):
            FUNCTIONS["Tile"](X, repeats)


@pytest.mark.parametrize("blocksize", [1, 2, 3])
@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_agrees(agree, mode, blocksize):
    x = np.arange(2 * 36 * 2 * 3, dtype=np.float32).reshape(2, 36, 2, 3)
    agree("DepthToSpace", x, blocksize=blocksize, mode=mode)


def test_space_to_depth_agrees(agree):
    agree("SpaceToDepth", np.arange(2 * 3 * 4 * 6, dtype=np.float32).reshape(2, 3, 4, 6), blocksize=2)


def test_pad_with_a_value_and_negative_widths_agrees(agree):
    agree("Pad", X, int64(0, 0, -1, 1, 0, 1, -2, -3), np.float32(7).reshape(()))


def test_expand_agrees(agree):
    agree("Expand", X[:, :1], int64(2, 3, 4, 5))
    agree("Expand", X[:1, :1, :1, 0], int64(2, 1, 3))
    agree("Expand", X, int64(1))


@pytest.mark.parametrize("limits", [{}, {"start": 1}, {"start": -3, "end": -1}, {"start": 0, "end": 9}, {"end": -9}])
def test_shape_agrees(agree, limits):
    agree("Shape", X, **limits)


@pytest.mark.parametrize("values", [(0, 7, 2), (5, -4, -3), (3, 3, 1)])
def test_range_agrees(agree, values):
    agree("Range", *(np.array(value, np.int64) for value in values))
    agree("Range", *(np.array(value * 0.5, np.float32) for value in values))


def test_constants_have_the_values_and_types_of_the_standard():
    agree_with = np.testing.assert_array_equal
    agree_with(FUNCTIONS["Constant"](value_ints=(1, 2)), int64(1, 2), strict=True)
    agree_with(FUNCTIONS["Constant"](value_int=3), np.array(3, np.int64), strict=True)
    agree_with(FUNCTIONS["Constant"](value_float=0.5), np.array(0.5, np.float32), strict=True)
    agree_with(FUNCTIONS["Constant"](value_floats=(0.5,)), np.array([0.5], np.float32), strict=True)
    agree_with(FUNCTIONS["ConstantOfShape"](int64(2, 3)), np.zeros((2, 3), np.float32), strict=True)
    agree_with(FUNCTIONS["ConstantOfShape"](int64(2), value=(4,)), int64(4, 4), strict=True)


def test_unknown_modes_are_refused():
    with pytest.raises(UsageError, match="novel"):
        FUNCTIONS["Pad"](X, int64(*[0] * 8), mode="novel")
    with pytest.raises(UsageError, match="novel"):
        FUNCTIONS["DepthToSpace"](X, blocksize=1, mode="novel")
    with pytest.raises(FormatError, match="blocksize 0"):
        FUNCTIONS["SpaceToDepth"](X, blocksize=0)
    with pytest.raises(UsageError, match="reduction"):
        FUNCTIONS["ScatterND"](X, int64(0).reshape(1, 1), X[:1], reduction="mean")


def test_gather_into_too_many_dimensions_is_refused():
    x = np.zeros((1,) * 25, np.float32)
    with pytest.raises(FormatError, match="49 dimensions"):
        FUNCTIONS["Gather"](x, np.zeros((1,) * 25, np.int64))


@pytest.mark.parametrize("count", [40, 1000])
@pytest.mark.parametrize("op", ["Expand", "Reshape", "ConstantOfShape"])
def test_more_dimensions_than_numpy_has_are_refused(op, count):
    sizes = np.ones(count, np.int64)
    with pytest.raises(FormatError, match="dimensions"):
        _ = FUNCTIONS[op](*((sizes,) if op == "ConstantOfShape" else (np.ones(1, np.float32), sizes)))
