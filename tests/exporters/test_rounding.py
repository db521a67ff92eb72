"""The effect of rounding to float16 is measured on a copy of the model."""

import re

import numpy as np
import torch

from exporters.values import stored_as
from exporters.verify.outputs import outputs_of, rounding_note
from exporters.verify.rounding import rounded_model, zeros_note


def test_the_rounded_model_is_a_copy(make_model):
    model = make_model()
    with torch.no_grad():
        model.weights["8.weight"].view(-1)[model.masks["8.weight"].view(-1).nonzero()[:5]] = 1e-9
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    rounded = rounded_model(model, stored_as(model.tensors(), model.specs, "fp16"))
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, before[name])
        halved = tensor.half().float() if model.specs[name].weight else tensor
        assert torch.equal(rounded.module.state_dict()[name], halved)
    inputs = [np.ones((1, *model.config.input_shape), np.float32)]
    assert zeros_note(model, rounded) == ("5 weights became zero by rounding",) and not zeros_note(rounded, rounded)
    before, after = (outputs_of(one.module.eval(), inputs) for one in (model, rounded))
    changed, unchanged = (rounding_note("rounded to float16", one, after) for one in (before, after))
    assert "outputs differ by up to" in changed
    measured = re.compile(r"up to (\S+) from .* as it was, (\S+) on average")
    assert all(float(number) > 0 for number in measured.search(changed).groups())
    assert measured.search(unchanged).groups() == ("0", "0")
