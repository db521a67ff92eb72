"""Other views of a few pictures: cropped, mirrored and mixed ones, for which the dense network is asked again."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

__all__ = ["affordable_views", "with_views"]

_SMALLEST_CROP = 0.6
"""Smallest area of a crop, as a share of the picture's."""

_LARGEST_SHARE = 0.5
"""Largest share of a second picture that is mixed into one (mixup: Zhang et al., ICLR 2018)."""

_MOST_VIEWS, _MACS = 5, 2.2e12
"""Most views of each picture, and the multiply-adds of one pass over all pictures and views: with 256 pictures,
MobileNetV2 has five views, ResNet-18 three, and ResNet-50 one. MobileNetV2 at .7 had a KL to the dense outputs of .96
on 197 other pictures with three views, and of .88 with five, for half as much time again. A classifier with 2,048
inputs is fitted to as many vectors as there are pictures and views, so that ResNet-50 needs some too."""


def affordable_views(macs: float, pictures: int) -> int:
    """Returns the number of views of each picture that a calibration can afford.

    Args:
        macs: multiply-adds of the network for one picture.
        pictures: number of pictures.
    """
    return max(0, min(_MOST_VIEWS, int(_MACS / max(macs * pictures, 1.0)) - 1))


def with_views(pictures: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Returns pictures, and after them views of each, shape ((1 + count) * pictures, *input_shape).

    A reconstruction sees few pictures, so it fits what they have in common by chance: a classifier with 1,280 columns
    is fitted to 256 vectors. Nothing is labelled, so any view is right as long as both networks see the same one (Beyer
    et al., CVPR 2022). Inputs that are no pictures are mixed only, and integers are returned as they are.

    Args:
        pictures: inputs, shape (pictures, *input_shape).
        count: number of views of each.
        seed: seed of the views.
    """
    if not pictures.is_floating_point() or not count:
        return pictures
    generator = torch.Generator().manual_seed(seed)
    result = pictures.new_empty((1 + count) * len(pictures), *pictures.shape[1:])
    result[: len(pictures)] = pictures
    for i in range(1, 1 + count):
        part = result[i * len(pictures) : (i + 1) * len(pictures)]
        for j, picture in enumerate(pictures):
            part[j] = _cropped(picture, generator) if picture.dim() == 3 else picture
        share = _LARGEST_SHARE * torch.rand(len(part), generator=generator)
        # The others as they are, not mixed themselves.
        part.copy_(torch.lerp(part, part.roll(1, 0), share.view(-1, *[1] * (part.dim() - 1))))
    return result


def _cropped(picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns a crop of a picture (channels, height, width), scaled to its size, and mirrored half of the time."""
    share = _SMALLEST_CROP + (1 - _SMALLEST_CROP) * float(torch.rand((), generator=generator))
    sides = [max(1, round(share**0.5 * length)) for length in picture.shape[1:]]
    top, left = (
        int(torch.randint(length - side + 1, (), generator=generator))
        for length, side in zip(picture.shape[1:], sides, strict=True)
    )
    crop = picture[None, :, top : top + sides[0], left : left + sides[1]]
    scaled = F.interpolate(crop, size=picture.shape[1:], mode="bilinear", align_corners=False)[0]
    return scaled.flip(2) if float(torch.rand((), generator=generator)) < 0.5 else scaled
