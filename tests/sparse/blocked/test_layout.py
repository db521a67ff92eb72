"""Relayouts are exact both ways, for every batch size, lane count and memory format, and so are their gradients."""

from __future__ import annotations

import pytest
import torch

from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.training import CALLS
from dsr_tool.sparse.blocked.layout import block, lanes_for, unblock

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")

LANES = (4, 8, 16)
SHAPES = ((1, 1, 1, 1), (5, 3, 4, 3), (16, 16, 7, 7), (17, 21, 5, 2), (33, 40, 1, 1), (9, 1, 6, 5), (12, 70, 23, 3))


def reference(x, lanes):
    """Returns the blocked layout by torch's own copies."""
    images = -(-x.shape[0] // lanes) * lanes
    padded = torch.zeros(images, *x.shape[1:])
    padded[: x.shape[0]] = x
    return padded.view(-1, lanes, *x.shape[1:]).permute(0, 2, 3, 4, 1).contiguous()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_every_pixel_lands_in_its_lane_and_padding_is_zero(lanes, shape, memory):
    x = torch.randn(shape).contiguous(memory_format=memory)
    before = CALLS["dsr_block"]
    blocked = block(x, lanes)
    assert CALLS["dsr_block"] == before + 1
    assert blocked.is_contiguous()
    assert torch.equal(blocked, reference(x, lanes))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_unblock_is_the_inverse_in_either_memory_format(lanes, shape, channels_last):
    x = torch.randn(shape)
    before = CALLS["dsr_unblock"]
    back = unblock(reference(x, lanes), shape[0], channels_last=channels_last)
    assert CALLS["dsr_unblock"] == before + 1
    assert back.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.equal(back, x)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (16, 64), (19, 130)])
def test_rows_of_features_are_channels_of_one_pixel(lanes, shape):
    x = torch.randn(shape, requires_grad=True)
    blocked = block(x, lanes)
    assert torch.equal(blocked, reference(x.detach()[:, :, None, None], lanes))
    weights = torch.randn_like(blocked)
    (gradient,) = torch.autograd.grad(blocked, x, weights)
    assert torch.equal(gradient, unblock(weights, shape[0]).flatten(1))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_relayouts_in_the_format_of_the_input(memory):
    x = torch.randn(18, 5, 3, 4).contiguous(memory_format=memory).requires_grad_()
    blocked = block(x, 8)
    weights = torch.randn_like(blocked)
    blocked.backward(weights)
    assert torch.equal(x.grad, unblock(weights, 18))
    assert x.grad.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_padding_are_zero(memory):
    blocked = torch.randn(2, 5, 3, 4, 16, requires_grad=True)
    weights = torch.randn(18, 5, 3, 4).contiguous(memory_format=memory)
    unblock(blocked, 18, channels_last=memory is torch.channels_last).backward(weights)
    assert torch.equal(blocked.grad, reference(weights, 16))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 3, 5, 4).expand(6, 3, 5, 4),
        torch.randn(6, 3, 4, 5).transpose(2, 3),
        torch.randn(12, 3, 5, 4)[::2],
        torch.randn(6, 8, 5, 4)[:, 2:5],
        torch.randn(6, 5, 4, 3).permute(0, 3, 1, 2),
        torch.randn(3, 6).T,
    ],
    ids=["expanded", "transposed", "every second image", "some channels", "channels last", "features first"],
)
def test_views_of_any_strides_are_read_right(x):
    pixels = x if x.dim() == 4 else x[:, :, None, None]
    assert torch.equal(block(x, 4), reference(pixels, 4))
    blocked = reference(torch.randn(6, 8, 5, 4), 4)
    assert torch.equal(unblock(blocked[:, 2:5], 6), unblock(blocked.clone(), 6)[:, 2:5])


def test_channels_last_is_read_without_a_copy(monkeypatch):
    x = torch.randn(6, 3, 5, 4).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    block(x, 4)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(threads):
    x = torch.randn(40, 30, 17, 13)
    blocked = reference(x, 16)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(block(x, 16), blocked)
        assert torch.equal(block(x.contiguous(memory_format=torch.channels_last), 16), blocked)
        assert torch.equal(unblock(blocked, 40, channels_last=True), x)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("images", "lanes"),
    [(1, 4), (4, 4), (8, 8), (16, 16), (24, 8), (20, 4), (40, 8), (96, 16), (100, 16), (128, 16), (1000, 16)],
)
def test_lanes_leave_little_padding(images, lanes):
    assert lanes_for(images) == lanes


def test_what_is_no_batch_of_images_is_refused():
    with pytest.raises(ValueError, match=r"block\(\) takes a float32 CPU tensor .* but got \(2, 3, 4\)"):
        block(torch.zeros(2, 3, 4), 4)
    with pytest.raises(ValueError, match="float64"):
        block(torch.zeros(2, 3, dtype=torch.float64), 4)
    with pytest.raises(ValueError, match="N > 0"):
        block(torch.zeros(0, 3), 4)
    with pytest.raises(ValueError, match="lanes 5 is not 4, 8 or 16"):
        block(torch.zeros(2, 3), 5)
    with pytest.raises(ValueError, match="33 images do not fill 2 blocks of 16 lanes"):
        unblock(torch.zeros(2, 3, 4, 4, 16), 33)
    with pytest.raises(ValueError, match="expected a float32 CPU tensor"):
        unblock(torch.zeros(2, 3, 4, 16), 32)
