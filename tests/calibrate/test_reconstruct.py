"""Reconstruction of whole networks: counts are exact, errors fall, and everything else stays as it was."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from dsr_tool.calibrate.fitting import by_magnitude
from dsr_tool.calibrate.reconstruct import reconstruct
from dsr_tool.errors import CheckFailed
from dsr_tool.sparse.discover import Rules, discover
from dsr_tool.sparse.pattern import torn_layer
from dsr_tool.sparsity.granularity import Granularity

SINGLE, KERNEL = Granularity("weight"), Granularity("kernel")


class Attention(nn.Module):
    """A small transformer with a position embedding; its keys and values may come from elsewhere."""

    def __init__(self, *, apart=False, **options):
        super().__init__()
        self.embed, self.place = nn.Linear(12, 16), nn.Parameter(torch.randn(1, 5, 16) * 0.1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **options)
        self.norm, self.mlp = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head, self.apart = nn.Linear(16, 4), apart

    def forward(self, x):
        x = self.embed(x) + self.place
        y = self.norm(x)
        x = x + self.attention(y, y * 2 if self.apart else y, y + 1 if self.apart else y, need_weights=False)[0]
        return self.head((x + self.mlp(x)).mean(1))


class Loops(nn.Module):
    """A network whose forward cannot be traced, and which uses one layer twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.first(x)
        for _ in range(2 if float(x.detach().sum()) < 1e9 else 1):
            x = x + torch.relu(self.again(x))
        return self.head(x.mean((2, 3)))


def _mixed():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, dilation=2, groups=4), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.ConvTranspose2d(16, 8, 3, stride=2, groups=2, output_padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


NETS = {
    "mixed": (_mixed, (3, 12, 12)),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 4, 2, 2)), (4, 20)),
    "three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(2, 6, 3), nn.ReLU(), nn.ConvTranspose3d(6, 4, 2)),
        (2, 5, 6, 7),
    ),
    "attention": (Attention, (5, 12)),
    "attention with separate inputs": (lambda: Attention(apart=True), (5, 12)),
    "loops": (Loops, (3, 10, 10)),
}


def _converted(net, pictures, density=0.4, granularity=SINGLE):
    """Returns dense and sparse network, counts and what was found."""
    net.eval()
    net(pictures[:2])
    dense, specs = copy.deepcopy(net), discover(net, Rules(small_layers=False))
    steps = {name: granularity.step(spec.shape) for name, spec in specs.items() if spec.role == "sparse"}
    counts = {name: max(1, int(density * specs[name].size / step)) * step for name, step in steps.items()}
    return dense, net, counts, reconstruct(net, counts, pictures, granularity=granularity)


def _distance(one, other, pictures):
    with torch.no_grad():
        return float((one.eval()(pictures) - other.eval()(pictures)).square().mean())


@pytest.mark.parametrize("name", NETS)
def test_counts_are_exact_and_the_outputs_are_nearer_than_by_magnitude(name):
    torch.manual_seed(0)
    build, shape = NETS[name]
    pictures = torch.randn(48, *shape)
    dense, net, counts, found = _converted(build(), pictures)
    parameters, plain = dict(net.named_parameters()), copy.deepcopy(dense)
    assert not found.unfitted
    assert found.masks.keys() == counts.keys()
    for weight, count in counts.items():
        assert int(found.masks[weight].sum()) == count
        assert not parameters[weight][~found.masks[weight]].any()
        mask = by_magnitude(dense, weight, count, SINGLE)
        assert int(mask.sum()) == count
        plain.get_parameter(weight).data *= mask
    assert _distance(dense, net, pictures) < 0.7 * _distance(dense, plain, pictures)


def test_a_classifier_of_torchvision():
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v2(num_classes=4, width_mult=0.25)
    _, _, counts, found = _converted(net, torch.randn(8, 3, 32, 32), 0.5)
    assert {name: int(mask.sum()) for name, mask in found.masks.items()} == counts
    assert all(0 <= error < 1 for error in found.errors.values())


def test_all_weights_give_back_the_dense_network():
    torch.manual_seed(0)
    pictures = torch.randn(64, 3, 12, 12)
    dense, net, _, found = _converted(_mixed(), pictures, density=1.0)
    assert all(mask.all() for mask in found.masks.values())
    torch.testing.assert_close(net(pictures), dense(pictures), rtol=1e-2, atol=1e-2)


def test_kernels_are_active_as_a_whole():
    torch.manual_seed(0)
    _, _, counts, found = _converted(_mixed(), torch.randn(16, 3, 12, 12), granularity=KERNEL)
    for name in ("0.weight", "3.weight", "6.weight"):
        by_kernel = found.masks[name].flatten(2)
        assert int(found.masks[name].sum()) == counts[name]
        assert torch.equal(by_kernel.any(-1), by_kernel.all(-1))


def test_the_same_seed_gives_the_same_weights_and_the_module_keeps_its_state():
    torch.manual_seed(0)
    net, pictures = _mixed(), torch.randn(20, 3, 12, 12)
    net.eval()(pictures[:2])
    net.train()
    net[1].eval()
    nets = [net, copy.deepcopy(net)]
    done = []
    for each in nets:
        counts = {"0.weight": 100, "3.weight": 100, "9.weight": 200}
        reconstruct(each, counts, pictures, seed=3, on_progress=lambda *step: done.append(step))
        assert [child.training for child in each] == [i != 1 for i in range(len(net))]
        assert all(p.requires_grad for p in each.parameters())
    first, second = (each.state_dict() for each in nets)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert done[:4] == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("pattern, density", [("2:4", 0.5), ("1:4", 0.25), ("fan-in", 0.4)])
def test_patterns_are_kept_and_the_outputs_are_nearer_than_by_magnitude(pattern, density):
    torch.manual_seed(0)
    pictures, granularity = torch.randn(48, 4, 10, 10), Granularity.parse(pattern)
    net = nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 12)
    )
    specs = discover(net, Rules(small_layers=False, granularity=granularity))
    counts = {
        name: max(1, int(density * spec.size / granularity.step(spec.shape))) * granularity.step(spec.shape)
        for name, spec in specs.items()
        if spec.role == "sparse"
    }
    dense, plain = copy.deepcopy(net), copy.deepcopy(net)
    found = reconstruct(net, counts, pictures, granularity=granularity)
    assert torn_layer(found.masks, granularity) is None and len(counts) == 3 and not found.unfitted
    for name, count in counts.items():
        mask = by_magnitude(dense, name, count, granularity)
        assert torn_layer({name: mask}, granularity) is None
        assert int(found.masks[name].sum()) == int(mask.sum()) == count
        plain.get_parameter(name).data *= mask
    assert _distance(dense, net, pictures) < 0.7 * _distance(dense, plain, pictures)


def test_a_layer_that_is_never_reached_is_chosen_by_magnitude():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.table = nn.Linear(4, 4), nn.Conv2d(2, 3, 3), nn.Embedding(5, 4)

        def forward(self, x):
            return self.used(x) + self.table(torch.zeros(len(x), dtype=torch.long))

    torch.manual_seed(0)
    net, counts = Unused(), {"used.weight": 8, "idle.weight": 18, "table.weight": 10}
    found = reconstruct(net, counts, torch.randn(20, 4), granularity=KERNEL)
    assert found.unfitted.keys() == {"idle.weight", "table.weight"}
    assert {name: int(mask.sum()) for name, mask in found.masks.items()} == counts
    assert int(found.masks["idle.weight"].flatten(2).all(-1).sum()) == 2


def test_nan_in_the_inputs_of_a_layer_is_refused_by_name():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(net[0].bias, torch.nan)
    with pytest.raises(CheckFailed, match="'1.weight' contain NaN or inf"):
        reconstruct(net, {"1.weight": 8}, torch.randn(16, 4))
