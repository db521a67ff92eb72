"""Importances that overflowed have a place in the order of weights."""

import numpy as np
import pytest

from dsr_tool.sparsity.distribution import Lamp, largest

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("bad", [INF, NAN])
def test_layer_budgets_sum_up_whatever_the_importances_are(bad):
    layers = [np.array([1, bad, 2, bad], np.float32), np.full(6, bad, np.float32), np.arange(5, dtype=np.float32)]
    for total in range(3, 16):
        counts = Lamp(layers).counts(total, [1, 1, 1])
        assert sum(counts) == total and min(counts) >= 1


def test_the_largest_are_as_many_as_asked_for_and_infinities_come_first():
    magnitudes = np.array([NAN, 3, INF, NAN, 1, 2], np.float32)
    for active in range(1, 7):
        assert len(set(largest(magnitudes, active).tolist())) == active
    assert sorted(largest(magnitudes, 3).tolist()) == [1, 2, 5]
