"""Training with weights in few bits: passes see the grid, steps change exact weights, files hold what was trained."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dsr_tool import load, open_archive
from dsr_tool.errors import FormatError, UsageError
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.grid_rounding import best_scales, on_grid, to_grid
from dsr_tool.train import Observer, RunFolder, train
from dsr_tool.train.rounding import RoundedWeights
from dsr_tool.train.step import Stepper
from exporters.export import export

STORAGES = ("masked", "compact")
PLAIN = {"method": "static", "every": None, "momentum": 0.0, "weight_decay": 0.0, "lr": 0.1, "schedule": "step"}


def weights_of(model):
    state = model.module.state_dict()
    return {name: state[name].clone() for name, spec in model.specs.items() if spec.weight}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_on_their_grids_inside_and_exact_outside(tiny, storage, bits):
    model = tiny.model().to_storage(storage)
    exact, rounding = weights_of(model), RoundedWeights(model, bits)
    with rounding.rounded(), rounding.rounded():
        inside = weights_of(model)
    assert all(torch.equal(weight, exact[name]) for name, weight in weights_of(model).items())
    for name, tensor in model.tensors().items():
        if model.specs[name].weight:
            expected = to_grid(tensor, bits).to_dense()
            assert np.array_equal(inside[name].numpy(), expected) and not np.array_equal(inside[name], exact[name])
    rounding.settle()
    assert all(torch.equal(weight, inside[name]) for name, weight in weights_of(model).items())


@pytest.mark.parametrize("storage", STORAGES)
def test_weights_are_exact_after_an_interrupt_while_they_are_rounded(tiny, storage, monkeypatch):
    model = tiny.model().to_storage(storage)
    exact, rounding, calls = weights_of(model), RoundedWeights(model, 4), []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return best_scales(*arguments)

    monkeypatch.setattr("dsr_tool.train.rounding.best_scales", interrupt)
    with pytest.raises(KeyboardInterrupt), rounding.rounded():
        pass
    assert all(torch.equal(weight, exact[name]) for name, weight in weights_of(model).items())


@pytest.mark.parametrize("storage", STORAGES)
def test_a_step_moves_exact_weights_by_the_gradient_at_the_rounded_ones(tiny, storage):
    model = tiny.model().to_storage(storage)
    twin, exact = copy.deepcopy(model).to_storage("masked"), weights_of(model)
    x, labels = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    stepper = Stepper(
        model,
        tiny.settings(storage=storage, values="int4", **PLAIN),
        classes=10,
        steps_per_epoch=4,
        on_reallocation=lambda *_: None,
    )
    model.module.train()
    stepper.step(x, labels)
    stepper.close()
    RoundedWeights(twin, 4).settle()
    twin.module.train()
    cross_entropy(twin.module(x), labels).backward()
    parameters = dict(twin.module.named_parameters())
    for name, weight in weights_of(model).items():
        gradient = parameters[name].grad
        gradient = gradient * twin.masks[name] if name in twin.masks else gradient
        assert torch.allclose(weight, exact[name] - 0.1 * gradient, atol=1e-6), name


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", ["dsr", "set", "rigl", "deepr", "static"])
def test_what_is_exported_is_what_was_trained(tiny, tmp_path, storage, method):
    model, seen = tiny.model(), {}

    class Look(Observer):
        def on_epoch(self, model, record):  # noqa: ARG002
            seen["weights"] = weights_of(model)

    with RunFolder(tmp_path / "run") as folder:
        train(model, tiny.data(), tiny.settings(method=method, storage=storage, values="int5"), [folder, Look()])
    saved = load(tmp_path / "run", tiny.model().module)
    assert all(torch.equal(weight, seen["weights"][name]) for name, weight in weights_of(model).items())
    assert all(torch.equal(weight, seen["weights"][name]) for name, weight in weights_of(saved).items())
    assert export(saved, tmp_path / "m.dsr", values="int5").passed
    archive = open_archive(tmp_path / "m.dsr")
    for name, weight in seen["weights"].items():
        tensor = archive.tensor(name)
        assert isinstance(tensor, GridTensor) and np.abs(tensor.codes).max() <= 15
        assert np.array_equal(tensor.to_dense(), weight.numpy())
    best = load(tmp_path / "run" / "best", tiny.model().module).tensors()
    assert all(on_grid(best[name], 5) is not None for name in seen["weights"])


def test_masks_move_as_before(tiny):
    moved = {}
    for values in ("fp32", "int8"):
        model, first = tiny.model(), []

        class Look(Observer):
            def on_reallocation(self, step, reallocation, first=first):
                first.append((step, len(reallocation.dropped.flat), set(reallocation.dropped.flat.tolist())))

        before = {name: mask.clone() for name, mask in model.masks.items()}
        train(
            model,
            tiny.data(),
            tiny.settings(method="set", every=1, epochs=6, storage="masked", values=values),
            [Look()],
        )
        moved[values] = first
        assert any(not torch.equal(mask, before[name]) for name, mask in model.masks.items())
    assert [entry[:2] for entry in moved["fp32"]] == [entry[:2] for entry in moved["int8"]] != []
    # Exact weights choose, and eight bits change the gradients little: nearly the same ones are the smallest.
    one, other = moved["fp32"][0][2], moved["int8"][0][2]
    assert len(one & other) > 0.9 * len(one)


def test_scales_are_kept_for_some_passes_and_chosen_again_when_asked(tiny):
    model = tiny.model()
    rounding = RoundedWeights(model, 5)
    name, weight = next(iter(model.weights.items()))
    with rounding.rounded():
        first = weight.detach().abs().max().item()
    with torch.no_grad():
        weight.mul_(3)
    with rounding.rounded():
        assert weight.detach().abs().max().item() == pytest.approx(first)  # cut off by the old scale
    rounding.choose_again()
    with rounding.rounded():
        assert weight.detach().abs().max().item() > 2 * first, name


@pytest.mark.parametrize("method", ["dst", "tied"])
def test_methods_that_compute_weights_are_refused(tiny, method):
    with pytest.raises(UsageError, match=f"--values 'int5' does not go with --method {method}"):
        tiny.settings(method=method, values="int5", options={"final_sparsity": 0.8}).check()


def test_exact_weights_of_another_model_are_refused_in_one_sentence(tiny):
    stepper = Stepper(
        tiny.model(), tiny.settings(values="int4", **PLAIN), classes=10, steps_per_epoch=4, on_reallocation=print
    )
    state = {**stepper.state(), "weights": {}}
    with pytest.raises(FormatError, match=r"model \(its exact weights have other names or shapes\); resume with"):
        stepper.load_state(state)
    stepper.close()


def test_unknown_values_are_refused(tiny):
    with pytest.raises(UsageError, match="--values 'int3' is unknown"):
        tiny.settings(values="int3").check()
