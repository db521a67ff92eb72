"""A conversion from a file has one dense weight in memory at a time, and makes the same model to the last bit."""

import gc
import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from converters import pretrained, sources
from converters.conversion import convert
from converters.pickles import read_file
from converters.sources import load_network
from converters.state_dicts import load_strictly
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


CHANGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "removed": Path.unlink,
    "replaced": lambda path: torch.save({}, path.with_suffix(".new")) or path.with_suffix(".new").replace(path),
    "written again": lambda path: path.write_bytes(path.read_bytes()[::-1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_meanwhile_is_told(monkeypatch, weights, change):
    path, bring_in = weights.with_suffix(".pth"), in_file.bring_in
    os.utime(path, (0, 0))  # the clock of a file system may stand still for some milliseconds

    def changed(module):
        CHANGES[change](path)
        bring_in(module)

    monkeypatch.setattr(sources, "bring_in", changed)
    with pytest.raises(FormatError, match="was changed or removed while it was read"):
        load_network(f"{__name__}:Net", str(path), input_shape=(3, 8, 8))


def _rewrite(path, compression, order, values):
    """Writes the records of a file of torch.save again, with these values in the byte order of this name."""
    swapped = values if order == sys.byteorder else values.byteswap()
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            new = {"byteorder": order.encode(), "0": swapped.tobytes()}
            archive.writestr(name, new.get(name.rpartition("/")[2], content))


OTHER = {"little": "big", "big": "little"}[sys.byteorder]
FORMS = {
    "as saved": (lambda path, weight: torch.save({"weight": weight, "more": weight}, path), True),
    "in half": (lambda path, weight: torch.save({"weight": weight.half()}, path), False),
    "transposed": (lambda path, weight: torch.save({"weight": weight.T.contiguous().T}, path), False),
    "negated": (lambda path, weight: torch.save({"weight": torch._neg_view(-weight)}, path), False),
    "compressed": (lambda path, weight: _rewrite(path, zipfile.ZIP_DEFLATED, sys.byteorder, weight.numpy()), False),
    "in the other byte order": (lambda path, weight: _rewrite(path, zipfile.ZIP_STORED, OTHER, weight.numpy()), False),
}


@pytest.mark.parametrize("form", FORMS)
def test_values_are_as_torch_reads_them(tmp_path, form):
    path, weight, module = tmp_path / "w.pth", torch.randint(-9, 9, (64, 32)).float(), nn.Linear(32, 64, bias=False)
    torch.save({"weight": weight}, path)
    write, kept = FORMS[form]
    write(path, weight)
    load_strictly(module, "linear", {"weight": read_file(path)["weight"]}, str(path), in_file=True)
    assert in_file.is_in_file(module.weight) is kept
    assert torch.equal(in_file.read(module.weight), weight)


@pytest.mark.parametrize("name", ["\u2028.pth", os.fsdecode(b"caf\xe9.pth"), "a  b .pth", "of torch.safetensors"])
def test_names_of_files_are_of_any_kind(tmp_path, name):
    path, module = tmp_path / name, nn.Linear(32, 64, bias=False)
    torch.save(module.state_dict(), tmp_path / "w.pth")
    (tmp_path / "w.pth").rename(path)
    state = read_file(path)
    load_strictly(module, "linear", state, str(path), in_file=True)
    assert in_file.is_in_file(module.weight)
    assert torch.equal(in_file.read(module.weight), state["weight"])


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
