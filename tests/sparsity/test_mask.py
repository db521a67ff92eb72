import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dsr_tool.errors import FormatError
from dsr_tool.sparsity.mask import Mask, entropy_bound_bits

masks = hnp.arrays(np.bool_, hnp.array_shapes(max_dims=4, max_side=9, min_dims=0))


@given(masks)
def test_bits_and_positions_are_inverse(active):
    mask = Mask.from_bool(active)
    assert mask.active == active.sum()
    np.testing.assert_array_equal(mask.to_bool(), active)
    np.testing.assert_array_equal(Mask.from_bits(mask.bits, mask.shape).positions, mask.positions)


@given(st.integers(0, 400), st.integers(0, 400))
def test_entropy_bound_is_the_logarithm_of_the_number_of_masks(size, active):
    active = min(active, size)
    assert entropy_bound_bits(size, active) == pytest.approx(math.log2(math.comb(size, active)), abs=1e-6)


@pytest.mark.parametrize(("bits", "shape"), [([255], (3, 5)), ([255, 255], (3, 5)), ([0, 0, 0], (2, 8))])
def test_bits_that_do_not_fit_are_refused(bits, shape):
    with pytest.raises(FormatError):
        Mask.from_bits(np.array(bits, np.uint8), shape)
