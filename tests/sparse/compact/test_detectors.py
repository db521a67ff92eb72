"""Detectors are trained in loops of one's own, in compact storage as in masked storage, by rebuilding dense weights."""

import copy

import pytest
import torch
from torch import optim

from converters.conversion import convert
from converters.torchvision_builders import architectures
from dsr_tool.methods import attach
from dsr_tool.sparse.compact.modules import runner_of

SMALL = "ssdlite320_mobilenet_v3_large"


def check_steps(name, method, count, size):
    torch.manual_seed(0)
    masked = convert(name, sparsity=0.8, num_classes=3, input_size=size)
    compact = copy.deepcopy(masked).to_storage("compact")
    pairs = [(model, optim.SGD(model.module.parameters(), lr=1e-3, momentum=0.9)) for model in (masked, compact)]
    for model, optimizer in pairs:
        attach(model, optimizer, method, total_steps=8, seed=3, every=1, stop=1.0)
        model.module.train()
    before = {key: mask.clone() for key, mask in masked.masks.items()}
    for _ in range(count):
        corners, pictures, losses = torch.rand(2, 2, 2) * size / 3, list(torch.rand(2, 3, size, size)), []
        targets = [{"boxes": torch.cat([c, c + size / 3], 1), "labels": torch.randint(1, 3, (2,))} for c in corners]
        for model, optimizer in pairs:
            torch.manual_seed(1)  # for the regions that two stages draw
            optimizer.zero_grad()
            loss = sum(model.module(pictures, copy.deepcopy(targets)).values())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]
    assert compact.counts == masked.counts
    assert all(torch.equal(mask, compact.masks[key]) for key, mask in masked.masks.items())
    assert any(not torch.equal(mask, before[key]) for key, mask in masked.masks.items())
    assert runner_of(compact.module).note
    for model in (masked, compact):
        model.module.eval()
    (one,), (other,) = masked.module(pictures[:1]), compact.module(pictures[:1])
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", ["dsr", "rigl"])
def test_a_small_detector_takes_the_same_steps(method):
    check_steps(SMALL, method, 3, 96)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in architectures("detection") if not name.startswith(("mask", "key"))])
def test_every_detector_of_boxes_takes_the_same_steps(name):
    check_steps(name, "dsr", 2, 300 if name == "ssd300_vgg16" else 96)
