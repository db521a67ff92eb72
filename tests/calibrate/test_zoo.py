"""Reconstruction of any network: classifiers, segmentation, video, detection, and networks of one's own."""

import pytest
import torch
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from converters.torchvision_builders import architectures, build, task_of
from dsr_tool.calibrate.reconstruct import reconstruct
from dsr_tool.sparse.feeding import float_tensors, tensor_form
from dsr_tool.sparse.sparsify import Sparsifier
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig

OF_ONE_SIZE = ("maxvit_t", "vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14", "mvit_v1_b", "mvit_v2_s")
SIDES = {"inception_v3": 96, "ssd300_vgg16": 300}
NAMES = sorted({*architectures()})


class Branching(nn.Module):
    """Control flow that depends on values, a layer that is used twice, one that is never used, and a bare weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.unused, self.head = nn.Linear(16, 16), nn.Linear(16, 10)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))

    def forward(self, x):
        x = self.stem(x).relu()
        if x.mean() > -1:
            x = x + self.twice(x) * self.scale
        return {"scores": self.head(self.twice(x).mean((2, 3))), "kind": "scores"}


class Recurrent(nn.Module):
    """Sequences: rows of pixels through a packed projection, and a loop in Python."""

    def __init__(self):
        super().__init__()
        self.read, self.attention = nn.Linear(48, 32), nn.MultiheadAttention(32, 4, batch_first=True)
        self.step, self.head = nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x):
        rows = self.read(x.flatten(1, 1).transpose(1, 2).flatten(2))
        rows = rows + self.attention(rows, rows, rows, need_weights=False)[0]
        state = torch.zeros_like(rows[:, 0])
        for i in range(rows.shape[1]):
            state = self.step(torch.cat([state, rows[:, i]], 1)).tanh()
        return self.head(state), state


class Segmenting(nn.Module):
    """A score for every pixel, and an auxiliary one, as segmentation networks of torchvision return them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.up, self.aux = nn.ConvTranspose2d(16, 8, 4, 2, 1, groups=2), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        features = self.body(x)
        return {"out": self.up(features), "aux": self.aux(features)}


class Pyramid(nn.Module):
    """Feature maps at strides 8 and 16."""

    out_channels = 8

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 2, 2)

    def forward(self, x):
        fine = self.first(x).relu()
        return {"0": fine, "1": self.second(fine).relu()}


def detector():
    anchors = AnchorGenerator(((32,),) * 2, ((1.0,),) * 2)
    head = TwoMLPHead(8 * 7 * 7, 32)
    return FasterRCNN(
        Pyramid(),
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 7, 2),
        box_head=head,
        box_predictor=FastRCNNPredictor(32, 4),
    )


def clip():
    return nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def vit():
    return VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)


def swin():
    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10)


SMALL = {
    "branching": (Branching, (3, 16, 16)),
    "recurrent": (Recurrent, (3, 16, 16)),
    "vit": (vit, (3, 32, 32)),
    "swin": (swin, (3, 64, 64)),
    "segmenting": (Segmenting, (3, 24, 24)),
    "detector": (detector, (3, 128, 128)),
    "clip": (clip, (3, 4, 12, 12)),
}


def noisy(module, seed=0):
    """Parameters and statistics as after a training: no head of zeros, no norm that does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            if tensor.ndim < 2 or not tensor.any():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in module.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


def check(module, shape, pictures=16):
    """Reconstructs at sparsity 0.7, and checks everything that must hold for any network."""
    inputs = torch.rand((pictures, *shape), generator=torch.Generator().manual_seed(1))
    network = tensor_form(noisy(module.train()))
    sparsifier = Sparsifier(module, ModelConfig("module", "net", 0, shape), positions="magnitude")
    budget = Budget.of_sparsity("0.7")
    total = sparsifier.active_weights(budget)
    counts = sparsifier.counts(total)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    random = torch.get_rng_state()

    result = reconstruct(network, counts, inputs)

    assert torch.equal(torch.get_rng_state(), random)
    assert {name: int(mask.sum()) for name, mask in result.masks.items()} == counts
    after = module.state_dict()
    for name, mask in result.masks.items():
        assert mask.shape == after[name].shape
        assert not after[name][~mask].any(), name
    changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    allowed = {
        key
        for key in after
        if key.endswith(("bias", "running_mean")) or (key in sparsifier.specs and sparsifier.specs[key].weight)
    }
    assert changed <= allowed
    assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
    assert all(child.training for child in module.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
    with torch.no_grad():
        outputs = float_tensors(network.eval()(inputs[:2]))
    assert outputs
    assert all(output.isfinite().all() for output in outputs)
    return result


def shape_of(name):
    if task_of(name) == "video":
        return (3, 16, 224, 224) if name in OF_ONE_SIZE else (3, 8, 64, 64)
    side = 224 if name in OF_ONE_SIZE else SIDES.get(name, 128 if task_of(name) == "detection" else 64)
    return (3, side, side)


@pytest.mark.parametrize("name", SMALL)
def test_networks_of_ones_own(name):
    maker, shape = SMALL[name]
    torch.manual_seed(0)
    result = check(maker(), shape)
    assert set(result.unfitted) == ({"unused.weight"} if name == "branching" else set())


def test_a_network_of_torchvision():
    torch.manual_seed(0)
    assert not check(build("shufflenet_v2_x0_5", 5), (3, 64, 64), pictures=6).unfitted


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_network_of_torchvision(name):
    torch.manual_seed(0)
    result = check(build(name), shape_of(name))
    # Auxiliary heads take no part in evaluation.
    assert all(part.startswith("aux") or "AuxLogits" in part for part in result.unfitted)
