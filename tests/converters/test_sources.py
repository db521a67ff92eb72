"""The table of sources: a source that is added to it converts, loads, has presets and thin models."""

import pytest
import torch
from torch import nn

from converters.base import Source
from converters.conversion import convert
from converters.loading import load
from converters.sources import SOURCES, build_structure, find_source
from dsr_tool.errors import UsageError
from dsr_tool.sparsity.config import ModelConfig


def network(width):
    hidden = max(1, round(200 * width))
    return nn.Sequential(nn.Linear(30, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def load_toy(name, weights=None, *, input_shape=(), width=1.0, seed=0, num_classes=None, input_size=None):  # noqa: ARG001
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = network(width)
    return module, ModelConfig("toy", name, 10, (30,), conversion={"weights": weights}, width=width)


def structure(config):
    with torch.device("meta"):
        return network(config.width)


def preset_dense(block):
    if isinstance(block, nn.Sequential):
        yield block[2], "classifier of a toy"


TOY = Source(
    name="toy",
    recognises=lambda name: name == "toy-net",
    load=load_toy,
    structure=structure,
    names=lambda: ["toy-net"],
    reason=lambda name: "a toy for children under three" if name == "toy-car" else None,
    widths=("toy-net",),
    preset_dense=preset_dense,
)


@pytest.fixture(name="_toy", autouse=True)
def _toy_in_the_table(monkeypatch):
    """Adds one line to the table."""
    monkeypatch.setitem(SOURCES, TOY.name, TOY)


def test_a_source_added_to_the_table_converts_and_loads(tmp_path):
    assert find_source("toy-net") is TOY and find_source("resnet18").name == "torchvision"
    model = convert("toy-net", sparsity=0.9, seed=3)
    model.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.config == model.config and again.config.source == "toy"
    assert all(torch.equal(again.module.state_dict()[key], value) for key, value in model.module.state_dict().items())
    ticket = convert("toy-net", structure=tmp_path / "m", init="original")
    assert all(torch.equal(ticket.weights[key], weight) for key, weight in model.weights.items())


def test_a_source_added_to_the_table_has_presets_and_thin_models():
    model = convert("toy-net", sparsity=0.9, preset="paper")
    assert model.specs["2.weight"].reason == "preset paper: classifier of a toy"
    thin = convert("toy-net", sparsity=0.9, thin=True)
    assert thin.config.width < 0.2
    assert thin.parameters <= model.prunable_weights


def test_names_of_an_added_source_are_suggested_and_explained():
    with pytest.raises(UsageError, match="ARCH 'toy-nett' is unknown; did you mean toy-net"):
        find_source("toy-nett")
    with pytest.raises(UsageError, match="ARCH 'toy-car' is a toy for children under three; give"):
        convert("toy-car", sparsity=0.5)
    with pytest.raises(UsageError, match="--thin needs .* toy-net"):
        convert("resnet18", sparsity=0.9, thin=True)


def test_a_network_that_no_source_can_build_is_refused():
    with pytest.raises(UsageError, match=r"cannot build architecture 'Net'; give load\(\) a module"):
        build_structure(ModelConfig("module", "Net"))
    with pytest.raises(UsageError, match="cannot build architecture 'lenet-5'"):
        build_structure(ModelConfig("paper", "lenet-5"))
    with pytest.raises(UsageError, match="--model a:b"):
        build_structure(ModelConfig("callable", "a:b"))


@pytest.mark.parametrize("name", ["resnet18", "lenet-300-100", "a.b:c"])
def test_each_name_belongs_to_one_source(name):
    assert [row.name for row in SOURCES.values() if row.recognises(name)] == [find_source(name).name]
