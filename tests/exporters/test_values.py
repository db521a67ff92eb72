"""Rounding to float16 happens once, and to weights alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.errors import UsageError
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.values import VALUES, stored_as

SPECS = {
    "w": LayerSpec("w", (4,), "Linear", "sparse", True, "weight"),
    "kept": LayerSpec("kept", (2,), "Linear", "dense", True, "weight"),
    "b": LayerSpec("b", (2,), "Linear", "dense", False, "bias"),
    "steps": LayerSpec("steps", (), "BatchNorm2d", "buffer", False, "buffer"),
}


def tensors(*weights):
    return {
        "w": SparseTensor(Mask((4,), np.array([0, 1, 3])), np.array([1.0, *weights], np.float32)),
        "kept": SparseTensor(Mask.full((2,)), np.array([0.1, -0.0], np.float32)),
        "b": SparseTensor(Mask.full((2,)), np.array([0.1, 1e6], np.float32)),
        "steps": SparseTensor(Mask.full(()), np.array([70_000], np.int64)),
    }


def test_fp32_changes_nothing():
    given_tensors = tensors(0.1, 1e30)
    found = stored_as(given_tensors, SPECS, "fp32")
    assert all(found[name] is tensor for name, tensor in given_tensors.items())


def test_fp16_rounds_weights_alone():
    found = stored_as(tensors(0.1, 1e-9), SPECS, "fp16")
    assert {name: tensor.values.dtype.name for name, tensor in found.items()} == {
        "w": "float16",
        "kept": "float16",
        "b": "float32",
        "steps": "int64",
    }
    assert found["w"].values.tobytes() == np.array([1, 0.1, 0], np.float16).tobytes()
    assert found["w"].mask.active == 3  # though one is zero now
    assert np.signbit(found["kept"].values[1])


@given(st.floats(width=32, min_value=-65504, max_value=65504))
def test_rounding_equals_that_of_torch_and_happens_once(value):
    once = stored_as(tensors(value, 0), SPECS, "fp16")["w"].values
    assert once.tobytes() == torch.tensor([1.0, value, 0.0]).half().numpy().tobytes()
    again = {**tensors(0, 0), "w": SparseTensor(Mask((4,), np.array([0, 1, 3])), once.astype(np.float32))}
    assert stored_as(again, SPECS, "fp16")["w"].values.tobytes() == once.tobytes()


@pytest.mark.parametrize("value", [65520.0, -1e30, np.inf, np.nan])
def test_values_beyond_float16_are_refused_in_one_sentence(value):
    with pytest.raises(UsageError, match=r"'fp16' cannot hold weight 'w', which has a value of .* use --values fp32\."):
        stored_as(tensors(value, 0), SPECS, "fp16")


def test_unknown_values_are_named():
    with pytest.raises(UsageError, match="--values 'fp61' is unknown; did you mean fp16"):
        stored_as(tensors(0, 0), SPECS, "fp61")
    assert VALUES == ("fp32", "fp16", "int8", "int6", "int5", "int4", "palette")
