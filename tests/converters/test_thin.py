"""Thin dense models: parameters compared with a sparse model's, and widths by brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.conversion import convert
from converters.loading import load
from converters.paper_models import build
from converters.thin import STEPS
from converters.torchvision_builders import architectures, structure
from converters.widths import WIDTHS
from dsr_tool.errors import UsageError


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def sparse_parameters(name, **options):
    """Returns the non-zero parameters of the sparse model itself."""
    model = convert(name, **options)
    return model.parameters - model.prunable_weights + model.active_weights


@pytest.mark.parametrize("name", WIDTHS)
def test_full_width_is_torchvisions_own_and_less_is_narrower(name):
    with torch.device("meta"):
        full = WIDTHS[name](1.0, 1000).state_dict()
    own = structure(name).state_dict()
    assert {key: value.shape for key, value in full.items()} == {key: value.shape for key, value in own.items()}
    counts = [parameters(structure(name, 10, width)) for width in (1 / STEPS, 0.6, 1)]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert name in architectures()


@settings(max_examples=8, deadline=None)
@given(st.floats(0.3, 0.98), st.sampled_from([{}, {"preset": "paper"}, {"keep_dense": ["fc1"]}]))
def test_the_width_is_the_largest_that_fits(sparsity, options):
    target = sparse_parameters("lenet-300-100", sparsity=sparsity, input_size=8, **options)
    thin = convert("lenet-300-100", sparsity=sparsity, input_size=8, thin=True, **options)
    assert thin.parameters <= target == thin.config.conversion["budget_parameters"]
    every = (parameters(build("lenet-300-100", 10, (1, 8, 8), step / STEPS)) for step in range(50, STEPS, 50))
    assert thin.parameters >= max((count for count in every if count <= target), default=0)


def test_wide_residual_networks_come_within_a_percent():
    thin = convert("wrn-28-2", sparsity=0.9, preset="paper", thin=True)
    target = sparse_parameters("wrn-28-2", sparsity=0.9, preset="paper")
    assert 0.99 * target <= thin.parameters <= target
    assert thin.active_weights == thin.prunable_weights
    assert thin.module.conv1.out_channels == 16


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("lenet-300-100", {"sparsity": 0.9, "input_size": 8, "num_classes": 4}, 0.9),
        ("shufflenet_v2_x0_5", {"budget": "200kparams", "num_classes": 10, "input_size": 32}, 0.95),
        ("resnet50", {"budget": "8Mparams", "num_classes": 10, "input_size": 32}, 0.99),
        ("mobilenet_v3_small", {"sparsity": 0.5}, 0.9),
    ],
)
def test_a_thin_model_is_saved_loaded_and_runs(tmp_path, name, options, least):
    model = convert(name, thin=True, **options)
    target = model.config.conversion["budget_parameters"]
    assert least * target <= model.parameters <= target
    assert 0 < model.config.width < 1
    model.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.config == model.config
    assert all(torch.equal(again.module.state_dict()[key], value) for key, value in model.module.state_dict().items())
    model.module.eval()
    assert model(torch.randn(2, *model.config.input_shape)).shape == (2, model.config.num_classes)


def test_the_target_follows_the_options_of_the_sparse_model():
    options = {"sparsity": 0.7, "preset": "paper", "granularity": "kernel", "distribution": "erk", "input_size": 8}
    target = sparse_parameters("wrn-22-2", **options)
    assert convert("wrn-22-2", thin=True, **options).config.conversion["budget_parameters"] == target


def test_at_sparsity_zero_the_thin_model_is_the_model_itself():
    model = convert("lenet-300-100", sparsity=0, thin=True)
    assert model.config.width == 1
    whole = convert("lenet-300-100", sparsity=0)
    assert all(torch.equal(model.weights[name], weight) for name, weight in whole.weights.items())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "resnet18",
            {"sparsity": 0.9},
            "that can be built narrower, which resnet18 cannot.*resnet50",
        ),
        ("resnet50", {"sparsity": 0.99}, "cannot have .* parameters: the narrowest has"),
        ("lenet-300-100", {"budget": "1MB"}, "1.000 MB does not go with --thin"),
        ("lenet-300-100", {"budget": "1Gparams"}, "cannot be met"),
        ("lenet-300-100", {"sparsity": 0.5, "weights": "w.pth"}, "--thin cannot be combined with --weights"),
        ("lenet-300-100", {}, "exactly one of"),
    ],
)
def test_architectures_and_budgets_that_do_not_fit_are_refused(name, options, words):
    with pytest.raises(UsageError, match=words):
        convert(name, thin=True, **options)
    with pytest.raises(UsageError, match="which Linear cannot"):
        convert(torch.nn.Linear(4, 4), sparsity=0.5, thin=True)


def test_command_line_prints_target_and_reached(tmp_path, run):
    arguments = ("convert", "lenet-300-100", "--sparsity", "0.9", "--thin", "-o", tmp_path / "m", "--quiet")
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "lenet-300-100, 0." in out and "params: fits" in out
    code, out, err = run("report", tmp_path / "m", "--html", tmp_path / "m.html")
    assert code == 0, err
    assert "lenet-300-100" in (tmp_path / "m.html").read_text()
