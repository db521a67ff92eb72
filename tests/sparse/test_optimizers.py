"""Every optimizer of torch keeps the masks in both storages, or is refused by name with the reason."""

import copy

import pytest
import torch
from torch import nn, optim

from converters.conversion import convert
from dsr_tool import attach
from dsr_tool.errors import UsageError
from dsr_tool.sparse.optimizers import OptimizerView, closure_of, with_closure

ALL = sorted(
    name
    for name in dir(optim)
    if isinstance(getattr(optim, name), type) and getattr(optim, name) is not optim.Optimizer
)
RATES = {"ASGD": 0.1, "Adadelta": 10.0, "RAdam": 0.1, "Rprop": 0.1, "SGD": 0.1}
"""Learning rates other than 0.01."""
REFUSED = {"SparseAdam": "SparseAdam takes sparse gradients only"}
REFUSED_COMPACT = {**REFUSED, "Adafactor": "Adafactor steps by the shape", "Muon": "2D|Muon steps by the shape"}


def network(storage="masked"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 40, bias=False), nn.Tanh(), nn.Linear(40, 30, bias=False))
    return convert(net, sparsity=0.8, storage=storage, keep_dense=[], input_shape=(20,))


def make(name, parameters):
    kind = getattr(optim, name)
    return kind(parameters, lr=RATES.get(name, 1e-2))


def steps(model, optimizer, count):
    inputs = torch.randn(8, 20, generator=torch.Generator().manual_seed(1))
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (model(inputs) - 1).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(count):
        optimizer.step(closure)
        for name, weight in model.weights.items():
            assert not weight.detach().masked_fill(model.masks[name], 0.0).any()
    return losses


@pytest.mark.parametrize("method", ["dsr", "rigl", "static"])
@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("name", ALL)
def test_every_optimizer_of_torch_trains_inside_the_masks(name, storage, method):
    model = network(storage)
    refused = (REFUSED if storage == "masked" else REFUSED_COMPACT).get(name)
    options = {"dsr": {"every": 2, "threshold": "auto", "target": 0.2}, "rigl": {"every": 2}, "static": {}}[method]
    if refused:
        with pytest.raises((UsageError, ValueError), match=refused):
            attach(model, make(name, model.module.parameters()), method, total_steps=40, **options)
        return
    optimizer = make(name, model.module.parameters())
    active, before = model.active_weights, {key: mask.clone() for key, mask in model.masks.items()}
    attached = attach(model, optimizer, method, total_steps=40, **options)
    losses = steps(model, optimizer, 16)
    assert losses[-1] < 0.98 * losses[0]
    assert attached.step == 16 and model.active_weights == active
    assert any(not torch.equal(mask, before[key]) for key, mask in model.masks.items()) == (method != "static")


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize(
    ("make", "key", "start"),
    [
        (lambda p: optim.Rprop(p, 0.05), "step_size", 0.05),
        (lambda p: optim.Adagrad(p, 0.1, initial_accumulator_value=0.3), "sum", 0.3),
        (lambda p: optim.SGD(p, 0.1, momentum=0.9), "momentum_buffer", 0.0),
    ],
)
@pytest.mark.parametrize("by_layer", [False, True])
def test_state_of_grown_weights_starts_as_that_of_a_new_optimizer(make, key, start, storage, by_layer):
    model = network(storage)
    parameters = [p for _, p in model.named_parameters()] if by_layer else model.module.parameters()
    optimizer = make(parameters)
    seen = []

    def look(_, moved):
        dense = dict(zip(model.masks, moved.grown.per_layer(), strict=True))
        for name, positions in dense.items():
            if storage == "masked":
                state = optimizer.state[model.weights[name]][key].reshape(-1)[positions]
            else:
                layer = model.store.layers[name]
                places = torch.searchsorted(model.store.positions_of(name).long(), positions)
                own = dict(model.named_parameters())[name] if by_layer else model.store.values
                state = optimizer.state[own][key][places + (0 if by_layer else layer.start)]
            assert torch.equal(state, torch.full_like(state, start))
            seen.append(len(state))

    attached = attach(model, optimizer, "dsr", total_steps=40, every=2, threshold="auto", target=0.2)
    attached._notify = look
    steps(model, optimizer, 6)
    assert sum(seen) > 0


class Around(optim.Optimizer):
    """An optimizer with hooks and state of its own around another one."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize(("storage", "by_layer"), [("masked", False), ("compact", False), ("compact", True)])
@pytest.mark.parametrize("make", [lambda p: optim.Rprop(p, 0.05), lambda p: optim.SGD(p, 0.1, momentum=0.9)])
def test_an_optimizer_inside_another_trains_as_it_does_alone(make, storage, by_layer):
    ends = []
    for wrap in (Around, lambda inner: inner):
        model = network(storage)
        parameters = [p for _, p in model.named_parameters()] if by_layer else model.module.parameters()
        optimizer = wrap(make(parameters))
        attach(model, optimizer, "dsr", total_steps=40, every=2, threshold="auto", target=0.2)
        steps(model, optimizer, 7)
        ends.append([weight.detach() for weight in model.weights.values()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_state_that_codes_its_values_is_left_alone():
    class Quantised(optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter].setdefault("code", torch.full_like(parameter, 127, dtype=torch.uint8))
            return loss

    model = network()
    optimizer = Quantised(model.module.parameters(), 0.1)
    attach(model, optimizer, "dsr", total_steps=20, every=1)
    steps(model, optimizer, 4)
    assert all(bool((state["code"] == 127).all()) for state in optimizer.state.values())


def test_matrices_by_muon_and_the_rest_by_another_optimizer():
    muon = getattr(optim, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
    model = convert(net, sparsity=0.8, keep_dense=[], input_shape=(3, 8, 8))
    matrices = [p for p in net.parameters() if p.ndim == 2]
    optimizers = muon(matrices, lr=1e-2), optim.AdamW([p for p in net.parameters() if p.ndim != 2], 1e-2)
    for optimizer in optimizers:
        attach(model, optimizer, "set", total_steps=20, every=2)
    for _ in range(6):
        net.zero_grad()
        net(torch.randn(4, 3, 8, 8)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        model.check()


def test_wrappers_are_looked_into():
    model = network()
    inner = optim.SGD(model.module.parameters(), 0.1)

    class Shell(optim.Optimizer):
        """A wrapper that never called the constructor of its base."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        @property
        def param_groups(self):
            return self.optimizer.param_groups

    class Sharing(optim.SGD):
        """A wrapper with the attributes of what it wraps."""

        def __init__(self, optimizer):
            self.__dict__ = {**vars(optimizer), "_optimizer": optimizer}

    assert OptimizerView(Shell(inner)).all == [inner]
    assert OptimizerView(Sharing(inner)).all == [inner]
    assert not OptimizerView(inner).in_parts
    with pytest.raises(UsageError, match="dict is no torch optimizer"):
        OptimizerView({})


def test_a_copied_optimizer_does_not_drive_the_method():
    model = network()
    optimizer = optim.SGD(model.module.parameters(), 0.1)
    attached = attach(model, optimizer, "static")
    other = copy.deepcopy(optimizer)
    steps(model, optimizer, 1)
    assert attached.step == 1 and other.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]


def test_closures_are_found_and_replaced_wherever_they_are():
    def one():
        return 1

    def two():
        return 2

    optimizer = object()
    for args, kwargs in (((optimizer, one), {}), ((optimizer,), {"closure": one}), ((optimizer, one), {"more": 3})):
        assert closure_of(args, kwargs) is one
        assert closure_of(*with_closure(args, kwargs, two)) is two
    assert closure_of((optimizer, None), {"closure": None}) is None
