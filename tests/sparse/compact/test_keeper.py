"""Methods and optimizers do the same in both storages, bit for bit."""

import pytest
import torch
from torch import optim

from dsr_tool.errors import UsageError
from dsr_tool.methods import attach
from dsr_tool.methods.grow import at_random
from dsr_tool.sparse.active import Positions, gather

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: optim.Adam(p, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, weight_decay=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, initial_accumulator_value=0.1),
    "rprop": optim.Rprop,
    "nadam": optim.NAdam,
}


def attached(model, optimizer, method, **more):
    options = {"drop_fraction": 0.2} if method in ("set", "rigl") else {}
    if method == "dsr":
        options = {"threshold": "auto", "target": 0.2}
    if method == "deepr":
        options = {"temperature": 1e-2}
    if method == "granet":
        options = {"final_sparsity": 0.9, "drop_fraction": 0.2}
    return attach(model, optimizer, method, total_steps=40, seed=3, **options, **more)


@pytest.mark.parametrize("method", ["dsr", "set", "rigl", "static", "deepr", "granet"])
def test_every_method_takes_the_same_steps(pair, steps, method):
    models = pair()
    pairs = [(model, OPTIMIZERS["momentum"](model.module.parameters())) for model in models]
    methods = [attached(model, optimizer, method) for model, optimizer in pairs]
    before = {name: mask.clone() for name, mask in models[0].masks.items()}
    for one, other in steps.take(pairs, 40):
        assert one == other
    masked, compact = models
    assert all(torch.equal(mask, compact.masks[name]) for name, mask in masked.masks.items())
    state = compact.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in masked.module.state_dict().items())
    moved = any(not torch.equal(mask, before[name]) for name, mask in masked.masks.items())
    assert moved == (method != "static")
    assert methods[1].step == 40


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_the_same_steps(pair, steps, name):
    models = pair()
    pairs = [(model, OPTIMIZERS[name](model.module.parameters())) for model in models]
    for model, optimizer in pairs:
        attached(model, optimizer, "set")
    losses = list(steps.take(pairs, 30))
    # A fused or vectorised loop rounds the ends of a tensor in another way, hence no equality.
    assert max(abs(one - other) for one, other in losses) < 1e-3
    masked, compact = models
    assert compact.active_weights == masked.active_weights
    assert torch.isfinite(compact.module.sparse_values).all()


def test_state_of_grown_weights_starts_at_zero_and_of_kept_ones_stays(pair, steps):
    _, compact = pair()
    optimizer = optim.SGD(compact.module.parameters(), lr=0.1, momentum=0.9)
    method = attached(compact, optimizer, "static")
    list(steps.take([(compact, optimizer)], 5))
    before, version = _places(compact, optimizer), compact.store.version
    weights = gather(compact)
    dropped = Positions.of(weights.positions.flat[::7].clone(), weights.sizes)
    grown = at_random(weights, dropped.counts[::-1], torch.Generator().manual_seed(0))
    method._keeper.move(dropped, grown)
    after = _places(compact, optimizer)
    new = {place for place in after if place not in before}
    assert len(new) == len(grown.flat)
    assert all(after[place] == (0.0, 0.0) for place in new)
    assert all(after[place] == before[place] for place in after if place not in new)
    assert compact.store.version > version


def _places(model, optimizer):
    """Returns value and momentum by layer and position."""
    values = model.module.sparse_values
    pairs = zip(values.tolist(), optimizer.state[values]["momentum_buffer"].tolist(), strict=True)
    places = [(name, place) for name in model.store.trained for place in model.store.positions_of(name).tolist()]
    return dict(zip(places, pairs, strict=True))


@pytest.mark.parametrize("method", ["dst", "tied", "dense"])
def test_methods_that_train_dense_weights_are_refused(pair, method):
    _, compact = pair(sparsity=0.0)
    optimizer = optim.SGD(compact.module.parameters(), lr=0.1)
    options = {} if method == "dense" else {"final_sparsity": 0.5}
    with pytest.raises(UsageError, match=f"method {method} trains in masked storage"):
        attach(compact, optimizer, method, total_steps=10, **options)


def test_optimizers_that_need_shapes_are_refused_by_name(pair):
    _, compact = pair()
    optimizer = optim.Adafactor(compact.module.parameters())
    with pytest.raises(UsageError, match="Adafactor steps by the shape of each weight"):
        attach(compact, optimizer, "static")


def test_an_optimizer_from_before_the_change_is_refused(pair):
    masked, _ = pair()
    optimizer = optim.SGD(masked.module.parameters(), lr=0.1)
    masked.to_storage("compact")
    with pytest.raises(UsageError, match="make the optimizer from model.module.parameters"):
        attach(masked, optimizer, "static")


def test_gmp_lowers_the_density_and_leaves_zeros_behind(pair, steps):
    models = pair(sparsity=0.5)
    pairs = [(model, optim.Adam(model.module.parameters(), lr=1e-2)) for model in models]
    for model, optimizer in pairs:
        attach(model, optimizer, "gmp", total_steps=40, final_sparsity=0.9, every=2)
    list(steps.take(pairs, 40))
    masked, compact = models
    assert compact.counts == masked.counts
    assert compact.active_weights < compact.store.values.numel()
    assert not torch.count_nonzero(compact.module.sparse_values[compact.active_weights :])


def test_two_gradients_of_one_layer_are_refused_where_only_the_largest_are_kept(pair):
    _, compact = pair()
    optimizer = optim.SGD(compact.module.parameters(), lr=0.1)
    attach(compact, optimizer, "rigl", total_steps=10, every=1)
    compact(torch.randn(2, 3, 9, 9)).sum().backward()
    with pytest.raises(RuntimeError, match="two gradients in one step"):
        compact(torch.randn(2, 3, 9, 9)).sum().backward()
