"""Wide layers, fitted in slices: the bound is made small, so that layers of a few columns are wide."""

import copy

import pytest
import torch
from torch import nn

from dsr_tool.calibrate import wide
from dsr_tool.calibrate.fitting import by_magnitude
from dsr_tool.calibrate.reconstruct import reconstruct
from dsr_tool.calibrate.wide import join_slices, moment_bytes, slices_of, split_slices
from dsr_tool.sparse.pattern import torn_layer
from dsr_tool.sparsity.granularity import Granularity


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(wide, "_MOST_BYTES", 4 * 16**2)
    monkeypatch.setattr(wide, "_MOST_COLUMNS", 24)


def test_only_layers_with_large_moments_are_sliced():
    # Blocks, columns and taps of ResNet-50's widest layer, VGG-16's first linear one, and segmentation's first one.
    assert [slices_of(1, 4608, 9), slices_of(1, 25088, 1), slices_of(1, 18432, 9)] == [1, 49, 32]
    assert moment_bytes(1, 4608, 9) == 4 * 4608**2
    assert moment_bytes(1, 25088, 1) == 4 * 49 * 512**2
    assert slices_of(1, 10007 * 9, 9) == 10007  # a prime number of channels


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_slices_are_channels_with_all_their_taps_and_join_again(slices):
    matrices = torch.arange(2 * 3 * 9 * 8).reshape(2, 3, 72)
    split = split_slices(matrices, slices, 9)
    assert split.shape == (2 * slices, 3, 72 // slices)
    assert torch.equal(join_slices(split, slices, 9), matrices)
    channels = (split[0, 0] % 8).unique()  # columns are ordered by tap, then by channel
    assert channels.tolist() == list(range(8 // slices))


class Apart(nn.Module):
    """Attention whose packed projection is read in three parts, with inputs of their own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(48, 2, batch_first=True)

    def forward(self, x):
        tokens = x.mT
        return self.attention(tokens, tokens * 2, tokens + 1, need_weights=False)[0].mT


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 6)), (48,)),
    "without bias": (lambda: nn.Sequential(nn.Linear(48, 6, bias=False)), (48,)),
    "norm": (
        lambda: nn.Sequential(nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 1)),
        (8, 8, 8),
    ),
    "groups": (lambda: nn.Sequential(nn.Conv2d(16, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 3, groups=2)), (16, 6, 6)),
    "parts": (Apart, (48, 3)),
}


def correlated(shape, count=200):
    """Inputs whose channels are mixtures of a few."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(shape[0] // 4, shape[0], generator=generator)
    few = torch.randn(count, *shape[1:], shape[0] // 4, generator=generator)
    noise = 0.3 * torch.randn(count, *shape[1:], shape[0], generator=generator)
    return (few @ mixed + noise).movedim(-1, 1) + 1


def distance(one, other, inputs):
    with torch.no_grad():
        return float((one(inputs) - other(inputs)).square().mean())


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", NETS)
def test_a_wide_layer_has_its_count_and_far_less_error_than_by_magnitude(name):
    torch.manual_seed(0)
    build, shape = NETS[name]
    dense, inputs = build().eval(), correlated(shape)
    net, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    weights = {key: value for key, value in dense.named_parameters() if value.dim() > 1}
    counts = {key: int(0.4 * value.numel()) for key, value in weights.items()}
    found = reconstruct(net, counts, inputs)
    assert found.sliced[next(iter(counts))] > 1 and not found.unfitted
    for key, count in counts.items():
        assert int(found.masks[key].sum()) == count
        assert not net.get_parameter(key)[~found.masks[key]].any()
        plain.get_parameter(key).data *= by_magnitude(dense, key, count, Granularity("weight"))
    error = distance(dense, net, inputs)
    assert error < 0.75 * distance(dense, plain, inputs)
    if name != "without bias":  # means are given back
        with torch.no_grad():
            means = [each(inputs).movedim(1, -1).flatten(0, -2).mean(0) for each in (net, dense)]
            torch.testing.assert_close(*means, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("narrow")
def test_whole_kernels_stay_together():
    torch.manual_seed(0)
    net = nn.Conv2d(8, 6, 3)
    found = reconstruct(net, {"weight": 9 * 20}, correlated((8, 6, 6)), granularity=Granularity("kernel"))
    assert found.sliced == {"weight": 4}
    kernels = found.masks["weight"].flatten(2)
    assert int(kernels.sum()) == 180 and torch.equal(kernels.any(-1), kernels.all(-1))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("pattern, count", [("3:8", 9 * 18), ("fan-in", 9 * 12)])
def test_patterns_hold_across_slices(pattern, count):
    torch.manual_seed(0)
    net, granularity = nn.Conv2d(8, 6, 3), Granularity.parse(pattern)
    dense, plain = copy.deepcopy(net), copy.deepcopy(net)
    inputs = correlated((8, 6, 6), 64)
    found = reconstruct(net, {"weight": count}, inputs, granularity=granularity)
    assert found.sliced == {"weight": 4} and int(found.masks["weight"].sum()) == count
    assert torn_layer(found.masks, granularity) is None
    plain.weight.data *= by_magnitude(dense, "weight", count, granularity)
    assert distance(dense, net, inputs) < 0.8 * distance(dense, plain, inputs)


@pytest.mark.usefixtures("narrow")
def test_a_slice_repairs_its_share_of_what_was_lost_before_the_layer():
    """The layer stays dense, and what it reads is half of what it was."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 5))
    nn.init.eye_(net[0].weight)
    inputs = correlated((48,), 800)
    dense, plain = copy.deepcopy(net), copy.deepcopy(net)
    found = reconstruct(net, {"0.weight": 24}, inputs)
    plain[0].load_state_dict(net[0].state_dict())
    assert found.sliced == {"0.weight": 2, "1.weight": 2}
    assert distance(dense, net, inputs) < 0.8 * distance(dense, plain, inputs)


@pytest.mark.usefixtures("narrow")
def test_all_weights_give_back_the_dense_layer():
    torch.manual_seed(0)
    net = nn.Linear(48, 5)
    dense, inputs = copy.deepcopy(net), correlated((48,))
    assert reconstruct(net, {"weight": 240}, inputs).masks["weight"].all()
    torch.testing.assert_close(net(inputs), dense(inputs), rtol=1e-3, atol=1e-3)
