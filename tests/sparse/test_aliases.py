"""One submodule under several names is one layer: counted, masked, stored and trained once."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from converters.conversion import convert
from converters.loading import load
from converters.state_dicts import fitting, load_strictly
from dsr_tool.errors import CheckFailed
from dsr_tool.sparse.discover import Rules, discover
from dsr_tool.sparse.sparsify import sparsify
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from exporters.export import export, verify

SHAPE = (3, 8, 8)
X = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A backbone, its first layers as features, and again in a list."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()]
        self.backbone = nn.Sequential(*layers)
        self.features = nn.Sequential(*layers[:4])
        self.again = nn.ModuleList([self.features, layers[3]])
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


NAMES = ["backbone.0.weight", "backbone.3.weight", "head.weight"]


def converted(**options):
    return convert(Net(), sparsity=0.8, input_shape=SHAPE, **options)


def test_entries_count_once_under_their_first_names():
    specs = discover(Net())
    assert [name for name, spec in specs.items() if spec.weight] == NAMES
    assert not any(name.startswith(("features", "again")) for name in specs)
    model = converted()
    assert list(model.masks) == NAMES and model.parameters == sum(one.numel() for one in Net().parameters())
    plain = nn.Sequential(*Net().backbone, nn.Linear(128, 10))
    macs = convert(plain, sparsity=0.8, input_shape=SHAPE).specs
    found = [spec.macs_per_weight for spec in model.specs.values() if spec.weight]
    assert found == [spec.macs_per_weight for spec in macs.values() if spec.weight]


def test_a_run_for_multiply_adds_leaves_the_network_as_it_is():
    module = Net()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    convert(module, sparsity=0, input_shape=SHAPE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("pattern", ["backbone.0", "features.0.weight", "again.0.0", "features.0*", "*.0.0"])
def test_patterns_may_use_any_name(pattern):
    specs = discover(Net(), Rules(keep_dense=[pattern]))
    assert specs["backbone.0.weight"].role == "dense" and specs["head.weight"].role == "sparse"
    assert discover(Net(), Rules(keep_dense=["again.1"]))["backbone.3.weight"].role == "dense"


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("file", ["folder", "m.dsr"])
def test_folders_and_archives_come_back_bit_for_bit(storage, file, tmp_path):
    model = converted(storage=storage)
    path = tmp_path / file
    model.save(path) if file == "folder" else export(model, path)
    loaded = load(path, Net(5), storage=storage)
    assert loaded.module.features[0] is loaded.module.backbone[0]
    assert list(loaded.masks) == NAMES and loaded.counts == model.counts
    assert loaded.module.state_dict().keys() == Net().state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded.module.eval()(X), model.module.eval()(X))


@pytest.mark.parametrize("options", [{}, {"values": "fp16"}])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_plain_code_loads_exports_strictly(ending, options, tmp_path):
    from safetensors.torch import load_file

    model = converted()
    path = tmp_path / f"m.{ending}"
    assert export(model, path, **options).passed and verify(path, model).passed
    state = load_file(path) if ending == "safetensors" else torch.load(path)
    fresh = Net(5)
    fresh.load_state_dict(state, strict=True)
    for name, tensor in model.module.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], tensor, rtol=1e-3, atol=1e-6)


def test_a_file_whose_names_differ_does_not_pass(tmp_path):
    model = converted()
    export(model, tmp_path / "m.pth")
    state = torch.load(tmp_path / "m.pth")
    state["features.0.bias"] = state["features.0.bias"] + 1
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckFailed, match="'features.0.*' is of shape"):
        verify(tmp_path / "m.pth", model)


@pytest.mark.parametrize("ending", ["onnx", "npz"])
def test_other_exports_hold_each_weight_once(ending, tmp_path):
    assert export(converted(), tmp_path / f"m.{ending}").passed


@pytest.mark.parametrize("kept", ["backbone", "features"])
def test_files_that_have_each_tensor_once_are_read(kept, tmp_path):
    other = Net(1).state_dict()
    once = {name: tensor.clone() for name, tensor in other.items() if name.startswith((kept, "head"))}
    once |= {name: tensor.clone() for name, tensor in other.items() if name.startswith("backbone.3")}
    save_file(once, tmp_path / "w.safetensors")
    module = Net()
    load_strictly(module, "Net", fitting(once, module).state, "w")
    assert all(torch.equal(tensor, other[name]) for name, tensor in module.state_dict().items())


def test_a_method_trains_such_a_network():
    from dsr_tool.methods import attach

    model = sparsify(Net(), ModelConfig("module", "Net", 10, SHAPE), Budget(sparsity=0.8))
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1, momentum=0.9)
    attached = attach(model, optimizer, "set", total_steps=8)
    for _ in range(8):
        optimizer.zero_grad()
        model.module(X).square().mean().backward()
        optimizer.step()
    attached.remove()
    model.check()
    assert model.sparsity == pytest.approx(0.8, abs=1e-3)
