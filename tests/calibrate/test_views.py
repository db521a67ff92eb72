"""Views of pictures: of the same shape, made from the pictures alone, and the same ones for the same seed."""

import pytest
import torch

from dsr_tool.calibrate.views import affordable_views, with_views


def pictures(count=20, *shape):
    return torch.rand(count, *(shape or (3, 8, 10)), generator=torch.Generator().manual_seed(5))


def shares(inputs, count=1):
    """Returns how much of the picture before it each view of each constant picture holds."""
    seen = with_views(inputs, count, seed=0)[len(inputs) :]
    inputs = inputs.repeat(count, *[1] * (inputs.dim() - 1))
    before = inputs.unflatten(0, (count, -1)).roll(1, 1).flatten(0, 1)
    return ((seen - inputs) / (before - inputs)).flatten(1)


@pytest.mark.parametrize("count", [1, 3])
def test_the_pictures_come_first_and_unchanged_and_views_of_each_follow(count):
    inputs = pictures()
    before = inputs.clone()
    every = with_views(inputs, count, seed=3)
    assert every.shape == (20 * (1 + count), 3, 8, 10)
    assert torch.equal(every[:20], before) and torch.equal(inputs, before)
    assert len({part.numpy().tobytes() for part in every}) == len(every)


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not():
    torch.manual_seed(1)
    one = with_views(pictures(), 2, seed=3)
    torch.manual_seed(2)  # whatever else was drawn
    assert torch.equal(one, with_views(pictures(), 2, seed=3))
    assert not torch.equal(one, with_views(pictures(), 2, seed=4))


@pytest.mark.parametrize("shape", [(7, 9), (3, 4), (1, 1)])
def test_values_lie_between_those_of_the_pictures(shape):
    inputs = pictures(12, 3, *shape)
    seen = with_views(inputs, 1, seed=0)
    assert seen.min() >= inputs.min() and seen.max() <= inputs.max()
    # A channel is made from the same channel.
    inputs[:, 1] += 10
    assert bool((with_views(inputs, 1, seed=0)[:, 1] > 5).all())


def test_a_view_holds_more_of_its_own_picture_than_of_another():
    # The pictures are of one value each, so only mixing changes them.
    share = shares(torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 2, 8, 8), count=3)
    assert share.min() >= 0 and share.max() <= 0.5
    assert len({round(float(value), 4) for value in share[:, 0]}) == 18


def test_about_half_of_the_pictures_are_mirrored_and_none_upside_down():
    ramp = torch.linspace(0, 1, 16).expand(200, 1, 16, 16)
    rising = with_views(ramp, 1, seed=0)[200:].diff(dim=3).mean((1, 2, 3)) > 0
    assert 70 < int(rising.sum()) < 130
    assert bool((with_views(ramp.mT, 1, seed=0).diff(dim=2).mean((1, 2, 3)) > 0).all())


@pytest.mark.parametrize("shape", [(6,), (5, 4), (3, 4, 6, 6)])
def test_inputs_that_are_no_pictures_are_mixed_and_nothing_else(shape):
    share = shares(torch.arange(8.0).reshape(8, *[1] * len(shape)) * (0.1 + pictures(1, *shape)))
    torch.testing.assert_close(share, share[:, :1].expand_as(share), rtol=1e-3, atol=1e-4)


def test_integers_have_no_views():
    tokens = torch.arange(12).reshape(4, 3)
    assert torch.equal(with_views(tokens, 2, seed=0), tokens)
    assert torch.equal(with_views(pictures(), 0, seed=0), pictures())


def test_views_are_given_where_passes_are_cheap():
    # Multiply-adds of MobileNetV2, ResNet-18 and ResNet-50 at 224 pixels.
    assert [affordable_views(macs, 256) for macs in (0.30e9, 1.81e9, 4.09e9)] == [5, 3, 1]
    assert affordable_views(0.0, 16) == 5
