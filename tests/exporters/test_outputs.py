"""Random inputs for verification."""

import pytest

from dsr_tool.errors import FormatError
from dsr_tool.graph.ir import Value
from exporters.verify.outputs import random_inputs


@pytest.mark.parametrize("size", [0, -1, 1 << 14, 1 << 62])
def test_empty_negative_and_huge_inputs_are_refused(size):
    with pytest.raises(FormatError, match="input 'x' has the shape"):
        random_inputs(Value("x", (None, 3, size, size)), 3, seed=0)


def test_inputs_are_one_alone_and_then_a_batch():
    given = random_inputs(Value("x", (None, 3, None), "float16"), 4, seed=0)
    assert [x.shape for x in given] == [(1, 3, 1), (4, 3, 1)]
    assert {x.dtype.name for x in given} == {"float16"}
