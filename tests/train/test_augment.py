import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F  # noqa: N812

from dsr_tool.train.augment import AUGMENTATIONS, Moves, draw_moves


def draw(name, count, side=(32, 32), seed=0):
    return draw_moves(name, count, side, np.random.default_rng(seed))


def by_torchvision(image, moves, index):
    above, left = moves.padding
    height, width = image.shape[1:]
    padded = F.pad(image, [left, above])
    window = F.crop(padded, int(moves.down[index]), int(moves.right[index]), height, width)
    return F.horizontal_flip(window) if moves.flip is not None and moves.flip[index] else window


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    channels=st.sampled_from([1, 3]),
    kind=st.sampled_from([torch.uint8, torch.float32]),
    name=st.sampled_from(["shift", "crop-flip"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_moves_of_a_batch_equal_those_of_torchvision_per_image(height, width, channels, kind, name, seed):
    images = torch.randint(0, 256, (9, channels, height, width), generator=torch.Generator().manual_seed(seed)).to(kind)
    before = images.clone()
    moves = draw(name, 9, (height, width), seed)
    moved = moves(images)
    assert moved.dtype == kind and torch.equal(images, before)
    for index, image in enumerate(images):
        assert torch.equal(moved[index], by_torchvision(image, moves, index))


def test_offsets_are_uniform_and_half_of_the_images_are_flipped():
    moves = draw("crop-flip", 90_000)
    assert moves.padding == (4, 4)
    for offsets in (moves.down, moves.right):
        counts = offsets.bincount()
        # Nine equally likely values: each count is within five standard deviations of 10,000.
        assert len(counts) == 9 and (counts - 10_000).abs().max() < 5 * (90_000 * 8 / 81) ** 0.5
    assert abs(int(moves.flip.sum()) - 45_000) < 5 * 150
    together = torch.stack([moves.down, moves.right, moves.flip]).double()
    assert (torch.corrcoef(together) - torch.eye(3)).abs().max() < 5 / 300


def test_only_crop_flip_flips_and_the_others_move_nothing():
    assert draw("shift", 5).flip is None
    assert [name for name in AUGMENTATIONS if draw(name, 5) is None] == ["none", "imagenet"]


@pytest.mark.parametrize(("side", "padding"), [((28, 28), (3, 3)), ((32, 64), (4, 8)), ((4, 4), (1, 1))])
def test_padding_is_an_eighth_of_the_side(side, padding):
    moves = draw("shift", 1000, side)
    assert moves.padding == padding
    assert (int(moves.down.max()), int(moves.right.max())) == (2 * padding[0], 2 * padding[1])


def test_moves_of_a_slice_equal_the_slice_of_the_moves():
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    moves = draw("crop-flip", 20, (8, 8))
    parts = [moves[slice(start, start + 5)](images[start : start + 5]) for start in range(0, 20, 5)]
    assert torch.equal(torch.cat(parts), moves(images))


def test_zero_offsets_return_the_image():
    images = torch.rand(2, 3, 16, 16)
    middle = torch.full((2,), 2)
    assert torch.equal(Moves((2, 2), middle, middle, None)(images), images)
    flipped = Moves((2, 2), middle, middle, torch.tensor([True, False]))(images)
    assert torch.equal(flipped[0], images[0].flip(-1)) and torch.equal(flipped[1], images[1])
