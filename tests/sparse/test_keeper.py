"""After every step of any optimizer, everything outside the masks is exactly zero and the count is exact."""

import pytest
import torch
from torch import nn, optim

from converters.conversion import convert
from dsr_tool.errors import UsageError
from dsr_tool.methods import DSR, Attached, GradualPruning, ReallocationSchedule, RigL, attach

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "sgd-nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adam": lambda p: optim.Adam(p, weight_decay=1e-2),
    "adam-amsgrad": lambda p: optim.Adam(p, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, weight_decay=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, weight_decay=1e-2),
    "adamax": optim.Adamax,
    "adagrad": lambda p: optim.Adagrad(p, initial_accumulator_value=0.1),
    "rprop": optim.Rprop,
}


def network(memory_format=torch.contiguous_format, sparsity=0.8):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 36, 10),
    )
    model = convert(module, sparsity=sparsity)
    return model.to(memory_format=memory_format)


def train(model, optimizer, steps, after):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(6, 3, 6, 6)).logsumexp(1).sum()
        loss.backward()
        optimizer.step()
        after()


def outside_is_zero(model, optimizer):
    for name, weight in model.weights.items():
        outside = ~model.masks[name]
        tensors = [weight.detach(), weight.grad, *optimizer.state[weight].values()]
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.shape == weight.shape:
                assert torch.count_nonzero(tensor[outside]) == 0
        assert not torch.signbit(weight.detach()[outside]).any()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_gradients_and_state_outside_the_masks_stay_zero_during_reallocation(name, memory_format):
    model = network(memory_format)
    optimizer = OPTIMIZERS[name](model.module.parameters())
    method = DSR(ReallocationSchedule(((0, 2),), 100), target=0.2, threshold=0.02)
    moved = []
    attached = Attached(model, optimizer, method, on_reallocation=lambda step, what: moved.append(what))
    active = model.active_weights
    masks = {key: mask.clone() for key, mask in model.masks.items()}

    def check():
        outside_is_zero(model, optimizer)
        assert model.active_weights == active
        model.check()

    train(model, optimizer, 9, check)
    assert attached.step == 9
    assert len(moved) == 4
    assert sum(len(what.dropped.flat) for what in moved) > 0
    assert any(not torch.equal(masks[key], model.masks[key]) for key in masks)


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_method_leaves_values_outside_the_masks(name, sparsity):
    model = network(sparsity=sparsity)
    optimizer = OPTIMIZERS[name](model.module.parameters())
    schedule = ReallocationSchedule(((0, 2),), 6)
    method = RigL(schedule, drop_fraction=0.5) if sparsity else GradualPruning(schedule, final_sparsity=0.9)
    attach(model, optimizer, method)
    before = model.active_weights
    train(model, optimizer, 7, lambda: outside_is_zero(model, optimizer))
    assert model.active_weights == (before if sparsity else round(0.1 * model.prunable_weights))
    model.check()


def test_reallocated_weights_start_at_zero_with_zero_state():
    model = network()
    optimizer = OPTIMIZERS["adam"](model.module.parameters())
    seen = {}

    def look(_, what):
        for (name, weight), off, on in zip(
            model.weights.items(), what.dropped.per_layer(), what.grown.per_layer(), strict=True
        ):
            for tensor in (weight.detach(), *(v for v in optimizer.state[weight].values() if v.ndim)):
                assert torch.count_nonzero(tensor.take(torch.cat([off, on]))) == 0
            assert model.masks[name].take(on).all()
            assert not model.masks[name].take(off).any()
            seen[name] = len(off)

    method = DSR(ReallocationSchedule(((0, 3),), 100), target=0.3, threshold=0.2)
    Attached(model, optimizer, method, on_reallocation=look)
    train(model, optimizer, 3, lambda: None)
    assert sum(seen.values()) > 0


def test_a_dense_step_and_a_full_mask_agree_bit_for_bit():
    reference, model = network(), network()
    for other in (reference, model):
        for mask in other.masks.values():
            mask.fill_(True)
    plain = OPTIMIZERS["sgd-nesterov"](reference.module.parameters())
    kept = OPTIMIZERS["sgd-nesterov"](model.module.parameters())
    attach(model, kept, "static", total_steps=1)
    train(reference, plain, 3, lambda: None)
    train(model, kept, 3, lambda: None)
    for a, b in zip(reference.module.parameters(), model.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_infinite_gradients_outside_the_mask_are_zeroed():
    model = network()
    optimizer = OPTIMIZERS["sgd-momentum"](model.module.parameters())
    attach(model, optimizer, "static", total_steps=1)
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    for name, weight in model.weights.items():
        weight.grad[~model.masks[name]] = torch.inf
    optimizer.step()
    outside_is_zero(model, optimizer)
    assert all(torch.isfinite(weight).all() for weight in model.module.parameters())


def test_a_step_with_a_closure_leaves_nothing_outside_the_masks():
    model = network()
    optimizer = optim.LBFGS(model.module.parameters(), max_iter=2)
    attach(model, optimizer, "static", total_steps=1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3, 6, 6)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    model.check()


def test_an_optimizer_of_other_parameters_is_refused():
    model = network()
    with pytest.raises(UsageError, match="not among the optimizer's parameters"):
        attach(model, optim.SGD([nn.Parameter(torch.ones(1))], lr=1), "static", total_steps=1)


def test_remove_takes_the_hooks_off_the_optimizer():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.module.parameters())
    attached = attach(model, optimizer, "dsr", total_steps=100)
    attached.remove()
    train(model, optimizer, 1, lambda: None)
    assert attached.step == 0
    assert any(torch.count_nonzero(w[~model.masks[n]]) for n, w in model.weights.items())


def momentum(model):
    return OPTIMIZERS["sgd-momentum"](model.module.parameters())


def test_moving_a_model_to_its_own_device_keeps_the_mask_tensors():
    model = network()
    optimizer = momentum(model)
    attach(model, optimizer, DSR(ReallocationSchedule(((0, 1),), 100), target=0.2, threshold=0.1))
    train(model, optimizer, 4, lambda: model.to("cpu"))
    outside_is_zero(model, optimizer)
    model.check()


def test_masks_follow_a_module_that_is_moved_by_itself():
    model = network()
    model.module.to(memory_format=torch.channels_last)
    optimizer = momentum(model)
    attach(model, optimizer, "static")
    assert model.masks["3.weight"].stride() == model.weights["3.weight"].stride()
    train(model, optimizer, 2, lambda: outside_is_zero(model, optimizer))


def test_masks_replaced_after_attaching_are_refused():
    model = network()
    optimizer = momentum(model)
    attach(model, optimizer, "static")
    model.to(memory_format=torch.channels_last)
    with pytest.raises(UsageError, match="attach after"):
        train(model, optimizer, 1, lambda: None)


def test_optimizer_state_of_a_dense_run_is_masked_when_it_is_loaded():
    dense, model = network(), network()
    for mask in dense.masks.values():
        mask.fill_(True)
    other, optimizer = momentum(dense), momentum(model)
    train(dense, other, 2, lambda: None)
    attach(model, optimizer, "static")
    optimizer.load_state_dict(other.state_dict())
    train(model, optimizer, 1, lambda: outside_is_zero(model, optimizer))


def test_a_second_method_on_one_optimizer_is_refused():
    model = network()
    optimizer = momentum(model)
    first = attach(model, optimizer, "static")
    with pytest.raises(UsageError, match="attached to this optimizer already"):
        attach(model, optimizer, "static")
    first.remove()
    attach(model, optimizer, "static")


def test_a_method_that_refuses_the_model_leaves_the_optimizer_free():
    model = network()
    optimizer = momentum(model)
    with pytest.raises(UsageError, match="gmp should end at"):
        attach(model, optimizer, "gmp", total_steps=100, final_sparsity=0.5)
    train(model, optimizer, 1, lambda: None)
    assert any(torch.count_nonzero(w[~model.masks[n]]) for n, w in model.weights.items())
    attach(model, optimizer, "static")


def test_options_need_a_method_by_name():
    model = network(sparsity=0)
    optimizer = momentum(model)
    attached = attach(model, optimizer, "gmp", total_steps=4, final_sparsity=0.9)
    train(model, optimizer, 4, model.check)
    assert model.active_weights == round(0.1 * model.prunable_weights)
    attached.remove()
    with pytest.raises(UsageError, match="option scope can only be passed with a method name"):
        attach(model, optimizer, attached.method, scope="global")


def test_frozen_weights_are_not_masked_or_reallocated():
    model = network()
    model.weights["0.weight"].requires_grad_(False)
    frozen = model.weights["0.weight"].detach().clone()
    optimizer = momentum(model)
    moves = attach(model, optimizer, DSR(ReallocationSchedule(((0, 1),), 100), target=0.2, threshold=0.1))
    active = model.active_weights
    train(model, optimizer, 5, model.check)
    assert moves.names == ["3.weight", "5.weight"]
    assert torch.equal(model.weights["0.weight"], frozen)
    assert model.active_weights == active


def test_deterministic_algorithms_give_the_same_reallocation():
    masks = []
    for deterministic in (False, True):
        model = network(torch.channels_last)
        optimizer = momentum(model)
        attach(model, optimizer, DSR(ReallocationSchedule(((0, 1),), 100), target=0.2, threshold=0.1))
        torch.use_deterministic_algorithms(deterministic)
        try:
            train(model, optimizer, 3, lambda: None)
        finally:
            torch.use_deterministic_algorithms(False)
        masks.append(model.masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_gradient_clipping_after_masking_counts_active_weights_only():
    model = network()
    optimizer = momentum(model)
    moves = attach(model, optimizer, "static")
    model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    moves.mask_gradients()
    kept = [weight.grad[model.masks[name]] for name, weight in model.weights.items()]
    kept += [p.grad for n, p in model.module.named_parameters() if n not in model.masks]
    expected = torch.cat([g.reshape(-1) for g in kept]).norm()
    assert torch.nn.utils.clip_grad_norm_(model.module.parameters(), 1.0).item() == pytest.approx(expected.item())


def test_sparse_gradients_are_refused():
    model = convert(nn.Sequential(nn.Embedding(200, 32, sparse=True)), sparsity=0.5)
    optimizer = optim.SGD(model.module.parameters(), lr=0.1)
    attach(model, optimizer, "static")
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UsageError, match="sparse=False"):
        optimizer.step()


def test_eps_of_zero_leaves_no_nan_outside_the_masks():
    model = network()
    optimizer = optim.Adam(model.module.parameters(), eps=0)
    attach(model, optimizer, "static")
    train(model, optimizer, 1, lambda: outside_is_zero(model, optimizer))
