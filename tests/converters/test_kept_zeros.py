"""`--sparsity keep`: exactly the zeros, or the masks, of a pruned network, through every command afterwards."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from converters.kept_zeros import few_zeros_warning, keep, unused_zeros_warning
from converters.loading import load
from converters.paper_models import build
from converters.torch_prune import prune_module, split_masks, take_masks
from dsr_tool.errors import UsageError
from dsr_tool.sparse.discover import Rules, discover
from dsr_tool.sparsity.config import ModelConfig


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )


def config(shape=(3, 6, 6)):
    return ModelConfig("module", "Sequential", 10, shape, conversion={"weights": "w.pth"})


@torch.no_grad()
def pruned():
    """Returns a network with zeros in two weights, one of them depthwise, and a zero in a bias."""
    module = network()
    module[3].weight[2:5] = 0
    module[3].weight[7, 0, 0, 0] = -0.0
    module[5].weight.masked_fill_(torch.rand(10, 128) < 0.7, 0)
    module[5].bias[0] = 0
    return module


def test_the_masks_are_exactly_the_non_zeros_and_no_value_changes():
    module = pruned()
    before = copy.deepcopy(module.state_dict())
    fitted = keep(module, config(), seed=3)
    model = fitted.model
    model.check()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert list(model.masks) == ["3.weight", "5.weight"]
    assert all(torch.equal(mask, before[name] != 0) for name, mask in model.masks.items())
    assert not torch.signbit(module[3].weight[7, 0, 0, 0])
    zeros = sum(int((before[name] == 0).sum()) for name in model.masks)
    assert fitted.budget.sparsity == pytest.approx(zeros / (72 + 1280), abs=0) and model.sparsity == float(
        fitted.budget.sparsity
    )
    assert model.config.conversion == {
        "weights": "w.pth",
        "budget": "keep",
        "sparsity": zeros / 1352,
        "granularity": "weight",
        "seed": 3,
        "active_weights": 1352 - zeros,
    }
    assert model.specs["0.weight"].role == "dense" and "no zeros" in model.specs["0.weight"].reason
    assert model.specs["0.weight"].macs_per_weight == 36


def test_patterns_of_the_user_keep_layers_dense():
    model = keep(pruned(), config(), Rules(keep_dense=["3"])).model
    assert list(model.masks) == ["5.weight"]
    assert model.specs["3.weight"].reason == "kept dense by pattern '3'"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda module: None, "none of the prunable weights is zero.*such as --sparsity 0.5"),
        (lambda module: [module[i].weight.zero_() for i in (0, 3, 5)], "every prunable weight is zero"),
        (lambda module: module[5].weight[0, :2].copy_(torch.tensor([0.0, torch.nan])), "'5.weight' contains NaN"),
    ],
)
def test_networks_without_a_mask_to_keep_are_refused(change, words):
    module = network()
    with torch.no_grad():
        change(module)
    with pytest.raises(UsageError, match=words):
        keep(module, config())


def test_a_few_zeros_and_zeros_that_a_conversion_does_not_use_are_told():
    module = network()
    assert unused_zeros_warning(module, discover(module), 0) is None
    with torch.no_grad():
        module[5].weight[0, :3] = 0
    assert "only 0.2% of the weights are zero" in few_zeros_warning(keep(module, config()).model)
    assert few_zeros_warning(keep(pruned(), config()).model) is None
    many = pruned()
    share = float((many[5].weight == 0).float().mean())
    specs = discover(many, Rules(keep_dense=["0"]))
    assert unused_zeros_warning(many, specs, 0.0).startswith(f"{share:.1%} of the prunable weights are zero already")
    assert unused_zeros_warning(many, specs, share - 0.01) is not None
    assert unused_zeros_warning(many, specs, share + 0.01) is None


@torch.no_grad()
def with_hooks():
    """Returns a network that torch pruned in two rounds, with an active weight that is zero."""
    module = network()
    prune.l1_unstructured(module[5], "weight", 0.5)
    prune.random_unstructured(module[5], "weight", 0.5)
    prune.ln_structured(module[0], "weight", 0.25, n=1, dim=0)
    prune.l1_unstructured(module[5], "bias", 3)
    active = module[5].weight_mask.nonzero()[0]
    module[5].weight_orig[tuple(active)] = 0
    return module, tuple(active)


def test_pruning_hooks_become_masks_and_an_active_zero_stays_active():
    module, active = with_hooks()
    expected = {
        name: getattr(module[name[0] and int(name[0])], f"{name[2:]}_mask") != 0 for name in ("0.weight", "5.weight")
    }
    x = torch.randn(2, 3, 6, 6)
    output = module.eval()(x)
    order, others = list(network().state_dict()), module.state_dict()
    masks = take_masks(module)
    assert set(masks) == {"0.weight", "5.weight", "5.bias"}
    assert list(module.state_dict()) == order
    assert not any(layer._forward_pre_hooks for layer in module)
    assert torch.equal(module(x), output) and torch.equal(
        module[5].weight, others["5.weight_orig"] * others["5.weight_mask"]
    )
    model = keep(module, config(), masks=masks).model
    assert all(torch.equal(mask, expected[name]) for name, mask in model.masks.items())
    assert model.masks["5.weight"][active] and module[5].weight[active] == 0
    assert model.masks["5.weight"].sum() == 320
    model.check()
    assert take_masks(module) == {}


def test_a_state_dict_with_masks_is_split_and_given_to_a_module():
    module, active = with_hooks()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    state["5.weight_orig"][~state["5.weight_mask"].bool()] = torch.nan  # outside the mask, so it does not count
    values, masks = split_masks(state)
    fresh = network()
    fresh.load_state_dict(values)
    assert set(masks) == {"0.weight", "5.weight", "5.bias"}
    assert masks["5.weight"][active] and values["5.weight"][active] == 0
    prune_module(fresh, {**masks, "9.weight": torch.ones(2), "3.weight": torch.ones(2, 2)})
    carried = take_masks(fresh)
    assert all(torch.equal(carried[name], mask) for name, mask in masks.items())
    assert all(torch.equal(value, values[name]) for name, value in fresh.state_dict().items())
    assert split_masks({"a_orig": torch.ones(2), "b_mask": torch.ones(2)})[1] == {}


def test_masks_of_attention_are_kept_too():
    module = nn.Sequential(nn.MultiheadAttention(8, 2))
    order = list(module.state_dict())
    prune.l1_unstructured(module[0], "in_proj_weight", 0.5)
    prune.l1_unstructured(module[0].out_proj, "weight", 0.5)
    masks = take_masks(module)
    assert list(module.state_dict()) == order
    model = keep(module, config(()), masks=masks).model
    assert {name: int(mask.sum()) for name, mask in model.masks.items()} == {
        "0.in_proj_weight": 96,
        "0.out_proj.weight": 32,
    }


def test_the_commands_take_a_kept_model_with_a_layer_of_zeros(tmp_path, run):
    torch.manual_seed(1)
    module = build("lenet-300-100", 10, (1, 8, 8))
    weights = [weight for weight in module.parameters() if weight.ndim == 2]
    with torch.no_grad():
        weights[0].masked_fill_(torch.rand_like(weights[0]) < 0.8, 0)
        weights[1].zero_()
    model = keep(module, ModelConfig("paper", "lenet-300-100", 10, (1, 8, 8))).model
    assert len(model.masks) == 2
    model.save(tmp_path / "m")
    assert load(tmp_path / "m").config.conversion["budget"] == "keep"
    code, out, err = run("report", tmp_path / "m", "--json")
    assert code == 0, err
    assert json.loads(out)["budget"] is None
    code, _, err = run("export", tmp_path / "m", "-o", tmp_path / "m.dsr")
    assert code == 0, err
    data = ("--data", "fake:64", "--epochs", "1", "--batch-size", "16", "--quiet")
    for method in ("static", "dsr"):
        code, _, err = run("train", tmp_path / "m", *data, "--method", method, "-o", tmp_path / method)
        assert code == 0, err
        assert load(tmp_path / method).active_weights == model.active_weights
