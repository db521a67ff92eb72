"""A conversion from a file has one dense weight in memory at a time, and makes the same model to the last bit."""

import gc

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from converters import pretrained, sources
from converters.conversion import convert
from converters.sources import load_network
from dsr_tool.calibrate import moments
from dsr_tool.errors import CheckFailed, FormatError
from dsr_tool.sparse import in_file
from dsr_tool.sparse.compact.store import CompactStore
from dsr_tool.sparse.sparsify import Sparsifier
from dsr_tool.sparse.trace import trace

pytestmark = [
    pytest.mark.skipif(not in_file.CAN_MAP, reason="needs the system's list of mapped files"),
    pytest.mark.usefixtures("one_capture"),
]


class Net(nn.Module):
    """Convolutions with measured norms, one of them transposed and one in groups, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, 24, 3, groups=2, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        )  # fmt: skip
        self.fc = nn.Linear(24, 10)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class Standardised(nn.Module):
    """A convolution with a function of its weight that has no zeros."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x):
        weight = self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight).mean((2, 3))


@pytest.fixture(scope="module")
def graph():
    return trace(Net(), (3, 8, 8))


@pytest.fixture
def one_capture(monkeypatch, graph):
    """Captures the network once for all conversions, since that takes most of the time."""
    monkeypatch.setattr(moments, "trace", lambda *_: graph)


@pytest.fixture
def weights(tmp_path):
    """Returns the path of a file of trained weights."""
    torch.manual_seed(1)
    module = Net()
    for _ in range(3):
        module(torch.randn(8, 3, 8, 8))
    torch.save(module.state_dict(), tmp_path / "w.pth")
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w"


@pytest.fixture
def taken(monkeypatch):
    """Returns what is noted for each model that was pruned weight by weight."""
    calls, made = [], Sparsifier.to_compact

    def noted(self, total, budget):
        calls.append(total)
        return made(self, total, budget)

    monkeypatch.setattr(Sparsifier, "to_compact", noted)
    return calls


def converted(path, **options):
    return convert(f"{__name__}:Net", weights=str(path), input_shape=(3, 8, 8), sparsity=0.7, **options)


CASES = [{}, {"distribution": "erk"}, {"distribution": "magnitude"}, {"granularity": "kernel"}, {"keep_dense": ["fc"]}]


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("options", [*CASES, {"positions": "random", "seed": 3}], ids=str)
def test_the_model_is_that_of_weights_in_memory(monkeypatch, weights, taken, options, ending):
    path = weights.with_suffix(f".{ending}")
    found = [converted(path, storage=storage, **options) for storage in ("masked", "compact")]
    assert len(taken) == 2
    with monkeypatch.context() as patch:
        patch.setattr(in_file.FileMaps, "keep", lambda *_: None)
        wanted = converted(path, **options)
    assert len(taken) == 2
    for model in found:
        assert model.config == wanted.config and model.specs == wanted.specs
        assert list(model.masks) == list(wanted.masks)
        assert all(torch.equal(mask, wanted.masks[name]) for name, mask in model.masks.items())
        state, other = model.module.state_dict(), wanted.module.state_dict()
        assert list(state) == list(other)
        assert all(torch.equal(value, other[name]) for name, value in state.items())
        assert not any(map(in_file.is_in_file, model.module.parameters()))


def test_no_weight_stays_in_a_map(weights, taken):
    path = weights.with_suffix(".pth")
    model = converted(path, storage="auto", keep_dense=["fc"])
    assert taken and model.storage == "compact"
    maps = in_file.FileMaps()
    assert all(maps.keep(parameter.detach()) is None for parameter in model.module.parameters())


def test_a_network_that_is_only_built_has_its_weights_in_memory(weights):
    for inside in (False, True):
        module, _ = load_network(
            f"{__name__}:Net", str(weights.with_suffix(".pth")), input_shape=(3, 8, 8), in_file=inside
        )
        assert in_file.is_in_file(module.fc.weight) is inside and not in_file.is_in_file(module.fc.bias)
        assert module.fc.weight.requires_grad


@pytest.mark.slow
def test_budgets_that_need_the_whole_network_bring_it_in(weights, taken):
    model = convert(f"{__name__}:Net", weights=str(weights.with_suffix(".pth")), input_shape=(3, 8, 8), budget="20kB")
    assert not taken and not any(map(in_file.is_in_file, model.module.parameters()))


def test_a_function_of_a_weight_is_still_refused(monkeypatch, tmp_path, taken):
    monkeypatch.setattr(pretrained, "known_moments", lambda *_: "")
    torch.save(Standardised().state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckFailed, match="has fewer zeros than asked"):
        convert(
            f"{__name__}:Standardised", weights=str(tmp_path / "w.pth"), input_shape=(3, 8, 8), sparsity=0.5,
            allow_starved=True,
        )  # fmt: skip
    assert not taken


def test_a_file_that_is_cut_meanwhile_is_told(monkeypatch, weights):
    path, bring_in = weights.with_suffix(".pth"), in_file.bring_in

    def cut(module):
        path.write_bytes(path.read_bytes()[:1000])
        bring_in(module)

    monkeypatch.setattr(sources, "bring_in", cut)
    with pytest.raises(FormatError, match="was cut while it was read"):
        load_network(f"{__name__}:Net", str(path), input_shape=(3, 8, 8))


def test_one_dense_weight_is_alive_at_a_time(monkeypatch, weights):
    largest, alive = 16 * 32 * 9, []
    module, _ = load_network(f"{__name__}:Net", str(weights.with_suffix(".pth")), input_shape=(3, 8, 8), in_file=True)
    made = CompactStore.__init__

    def noted(self, entries):
        gc.collect()
        alive.extend(each for each in gc.get_objects() if type(each) is torch.Tensor and each.numel() >= largest // 2)
        made(self, entries)

    monkeypatch.setattr(CompactStore, "__init__", noted)
    before = {id(each) for each in gc.get_objects() if type(each) is torch.Tensor}
    converted(weights.with_suffix(".pth"), storage="compact")
    assert module is not None
    assert not [tuple(each.shape) for each in alive if id(each) not in before and each.is_floating_point()]
