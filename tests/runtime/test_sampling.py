"""The reference samples images like ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.runtime.reference.call import FUNCTIONS

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 5, 7)).astype(np.float32)
GRID = (RNG.random((2, 4, 6, 2)) * 3 - 1.5).astype(np.float32)
"""Coordinates inside and outside the image."""

modes = pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
paddings = pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
corners = pytest.mark.parametrize("aligned", [0, 1])


@modes
@paddings
@corners
def test_samples_agree(agree, mode, padding, aligned):
    agree("GridSample", X, GRID, mode=mode, padding_mode=padding, align_corners=aligned)


@modes
@paddings
@corners
def test_samples_agree_with_torch(mode, padding, aligned):
    theirs = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    grid = GRID * 4  # far outside, where a reflection is reflected again
    expected = torch.nn.functional.grid_sample(
        torch.from_numpy(X), torch.from_numpy(grid), theirs, padding, align_corners=bool(aligned)
    )
    found = FUNCTIONS["GridSample"](X, grid, mode=theirs, padding_mode=padding, align_corners=aligned)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@paddings
@corners
def test_samples_of_volumes_agree(agree, mode, padding, aligned):
    x = RNG.standard_normal((1, 2, 3, 4, 5)).astype(np.float32)
    grid = (RNG.random((1, 2, 3, 4, 3)) * 3 - 1.5).astype(np.float32)
    agree("GridSample", x, grid, mode=mode, padding_mode=padding, align_corners=aligned)


def test_coordinates_that_are_no_numbers_are_outside():
    grid = np.full((1, 1, 2, 2), np.nan, np.float32)
    grid[..., 0] = (np.inf, -np.inf)
    assert not FUNCTIONS["GridSample"](X[:1], grid).any()


def test_other_forms_are_refused():
    with pytest.raises(UsageError, match="mode"):
        FUNCTIONS["GridSample"](X, GRID, mode="novel")
    with pytest.raises(UsageError, match="padding mode"):
        FUNCTIONS["GridSample"](X, GRID, padding_mode="novel")
    with pytest.raises(UsageError, match="cubic"):
        FUNCTIONS["GridSample"](X[..., None], np.zeros((2, 1, 1, 1, 3), np.float32), mode="cubic")
    for grid in (GRID[:1], GRID[..., :1], GRID[0]):
        with pytest.raises(FormatError, match="does not fit"):
            FUNCTIONS["GridSample"](X, grid)
