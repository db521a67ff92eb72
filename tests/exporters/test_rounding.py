"""The effect of rounding to float16 is measured on a copy of the model."""

import numpy as np
import torch

from exporters.verify.rounding import rounded_model, rounding_notes


def test_the_rounded_model_is_a_copy(make_model):
    model = make_model()
    with torch.no_grad():
        model.weights["8.weight"].view(-1)[model.masks["8.weight"].view(-1).nonzero()[:5]] = 1e-9
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    rounded = rounded_model(model)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, before[name])
        halved = tensor.half().float() if model.specs[name].weight else tensor
        assert torch.equal(rounded.module.state_dict()[name], halved)
    inputs = [np.ones((1, *model.config.input_shape), np.float32)]
    changed, zeros = rounding_notes(model, rounded, inputs)
    assert "outputs differ by up to" in changed and zeros == "5 weights became zero by rounding"
    assert rounding_notes(rounded, rounded, inputs) == (changed.replace(changed.split()[10], "0"),)
