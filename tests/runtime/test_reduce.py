"""The reference computes reductions and norms like ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from dsr_tool.errors import UsageError
from dsr_tool.runtime.reference.call import FUNCTIONS

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum", "ReduceL2"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reductions_agree(agree, op, keepdims):
    for axes in ((1,), (-1, 0), (0, 1, 2, 3)):
        agree(op, X, np.array(axes, np.int64), keepdims=keepdims)
    agree(op, X, keepdims=keepdims)
    agree(op, X, np.zeros(0, np.int64), keepdims=keepdims)


def test_noop_with_empty_axes_agrees(agree):
    agree("ReduceSum", X, np.zeros(0, np.int64), noop_with_empty_axes=1)


def test_sums_of_integers_keep_their_type(agree):
    agree("ReduceSum", np.arange(6, dtype=np.int32).reshape(2, 3), np.array([1], np.int64))


@pytest.mark.parametrize("axis", [-1, 1, 0])
def test_softmax_agrees(agree, axis):
    agree("Softmax", X * 50, axis=axis)


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
