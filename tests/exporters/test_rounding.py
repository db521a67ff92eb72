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


def test_of_several_outputs_the_one_is_told_that_moves_furthest_for_its_scale():
    exact = [{"boxes": np.full((2, 4), 1000.0), "scores": np.array([0.25, 0.5])}] * 2
    moved = [{"boxes": exact[0]["boxes"] + 1, "scores": exact[0]["scores"] + 0.1}, exact[1]]
    assert rounding_note("rounded to few bits", exact, moved) == (
        "with weights rounded to few bits, 'scores' of 2 outputs moves most, by up to 0.1 from that of the model as it "
        "was, 0.05 on average (largest output 0.5)"
    )


def test_an_output_that_is_no_number_any_more_is_told_before_all_others():
    exact = [{"a": np.ones(2), "b": np.zeros(2), "c": np.ones(2)}]
    moved = [{"a": np.ones(2) * 9, "b": np.ones(2), "c": np.array([np.nan, 1])}]
    assert "'c' of 3 outputs moves most, by up to nan" in rounding_note("rounded", exact, moved)
    assert "'b' of 3 outputs moves most, by up to 1 " in rounding_note(
        "rounded", exact, [{**moved[0], "c": np.ones(2)}]
    )
    assert "'a' of 3 outputs moves most, by up to 0 " in rounding_note("rounded", exact, exact)
    assert "'a' of 3 outputs moves most, by up to inf" in rounding_note("rounded", exact, [{}])
