"""The effect of rounding to float16 is measured on a copy of the model."""

import re

import numpy as np
import torch

from exporters.values import stored_as
from exporters.verify.rounding import rounded_model, rounding_notes


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
    changed, zeros = rounding_notes(model, rounded, "rounded to float16", inputs)
    assert "outputs differ by up to" in changed and zeros == "5 weights became zero by rounding"
    (unchanged,) = rounding_notes(rounded, rounded, "rounded to float16", inputs)
    measured = re.compile(r"up to (\S+) from .* as it was, (\S+) on average")
    assert all(float(number) > 0 for number in measured.search(changed).groups())
    assert measured.search(unchanged).groups() == ("0", "0")
