"""Conversion of trained networks: what is kept, what is said, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from converters.conversion import convert
from dsr_tool.errors import CheckFailed, UsageError

SHAPE = (3, 12, 12)
CALLABLE = """
import torch
from torch import nn

def net():
    def block(inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(
        *block(3, 16), *block(16, 32), *block(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )
"""


def pictures(count=48, seed=0):
    # Smooth pictures: neighbours that agree, so that inputs of layers are correlated as those of photographs are.
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(noise, SHAPE[1:], mode="bilinear")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The name of a callable, and a file of weights with norms that were measured."""
    (tmp_path / "somenets.py").write_text(CALLABLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "somenets", raising=False)
    torch.manual_seed(0)
    namespace: dict = {}
    exec(CALLABLE, namespace)  # noqa: S102 - the text above
    net = namespace["net"]()
    net.train()
    with torch.no_grad():
        for seed in range(30):
            net(pictures(seed=seed))
        for norm in (child for child in net.modules() if isinstance(child, nn.BatchNorm2d)):
            norm.bias.normal_(0, 0.3)
    torch.save(net.eval().state_dict(), "net.pth")
    return "somenets:net", "net.pth", net


def distance(model, net, inputs):
    with torch.no_grad():
        wanted = net(inputs)
        return float((model.module.eval()(inputs) - wanted).square().sum() / wanted.square().sum())


def convert_trained(trained, **options):
    name, weights, _ = trained
    found = []
    model = convert(name, weights=weights, input_shape=SHAPE, on_fitted=found.append, **options)
    return model, found[0]


def test_trained_weights_get_lamp_budgets_and_corrected_norms(trained):
    model, fitted = convert_trained(trained, sparsity=0.6)
    assert model.config.conversion["distribution"] == "lamp"
    assert abs(model.sparsity - 0.6) < 1 / model.prunable_weights
    assert any("corrected" in note for note in fitted.notes)
    by_value, _ = convert_trained(trained, sparsity=0.6, distribution="magnitude", allow_starved=True)
    inputs = pictures(seed=99)
    assert distance(model, trained[2], inputs) < distance(by_value, trained[2], inputs)


def test_pictures_keep_more_than_weights_alone(trained):
    inputs = pictures(64, seed=7)
    without, _ = convert_trained(trained, sparsity=0.7)
    model, fitted = convert_trained(trained, sparsity=0.7, calibrate=inputs)
    assert model.active_weights == without.active_weights
    model.check()
    assert model.config.conversion["distribution"] == "output"
    assert model.config.conversion["calibration"]["pictures"] == 64
    held = pictures(seed=99)
    assert distance(model, trained[2], held) < 0.7 * distance(without, trained[2], held)
    assert any("64 pictures" in note for note in fitted.notes)


def test_a_calibration_is_the_same_for_the_same_seed(trained):
    first, _ = convert_trained(trained, sparsity=0.7, calibrate=pictures(20), seed=3)
    again, _ = convert_trained(trained, sparsity=0.7, calibrate=pictures(20), seed=3)
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name]), name


def test_progress_rises_to_the_end(trained):
    seen = []
    convert_trained(
        trained, sparsity=0.5, calibrate=pictures(16), on_progress=lambda done, total: seen.append(done / total)
    )
    assert seen == sorted(seen)
    assert seen[-1] == 1


@pytest.mark.parametrize("distribution", ["lamp", "erk", "output", None])
def test_calibration_goes_with_every_distribution(trained, distribution):
    model, _ = convert_trained(trained, sparsity=0.7, calibrate=pictures(16), distribution=distribution)
    assert abs(model.sparsity - 0.7) < 1 / model.prunable_weights
    model.check()


def test_a_budget_in_multiply_adds_is_spent_where_it_hurts_least(trained):
    inputs = pictures(48)
    model, fitted = convert_trained(trained, budget="0.4MMACs", calibrate=inputs)
    active = {name: int(mask.sum()) for name, mask in model.masks.items()}
    macs = sum(active.get(spec.name, spec.size) * spec.macs_per_weight for spec in model.specs.values())
    assert 0.99 * 400_000 <= macs <= 400_000
    assert fitted.archive_bytes is None


def test_a_budget_in_bytes_holds_after_values_changed(trained):
    model, fitted = convert_trained(trained, budget="24kB", calibrate=pictures(16))
    assert fitted.archive_bytes is not None
    assert 0.9 * 24_000 <= fitted.archive_bytes <= 24_000
    model.check()


def test_whole_kernels_stay_whole_in_a_calibration(trained):
    model, _ = convert_trained(trained, sparsity=0.6, calibrate=pictures(16), granularity="kernel")
    for mask in model.masks.values():
        if mask.ndim == 4:
            assert torch.equal(mask.flatten(2).any(2), mask.flatten(2).all(2))


@pytest.mark.parametrize("granularity, options", [("2:4", {}), ("fan-in", {"sparsity": 0.6})])
def test_patterns_hold_in_a_calibration(trained, granularity, options):
    model, fitted = convert_trained(trained, calibrate=pictures(16), granularity=granularity, **options)
    model.check()
    assert str(model.granularity) == granularity and model.masks
    assert any(note.startswith(f"granularity {granularity}: ") for note in fitted.notes)
    assert model.config.conversion["distribution"] == ("uniform" if granularity == "2:4" else "output")


def test_a_module_is_calibrated_in_place(trained):
    net = copy.deepcopy(trained[2])
    model = convert(net, sparsity=0.7, calibrate=pictures(16))
    assert model.module is net
    assert model.config.input_shape == SHAPE
    assert abs(model.sparsity - 0.7) < 1 / model.prunable_weights


def test_a_new_head_stays_dense_and_says_so(tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "w.pth"
    source = convert("shufflenet_v2_x0_5", sparsity=0, input_size=32)
    torch.save(source.module.state_dict(), weights)
    found = []
    options = {"weights": str(weights), "num_classes": 5, "input_size": 32, "on_fitted": found.append}
    model = convert("shufflenet_v2_x0_5", sparsity=0.5, **options)
    assert "fc.weight" not in model.masks
    assert "random" in model.specs["fc.weight"].reason
    assert any("new head fc.weight stays dense" in note for note in found[0].notes)
    chosen = convert("shufflenet_v2_x0_5", sparsity=0.5, sparsify_patterns=("fc",), **options)
    # By its values, the random head would get what is left over by the others.
    assert int(chosen.masks["fc.weight"].sum()) == pytest.approx(0.5 * chosen.specs["fc.weight"].size, rel=0.01)
    assert any("random positions" in note for note in found[-1].notes)


def test_layers_without_a_signal_are_refused_unless_allowed(trained):
    # One layer has values so small that a global threshold leaves it one weight.
    _, weights, _ = trained
    state = torch.load(weights, weights_only=True)
    state["3.weight"] *= 1e-3
    torch.save(state, weights)
    with pytest.raises(CheckFailed, match=r"'3\.weight' would carry no signal.*--allow-starved"):
        convert_trained(trained, sparsity=0.5, distribution="magnitude")
    _, fitted = convert_trained(trained, sparsity=0.5, distribution="magnitude", allow_starved=True)
    assert any("3.weight" in warning for warning in fitted.warnings)
    model, _ = convert_trained(trained, sparsity=0.5)
    assert int(model.masks["3.weight"].sum()) >= 32


def test_norms_that_were_never_measured_are_left_alone_and_told(trained):
    _, weights, net = trained
    fresh = {k: torch.zeros_like(v) if "running_mean" in k else v for k, v in net.state_dict().items()}
    fresh = {k: torch.ones_like(v) if "running_var" in k else v for k, v in fresh.items()}
    torch.save(fresh, weights)
    model, fitted = convert_trained(trained, sparsity=0.5)
    assert any("mean 0 and variance 1" in note for note in fitted.notes)
    assert not model.module.state_dict()["1.running_mean"].any()


def test_a_file_of_densities_is_a_budget_of_its_own(trained, tmp_path):
    (tmp_path / "d.csv").write_text("name,density\n3.weight,0.5\n6.weight,0.25\n0.weight,1\n11.weight,1\n")
    model, _ = convert_trained(trained, distribution="file:d.csv")
    assert int(model.masks["3.weight"].sum()) == 16 * 32 * 9 // 2
    assert int(model.masks["6.weight"].sum()) == 32 * 32 * 9 // 4
    scaled, _ = convert_trained(trained, distribution="file:d.csv", sparsity=0.8)
    assert abs(scaled.sparsity - 0.8) < 1 / scaled.prunable_weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.5, "distribution": "output"}, "needs --calibrate"),
        ({"sparsity": 0.5, "calibration_images": 20}, "goes with --calibrate"),
        ({"sparsity": "keep", "distribution": "lamp"}, "--sparsity keep cannot be combined with --distribution"),
        ({"sparsity": "keep", "sparsify_patterns": ("3",)}, "cannot be combined with --sparsify"),
        ({"sparsity": 0.5, "calibrate": torch.zeros(0, *SHAPE)}, "calibrate"),
        ({"sparsity": 0.5, "calibrate": torch.full((20, *SHAPE), float("nan"))}, "NaN or inf"),
        ({"sparsity": 0.5, "calibrate": torch.zeros(20, 3, 5, 5)}, "shape"),
        ({"sparsity": 0.5, "calibrate": torch.zeros(20, *SHAPE), "positions": "random"}, "not random"),
        ({"sparsity": 0.5, "calibrate": torch.zeros(20, *SHAPE), "calibration_images": 0}, "--calibration-images 0"),
        ({"sparsity": 0.5, "calibrate": ""}, "--calibrate is empty"),
        ({"sparsity": 0.995}, "starve"),
        ({"sparsity": 0.995, "calibrate": torch.zeros(20, *SHAPE)}, "starve"),
    ],
)
def test_options_that_do_not_go_together_are_refused(trained, options, message):
    with pytest.raises(UsageError, match=message):
        convert_trained(trained, **options)


def test_random_weights_are_not_calibrated():
    with pytest.raises(UsageError, match="give --weights"):
        convert("lenet-300-100", sparsity=0.5, calibrate=torch.zeros(16, 1, 28, 28))
