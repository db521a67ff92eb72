"""Errors of a training that diverges name the step, the layer and the epoch that is kept."""

import pytest
import torch
from torch import nn

from dsr_tool.errors import CheckFailed, DsrError
from dsr_tool.train import Observer, train
from dsr_tool.train.failures import diverged, first_bad, first_bad_step


def network():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), inner, nn.Flatten(), nn.Linear(64, 5))


PICTURES = torch.ones(2, 3, 8, 8)


def test_first_bad_is_empty_for_a_finite_network():
    assert first_bad(network(), PICTURES) == ""


@pytest.mark.parametrize(
    ("spoil", "blame"),
    [
        (lambda net: net[2][1].weight.data.fill_(torch.nan), "weight of Conv2d '2.1' is NaN or inf"),
        (lambda net: net[4].bias.data.fill_(torch.inf), "bias of Linear '4' is NaN or inf"),
        (lambda net: net[4].weight.data.fill_(3e38), "Linear '4' is the first layer with an output that is NaN or inf"),
        (lambda net: net.eval()[1].running_var.fill_(torch.inf), "running_var of BatchNorm2d '1' is NaN or inf"),
        (lambda net: net[0].weight.data.fill_(torch.nan), "weight of Conv2d '0' is NaN or inf"),
    ],
)
def test_first_bad_names_the_first_layer_in_forward_order(spoil, blame):
    net = network()
    spoil(net)
    assert first_bad(net, PICTURES) == blame
    assert not any(layer._forward_hooks for layer in net.modules())


def test_first_bad_tells_bad_inputs_of_a_layer_from_bad_outputs():
    class Divides(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.two(self.one(x) / 0)

    assert first_bad(Divides(), torch.ones(1, 4)) == "an input of Linear 'two' is NaN or inf"
    assert first_bad(network(), PICTURES * torch.nan) == "an input of Conv2d '0' is NaN or inf"


def test_first_bad_step_is_the_first_loss_that_is_nan_or_inf():
    assert first_bad_step(torch.tensor([1.0, 2.0]), 11) is None
    assert first_bad_step(torch.tensor([1.0, torch.nan, torch.inf]), 11) == 12


def test_the_error_names_a_kept_epoch_only_if_one_was_saved():
    assert "kept" not in str(diverged("at step 3", "", 0))
    assert "at step 3 (x is NaN or inf); the state after epoch 7 is kept; lower" in str(
        diverged("at step 3", "x is NaN or inf", 7)
    )


class Saver(Observer):
    def on_state(self, model, state):
        pass


class Spoiler(Observer):
    """Sets a weight to NaN after a number of steps."""

    def __init__(self, at):
        self.at = at

    def on_start(self, model, _):
        self.model = model

    def on_step(self, step):
        if step == self.at:
            weight, store = "second.weight", self.model.store
            values = store.values_of(weight) if store else self.model.module.second.weight.view(-1)
            values.detach()[0] = torch.nan


@pytest.mark.parametrize(("at", "kept"), [(2, ""), (5, "; the state after epoch 1 is kept")])
def test_a_diverging_training_names_step_layer_and_saved_epoch(tiny, at, kept):
    with pytest.raises(DsrError) as caught:
        train(tiny.model(), tiny.data(), tiny.settings(epochs=3), [Saver(), Spoiler(at)])
    assert str(caught.value) == (
        f"the loss is NaN or inf at step {at + 1} (weight of Conv2d 'second' is NaN or inf){kept}; lower --lr, "
        f"or give --warmup-epochs."
    )


def test_without_a_saving_observer_no_epoch_is_called_kept(tiny):
    with pytest.raises(DsrError) as caught:
        train(tiny.model(), tiny.data(), tiny.settings(epochs=3), [Spoiler(5)])
    assert "kept" not in str(caught.value)


def test_a_test_loss_that_is_nan_stops_the_training(tiny):
    data, settings = tiny.data(), tiny.settings(epochs=2)
    with pytest.raises(DsrError, match=r"on the test images after epoch 1 \(weight of Conv2d 'second' is NaN or inf\)"):
        train(tiny.model(), data, settings, [Spoiler(data.steps(settings.batch_size))])


class Overflowing(torch.amp.GradScaler):
    """Skips the first two steps, as if gradients had overflowed."""

    left = 2

    def step(self, optimizer):
        self.left -= 1
        return super().step(optimizer) if self.left < 0 else None


def test_steps_that_overflow_must_not_cost_the_final_sparsity(tiny, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", Overflowing)
    options = {"method": "gmp", "batch_size": 50, "every": 1, "options": {"final_sparsity": 0.7}}
    with pytest.raises(CheckFailed, match="final sparsity at step 8, but 2 of 8 steps overflowed in fp16"):
        train(tiny.model(0), tiny.data(), tiny.settings(stop=1.0, **options))
    model = tiny.model(0)
    assert train(model, tiny.data(), tiny.settings(stop=0.5, **options)).last.step == 6
    assert model.sparsity == pytest.approx(0.7, abs=1e-3)
