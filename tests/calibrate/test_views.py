"""Views of pictures: of the same shape, made from the pictures alone, and the same ones for the same seed."""

import pytest
import torch

from dsr_tool.calibrate.views import views, with_views


def pictures(count=20, *shape):
    return torch.rand(count, *(shape or (3, 8, 10)), generator=torch.Generator().manual_seed(5))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_pictures_come_first_and_unchanged_and_a_view_of_each_follows():
    inputs = pictures()
    before = inputs.clone()
    both = with_views(inputs, seed=3)
    assert both.shape == (40, 3, 8, 10)
    assert torch.equal(both[:20], before) and torch.equal(inputs, before)
    assert not any(torch.equal(view, picture) for view, picture in zip(both[20:], before, strict=True))


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not():
    torch.manual_seed(1)
    one = with_views(pictures(), seed=3)
    torch.manual_seed(2)  # whatever else was drawn
    assert torch.equal(one, with_views(pictures(), seed=3))
    assert not torch.equal(one, with_views(pictures(), seed=4))


@pytest.mark.parametrize("shape", [(7, 9), (3, 4), (1, 1)])
def test_values_lie_between_those_of_the_pictures(shape):
    inputs = pictures(12, 3, *shape)
    seen = views(inputs, seeded())
    assert seen.min() >= inputs.min() and seen.max() <= inputs.max()
    # A channel is made from the same channel.
    inputs[:, 1] += 10
    assert torch.equal(views(inputs, seeded())[:, 1] > 5, torch.ones(12, *shape, dtype=torch.bool))


def test_a_view_holds_more_of_its_own_picture_than_of_another():
    inputs = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 2, 8, 8)
    seen = views(inputs, seeded())
    before = inputs.roll(1, 0)
    share = (seen - inputs) / (before - inputs)  # the pictures are of one value each, so only mixing changes them
    assert share.min() >= 0 and share.max() <= 0.5
    assert len({round(float(value), 4) for value in share[:, 0, 0, 0]}) == 6


def test_about_half_of_the_pictures_are_mirrored():
    ramp = torch.linspace(0, 1, 16).expand(200, 1, 16, 16)
    rising = views(ramp, seeded()).diff(dim=3).mean((1, 2, 3)) > 0
    assert 70 < int(rising.sum()) < 130


def test_sequences_and_clips_are_mixed_and_nothing_else():
    for shape in [(6,), (5, 4), (3, 4, 6, 6)]:
        inputs = torch.arange(8.0).reshape(8, *[1] * len(shape)).expand(8, *shape) * (
            0.1 + torch.rand(shape, generator=seeded(1))
        )
        seen = views(inputs, seeded())
        share = ((seen - inputs) / (inputs.roll(1, 0) - inputs)).flatten(1)
        torch.testing.assert_close(share, share[:, :1].expand_as(share), rtol=1e-3, atol=1e-4)


def test_integers_are_left_as_they_are():
    tokens = torch.arange(12).reshape(4, 3)
    seen = views(tokens, seeded())
    assert torch.equal(seen, tokens) and seen.data_ptr() != tokens.data_ptr()
