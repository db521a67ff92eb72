import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.errors import UsageError
from dsr_tool.train import TrainSettings
from dsr_tool.train.optimizers import lr_factor, make_optimizer


def test_defaults_are_allowed():
    TrainSettings().check()


def test_all_errors_are_reported_at_once():
    wrong = TrainSettings(
        epochs=0, batch_size=1, lr=-1.0, optimizer="sdg", schedule="cosin", workers=-2, options={"target": 0}
    )
    with pytest.raises(UsageError) as caught:
        wrong.check()
    message = str(caught.value)
    for part in ("--epochs 0", "--batch-size 1", "--lr -1.0", "did you mean sgd", "did you mean cosine"):
        assert part in message
    assert "--workers -2" in message and "dsr --target 0" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dsrr"}, "--method 'dsrr' is unknown; did you mean dsr"),
        ({"lr": math.nan}, "--lr nan is not allowed; give a positive number"),
        ({"lr": math.inf}, "--lr inf"),
        ({"gamma": 1.5}, "factor in"),
        ({"momentum": 1.0}, "--momentum 1.0"),
        ({"optimizer": "adam", "momentum": 0.9}, "--momentum 0.9 needs --optimizer sgd or rmsprop; adam has none"),
        ({"label_smoothing": 1.0}, "--label-smoothing 1.0"),
        ({"seed": -1}, "--seed -1"),
        ({"every": 0}, "--every 0"),
        ({"stop": 1.1}, "--stop 1.1"),
        ({"options": {"tolerance": 1.0}}, "dsr --tolerance 1.0"),
        ({"options": {"threshold": 0.0}}, "dsr --threshold 0.0"),
        ({"schedule": "step", "milestones": (5.0, 3.0)}, "epochs that rise"),
        ({"schedule": "step", "milestones": (math.nan,)}, "epochs that rise"),
        ({"milestones": (5.0,)}, "needs --schedule step"),
        ({"epochs": 2, "warmup_epochs": 2.0}, "fewer than the 2 epochs"),
        ({"precision": "fp16", "device": "cpu"}, "needs a GPU"),
        ({"precision": "fp8"}, "--precision 'fp8' is unknown"),
        ({"device": "gpu"}, "--device 'gpu' is unknown"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(changes, message):
    with pytest.raises(UsageError, match=message):
        TrainSettings(**changes).check()


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="torch finds no GPU"):
        TrainSettings(device="cuda").check()
    assert TrainSettings().torch_device.type == "cpu"


def test_resolved_settings_name_what_is_used():
    resolved = TrainSettings(optimizer="adam", device="cpu").resolve("shift")
    assert (resolved.lr, resolved.momentum, resolved.augment, resolved.device) == (1e-3, None, "shift", "cpu")
    resolved.check()
    assert TrainSettings(lr=0.5, augment="none").resolve("shift").augment == "none"


@pytest.mark.parametrize(("optimizer", "usual"), [("sgd", 0.9), ("rmsprop", 0.9), ("adam", None), ("adamw", None)])
def test_only_optimizers_with_a_momentum_have_a_default(optimizer, usual):
    settings, module = TrainSettings(optimizer=optimizer, device="cpu"), torch.nn.Linear(2, 2)
    settings.check()
    assert settings.resolve("none").momentum == usual
    assert make_optimizer(module, settings).defaults.get("momentum") == usual
    without = TrainSettings(optimizer=optimizer, momentum=0.0, device="cpu")
    without.check()
    assert make_optimizer(module, without).defaults.get("momentum", 0.0) == 0.0


@given(epochs=st.integers(2, 20), steps=st.integers(1, 30), warmup=st.sampled_from([0.0, 0.5, 1.0]))
def test_cosine_rises_to_its_peak_and_falls_to_zero(epochs, steps, warmup):
    factor = lr_factor(TrainSettings(epochs=epochs, warmup_epochs=warmup), steps)
    rates = [factor(step) for step in range(epochs * steps + 1)]
    top = rates.index(max(rates))
    assert max(rates) == 1.0 and rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_step_lowers_the_rate_at_milestones():
    settings = TrainSettings(epochs=10, schedule="step", milestones=(4, 8), gamma=0.1)
    factor = lr_factor(settings, 5)
    assert [factor(step) for step in (0, 19, 20, 39, 40, 49)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    usual = lr_factor(TrainSettings(epochs=200, schedule="step"), 1)
    assert [usual(step) for step in (59, 60, 120, 160)] == pytest.approx([1, 0.2, 0.04, 0.008])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_steps_are_fused_where_that_is_safe(optimizer):
    module = torch.nn.Conv2d(2, 3, 3)
    settings = TrainSettings(optimizer=optimizer, device="cpu")
    assert make_optimizer(module, settings).param_groups[0]["fused"] is True
    module.to(memory_format=torch.channels_last)
    assert make_optimizer(module, settings).param_groups[0]["fused"] is None
    # Scaled gradients must pass by the hooks, and overflowing steps must not be taken.
    half = TrainSettings(optimizer=optimizer, device="cpu", precision="fp16")
    assert make_optimizer(torch.nn.Linear(2, 2), half).param_groups[0]["fused"] is None


@pytest.mark.parametrize(("precision", "layout"), [("fp32", torch.preserve_format), ("bf16", torch.channels_last)])
def test_weights_are_channels_last_in_bf16_only(precision, layout):
    assert TrainSettings(device="cpu", precision=precision).memory_format is layout


@pytest.mark.parametrize(
    ("changes", "layout", "recorded"),
    [
        ({}, torch.channels_last, True),
        ({"channels_last": False}, torch.preserve_format, False),
        ({"channels_last": False, "precision": "bf16"}, torch.channels_last, True),
    ],
    ids=str,
)
def test_images_are_channels_last_unless_asked_otherwise(changes, layout, recorded):
    settings = TrainSettings(device="cpu", **changes)
    assert settings.input_format is layout
    resolved = settings.resolve("none")
    assert (resolved.channels_last, resolved.input_format) == (recorded, layout)
