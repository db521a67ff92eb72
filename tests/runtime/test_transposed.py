"""The reference computes transposed convolutions and Col2Im like ONNX Runtime and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.runtime.reference.call import FUNCTIONS

RNG = np.random.default_rng(0)


def random_sparse(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> np.ndarray:
    return np.where(rng.random(shape) < density, rng.standard_normal(shape), 0).astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.sampled_from(((1, 3), (2, 3), (3, 2), (6, 1), (6, 2))),
    st.sampled_from((0.0, 0.1, 1.0)),
    st.booleans(),
    st.data(),
)
def test_transposed_convolutions_agree(agree, seed, rank, groups, density, with_bias, data):
    rng = np.random.default_rng(seed)
    group, out = groups
    sizes = st.tuples(*[st.integers(1, 3)] * rank)
    kernel, strides, dilations = (data.draw(sizes) for _ in range(3))
    extra = tuple(data.draw(st.integers(0, s - 1)) for s in strides)
    # Pads cut less off than there is.
    pads = tuple(data.draw(st.integers(0, 1)) for _ in range(2 * rank))
    x = rng.standard_normal((data.draw(st.integers(1, 3)), 6, *data.draw(st.tuples(*[st.integers(3, 5)] * rank))))
    weight = random_sparse(rng, (6, out, *kernel), density)
    bias = [rng.standard_normal(group * out).astype(np.float32)] if with_bias else []
    agree(
        "ConvTranspose",
        x.astype(np.float32),
        weight,
        *bias,
        group=group,
        strides=strides,
        dilations=dilations,
        pads=pads,
        output_padding=extra,
    )


X = RNG.standard_normal((2, 4, 5, 6)).astype(np.float32)
WEIGHT = RNG.standard_normal((4, 3, 3, 4)).astype(np.float32)


@pytest.mark.parametrize("auto_pad", ["VALID", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 3)])
def test_automatic_padding_agrees(agree, auto_pad, strides):
    agree("ConvTranspose", X, WEIGHT, auto_pad=auto_pad, strides=strides)


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("shape", [(10, 12), (9, 12), (10, 13)])
def test_a_given_output_shape_agrees(agree, auto_pad, shape):
    agree("ConvTranspose", X, WEIGHT, auto_pad=auto_pad, strides=(2, 2), output_shape=shape)


def test_forms_that_do_not_fit_are_refused():
    for attributes in ({"pads": (9, 0, 9, 0)}, {"output_padding": (-1, 0)}, {"kernel_shape": (2, 2)}):
        with pytest.raises(FormatError):
            FUNCTIONS["ConvTranspose"](X, WEIGHT, **attributes)
    with pytest.raises(UsageError, match="auto_pad"):
        FUNCTIONS["ConvTranspose"](X, WEIGHT, auto_pad="novel")


@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
@pytest.mark.parametrize("dilations", [(1, 1), (1, 2)])
@pytest.mark.parametrize("pads", [(0, 0), (1, 2)])
def test_columns_to_images_agree(agree, strides, dilations, pads):
    image, block = (7, 9), (2, 3)
    x = torch.randn(2, 3, *image, generator=torch.Generator().manual_seed(0))
    columns = torch.nn.functional.unfold(x, block, dilations, pads, strides).numpy()
    sizes = (np.array(image, np.int64), np.array(block, np.int64))
    agree("Col2Im", columns, *sizes, strides=strides, dilations=dilations, pads=(*pads, *pads))


def test_columns_in_three_dimensions_agree(agree):
    sizes = (np.array((3, 4, 5), np.int64), np.array((2, 1, 2), np.int64))
    agree("Col2Im", RNG.standard_normal((1, 8, 2 * 4 * 4)).astype(np.float32), *sizes)


def test_columns_of_another_image_are_refused():
    x = np.zeros((1, 4, 5), np.float32)
    for image in ((3, 3), (1, 1), (-4, 3)):
        with pytest.raises(FormatError, match="columns of shape"):
            FUNCTIONS["Col2Im"](x, np.array(image), np.array((2, 2)))
