"""`--sparsity keep` records the pattern that all zeros follow, and says where a part of the layers has one."""

import pytest
import torch
from torch import nn

from converters.conversion import convert
from converters.kept_patterns import kept_pattern
from converters.kept_zeros import keep
from converters.loading import load
from dsr_tool.errors import UsageError
from dsr_tool.formats.archive import open_archive
from dsr_tool.methods import attach
from dsr_tool.sparse.discover import Rules
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.granularity import Granularity
from exporters.export import export

SHAPE = (8, 6, 6)
NAMES = ["0.weight", "2.weight", "5.weight"]


def network():
    torch.manual_seed(0)
    convs = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3)
    return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.Flatten(), nn.Linear(256, 32))


@torch.no_grad()
def pruned(pattern, only=NAMES):
    """Returns a network with zeros in a pattern, as a tool of somebody else leaves it."""
    module = network()
    model = convert(network(), sparsity=None if ":" in pattern else 0.5, granularity=pattern)
    for name, mask in model.masks.items():
        if name in only:
            module.get_parameter(name).mul_(mask)
    return module


def kept(module, **options):
    fitted = []
    model = convert(module, sparsity="keep", input_shape=SHAPE, on_fitted=fitted.append, **options)
    return model, fitted[0].notes


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8", "1:2", "kernel", "fan-in"])
def test_a_pattern_of_all_layers_is_recorded_and_said(pattern):
    model, notes = kept(pruned(pattern))
    assert model.config.conversion["granularity"] == pattern == str(model.granularity)
    assert f"the zeros of all 3 sparse layers follow the pattern {pattern}" in notes[-1]


def test_single_weights_have_none():
    model, notes = kept(pruned("weight"))
    assert model.config.conversion["granularity"] == "weight" and notes == ()


def test_exports_and_trainings_keep_it(tmp_path):
    model, _ = kept(pruned("2:4"))
    assert export(model, tmp_path / "m.dsr").passed
    assert {open_archive(tmp_path / "m.dsr").entries[name].codec for name in NAMES} == {"nm"}
    model.save(tmp_path / "folder")
    loaded = load(tmp_path / "folder", network())
    optimizer = torch.optim.SGD(loaded.module.parameters(), lr=0.1)
    attached = attach(loaded, optimizer, "set", total_steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        loaded.module(torch.randn(4, *SHAPE)).sum().backward()
        optimizer.step()
    attached.remove()
    loaded.check()
    with pytest.raises(UsageError, match="does not keep the pattern of --granularity 2:4"):
        attach(loaded, optimizer, "dsr", total_steps=4)


def test_a_pattern_of_a_part_is_named_and_not_recorded():
    model, notes = kept(pruned("2:4", only=NAMES[:2]))  # the third has no zeros, so it is dense
    assert str(model.granularity) == "2:4" and "all 2 sparse layers" in notes[-1]
    module = pruned("2:4", only=NAMES[:2])
    with torch.no_grad():
        module[5].weight.masked_fill_(torch.rand(32, 256) < 0.5, 0)
    model, notes = kept(module)
    assert str(model.granularity) == "weight"
    assert notes[-1] == (
        "of 3 sparse layers, the zeros follow a pattern in a part: 2:4 in 2 (0.weight, 2.weight); none is recorded for "
        "the model"
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_weight_against_it_is_enough(value):
    module = pruned("2:4")
    with torch.no_grad():
        flat = module[2].weight.view(-1)
        flat[int((flat != 0 if value == 0 else flat == 0).nonzero()[7])] = value
    model, notes = kept(module)
    assert str(model.granularity) == "weight" and "2:4 in 2 (0.weight, 5.weight)" in notes[-1]


def test_layers_of_two_densities_have_no_pattern_in_common():
    module = pruned("2:4")
    with torch.no_grad():
        module[5].weight.copy_(pruned("1:4")[5].weight)
    model, notes = kept(module)
    # Every output of each layer has as many active weights, though.
    assert str(model.granularity) == "fan-in" and "all 3 sparse layers" in notes[-1]


def test_a_layer_without_input_channels_in_its_second_dimension_has_none():
    module = nn.Sequential(nn.ConvTranspose2d(8, 8, 3), nn.Flatten(), nn.Linear(512, 8))
    with torch.no_grad():
        for layer in (module[0], module[2]):
            layer.weight.view(8, -1, 4 if layer is module[2] else 1)[:, ::2] = 0
    model = keep(module, ModelConfig("module", "Sequential", 8, SHAPE)).model
    assert ":" not in str(model.granularity) and str(model.granularity) != "fan-in"


def test_the_user_may_say_what_is_recorded():
    model, notes = kept(pruned("2:4"), granularity="weight")
    assert str(model.granularity) == "weight" and notes == ()
    assert str(kept(pruned("2:4"), granularity="fan-in")[0].granularity) == "fan-in"
    module = pruned("2:4", only=NAMES[:2])
    with torch.no_grad():
        module[5].weight[0, 0] = 0
    before = (module[5].weight == 0).sum()
    with pytest.raises(UsageError, match=r"--granularity 2:4 is not what the zeros of '5.weight' follow"):
        kept(module, granularity="2:4")
    assert (module[5].weight == 0).sum() == before


def test_masks_that_hold_zeros_decide_and_not_the_values():
    module = pruned("2:4")
    masks = {name: module.get_parameter(name) != 0 for name in NAMES}
    assert kept_pattern(module, Rules(), masks, None)[0] == Granularity.parse("2:4")
