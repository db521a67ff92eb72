"""A loop over parameters that freezes or unfreezes a part of a compact network is right, or refused in one sentence."""

import copy
import pickle

import pytest
import torch
from torch import nn

from converters.conversion import convert
from dsr_tool.errors import UsageError
from dsr_tool.methods import attach

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions without biases in nested parts, so that nothing but their weights tells of a loop."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.body = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.ReLU()), nn.Flatten())
        self.head = nn.Linear(128, 4)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


def compact(*frozen):
    module = Net()
    for path in frozen:
        module.get_submodule(path).requires_grad_(False)
    return convert(module, sparsity=0.5, input_shape=X.shape[1:], storage="compact")


def flagged(part, flag):
    for parameter in part.parameters():
        parameter.requires_grad = flag


@pytest.mark.parametrize("path", ["stem", "body", "body.0", "body.0.0", "head"])
@pytest.mark.parametrize("late", [False, True])
def test_freezing_a_part_is_refused_at_the_next_pass(path, late):
    model = compact()
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
    attach(model, optimizer, "static", total_steps=4)
    if late:
        model.module(X).sum().backward()
        optimizer.step()
    flagged(model.module.get_submodule(path), False)
    with pytest.raises(UsageError, match=r"is trained together with all sparse weights.*to_storage\('masked'\)"):
        model.module(X)
    flagged(model.module.get_submodule(path), True)
    model.module(X).sum().backward()


@pytest.mark.parametrize("path", ["body", "body.0.0", ""])
def test_unfreezing_what_was_frozen_before_is_refused(path):
    model = compact("body")
    model.module(X).sum().backward()
    flagged(model.module.get_submodule(path), True)
    with pytest.raises(UsageError, match=r"'body.0.0.weight' was frozen when the model became compact"):
        model.module(X)


@pytest.mark.parametrize("seen", [False, True])
def test_a_frozen_network_whose_part_is_unfrozen_is_refused(seen):
    model = compact()
    if seen:
        list(model.named_parameters())
    flagged(model.module, False)
    model.module(X)
    assert model.trained == []
    flagged(model.module.body, True)
    with pytest.raises(UsageError, match="'body.0.0.weight' was frozen"):
        model.module(X)


def test_the_whole_network_may_be_frozen_and_unfrozen():
    model = compact()
    for flag in (False, True, False, True):
        flagged(model.module, flag)
        assert model.module(X).requires_grad is flag
        assert model.trained == (list(model.masks) if flag else [])


def test_parts_list_what_they_list_in_masked_storage():
    model, masked = compact(), convert(Net(), sparsity=0.5, input_shape=X.shape[1:])
    unpickled = pickle.loads(pickle.dumps(model))  # noqa: S301 - made here
    for each in (model, copy.deepcopy(model), unpickled):
        for path in ("stem", "body", "body.0", "head"):
            one, other = each.module.get_submodule(path), masked.module.get_submodule(path)
            assert [name for name, _ in one.named_parameters("x")] == [name for name, _ in other.named_parameters("x")]
        assert [name for name, _ in each.module.named_parameters()] == ["head.bias", "sparse_values"][::-1]
        flagged(each.module.body, False)
        with pytest.raises(UsageError, match="'body.0.0.weight' is trained together"):
            each.module(X)
    model = compact()
    part = model.module.body
    model.to_storage("masked")
    assert "named_parameters" not in part.__dict__ and len(list(part.parameters())) == 1


def test_groups_of_parts_step_as_masked_ones_do():
    ends = []
    for storage in ("masked", "compact"):
        model = convert(Net(), sparsity=0.5, input_shape=X.shape[1:], storage=storage)
        groups = [{"params": list(getattr(model.module, part).parameters())} for part in ("stem", "body", "head")]
        groups[1]["lr"] = 0.5
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        attached = attach(model, optimizer, "static", total_steps=3)
        for _ in range(3):
            optimizer.zero_grad()
            model.module(X).square().mean().backward()
            optimizer.step()
        attached.remove()
        ends.append(model.module.state_dict())
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor)


@pytest.mark.parametrize("early", [False, True])
def test_parts_listed_while_the_network_was_frozen_are_trained_afterwards(early):
    model = compact()
    model.module.requires_grad_(False)
    parts = [p for part in ("stem", "body", "head") for p in model.module.get_submodule(part).parameters()]
    optimizer = torch.optim.SGD(parts, lr=0.1) if early else None
    model.module(X)
    model.module.requires_grad_(True)
    optimizer = optimizer or torch.optim.SGD(parts, lr=0.1)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    model.module(X).square().mean().backward()
    assert all(part.grad is not None for part in parts)
    optimizer.step()
    assert not any(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())
