"""The L1 penalty: it reaches the active weights of sparse layers, and nothing else, in both storages."""

import pytest
import torch

from dsr_tool.errors import UsageError
from dsr_tool.train import train
from dsr_tool.train.step import Stepper

PLAIN = {"method": "static", "every": None, "momentum": 0.0, "weight_decay": 0.0, "lr": 0.1, "schedule": "step"}


def after_one_step(tiny, storage, **changes):
    """Returns the parameters before and after one step, and the masks."""
    model = tiny.model().to_storage(storage)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    settings = tiny.settings(storage=storage, **PLAIN, **changes)
    stepper = Stepper(model, settings, classes=10, steps_per_epoch=4, on_reallocation=lambda *_: None)
    model.module.train()
    generator = torch.Generator().manual_seed(1)
    loss, _ = stepper.step(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8))
    stepper.close()
    return before, model.module.state_dict(), model.masks, float(loss)


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_gradient_gets_l1_times_the_sign_of_each_active_weight(tiny, storage, accumulate):
    start, plain, masks, loss = after_one_step(tiny, storage, accumulate=accumulate)
    _, pulled, _, penalised = after_one_step(tiny, storage, accumulate=accumulate, l1=0.01)
    for name, value in plain.items():
        expected = 0.1 * 0.01 * start[name].sign() * masks[name] if name in masks else torch.zeros(())
        assert torch.allclose(value - pulled[name], expected.expand_as(value).to(value.dtype), atol=1e-6), name
    assert loss == penalised  # what is logged is the loss of the data


def test_both_storages_shrink_alike(tiny):
    sums = {}
    for storage in ("masked", "compact"):
        for l1 in (0.0, 0.03):
            model = tiny.model()
            train(model, tiny.data(), tiny.settings(method="set", storage=storage, lr=0.05, epochs=4, l1=l1))
            sums[storage, l1] = sum(weight.abs().sum().item() for weight in model.weights.values())
            model.check()
    assert sums["masked", 0.03] < 0.9 * sums["masked", 0.0]
    assert sums["masked", 0.03] == pytest.approx(sums["compact", 0.03], rel=0.05)


@pytest.mark.parametrize("l1", [-1e-3, float("nan"), float("inf")])
def test_other_values_are_refused(tiny, l1):
    with pytest.raises(UsageError, match=r"--l1 .* is not allowed; give 0 or more\."):
        tiny.settings(l1=l1).check()
