"""The reference computes reductions and norms like ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from dsr_tool.errors import UsageError
from dsr_tool.runtime.reference.call import FUNCTIONS

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)


@pytest.mark.parametrize(
    "op",
    [
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
    ],
)
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reductions_agree(agree, op, keepdims):
    for axes in ((1,), (-1, 0), (0, 1, 2, 3)):
        agree(op, X, np.array(axes, np.int64), keepdims=keepdims)
    agree(op, X, keepdims=keepdims)
    agree(op, X, np.zeros(0, np.int64), keepdims=keepdims)


def test_the_logarithm_of_a_sum_agrees(agree):
    agree("ReduceLogSum", np.abs(X), np.array([1], np.int64))
    agree("ReduceLogSumExp", X * 50, np.array([1], np.int64), keepdims=0)  # exp alone would overflow


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
def test_extremes_of_integers_keep_their_type(agree, op, dtype):
    agree(op, np.array([[3, 1, 2], [9, 7, 8]], dtype), np.array([1], np.int64))


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("last", [0, 1])
def test_places_of_extremes_agree(agree, op, last):
    x = np.round(X)  # with equal entries
    for axis in (0, 1, -1):
        agree(op, x, axis=axis, keepdims=0, select_last_index=last)
        agree(op, x, axis=axis, select_last_index=last)
    agree(op, x)


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin", "ArgMax"])
def test_extremes_of_nothing_are_refused(op):
    with pytest.raises(ValueError, match="empty|zero-size"):
        FUNCTIONS[op](np.zeros((0, 3), np.float32))


def test_noop_with_empty_axes_agrees(agree):
    agree("ReduceSum", X, np.zeros(0, np.int64), noop_with_empty_axes=1)


def test_sums_of_integers_keep_their_type(agree):
    agree("ReduceSum", np.arange(6, dtype=np.int32).reshape(2, 3), np.array([1], np.int64))


@pytest.mark.parametrize("axis", [-1, 1, 0])
def test_softmax_agrees(agree, axis):
    agree("Softmax", X * 50, axis=axis)
    agree("LogSoftmax", X * 50, axis=axis)


@pytest.mark.parametrize("axis", [-1, 2, 1])
def test_layer_norm_agrees(agree, axis):
    shape = X.shape[axis:]
    scale, bias = (RNG.standard_normal(shape).astype(np.float32) for _ in range(2))
    agree("LayerNormalization", X, scale, bias, axis=axis, epsilon=1e-3)
    agree("LayerNormalization", X, scale, axis=axis)


@pytest.mark.parametrize("rank", [3, 4])
def test_instance_norm_agrees(agree, rank):
    x = X.reshape(2, 3, 4, 5)[(..., *[0] * (4 - rank))]
    scale, bias = (RNG.standard_normal(3).astype(np.float32) for _ in range(2))
    agree("InstanceNormalization", x, scale, bias, epsilon=1e-3)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_batch_norm_agrees(agree, rank):
    x = X.reshape(2, 3, 4, 5)[(..., *[0] * (4 - rank))]
    scale, bias, mean, variance = (RNG.random(3).astype(np.float32) for _ in range(4))
    agree("BatchNormalization", x, scale, bias, mean, variance, epsilon=1e-3)


def test_batch_norm_in_training_mode_is_refused():
    ones = np.ones(3, np.float32)
    with pytest.raises(UsageError, match="training mode"):
        FUNCTIONS["BatchNormalization"](X, ones, ones, ones, ones, training_mode=1)
