"""Optimizers with settings by layer take the same steps in both storages."""

import copy
import math

import pytest
import torch
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel

from dsr_tool.errors import UsageError
from dsr_tool.methods import attach


def groups(model, **common):
    """Returns the parameters of a model in three groups, one of them in two places of the flat vector."""
    head, attention, rest = [], [], []
    for name, parameter in model.named_parameters():
        (head if name.startswith(("first", "head")) else attention if "attention" in name else rest).append(parameter)
    return [
        {"params": head, "lr": 0.05, "weight_decay": 0.0, **common},
        {"params": attention, "lr": 0.02, "weight_decay": 0.1, **common},
        {"params": rest, "lr": 0.1, "weight_decay": 1e-3, **common},
    ]


class LARS(optim.Optimizer):
    """Steps each weight in proportion to its norm (You et al. 2017)."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] * float(p.norm() / (p.grad.norm() + 1e-9)))


OPTIMIZERS = {
    "momentum": lambda model: optim.SGD(groups(model), lr=0.1, momentum=0.9, nesterov=True),
    "fused": lambda model: optim.SGD(groups(model), lr=0.1, momentum=0.9, fused=True),
    "mixed": lambda model: optim.SGD([{**group, "momentum": 0.9 * (i % 2)} for i, group in enumerate(groups(model))]),
    "adam": lambda model: optim.Adam(groups(model), lr=0.1, amsgrad=True),
    "adamw": lambda model: optim.AdamW(groups(model)),
    "rmsprop": lambda model: optim.RMSprop(groups(model), momentum=0.9),
    "LARS": lambda model: LARS(model.named_parameters()),
}
OPTIONS = {
    "set": {"drop_fraction": 0.2},
    "rigl": {"drop_fraction": 0.2},
    "dsr": {"threshold": "auto", "target": 0.2},
    "deepr": {"temperature": 1e-2},
}


def attached(models, optimizer, method, **options):
    pairs = [(model, optimizer(model)) for model in models]
    for model, made in pairs:
        attach(model, made, method, total_steps=40, seed=3, **OPTIONS.get(method, {}), **options)
    return pairs


def same(masked, compact):
    state = compact.module.state_dict()
    assert all(torch.equal(mask, compact.masks[name]) for name, mask in masked.masks.items())
    return all(torch.equal(value, state[name]) for name, value in masked.module.state_dict().items())


def test_both_storages_name_the_same_parameters(pair):
    masked, _ = pair()
    masked.module.grouped.weight.requires_grad_(False)
    compact = copy.deepcopy(masked).to_storage("compact")
    named = dict(compact.named_parameters())
    names = [name for name, _ in masked.module.named_parameters()]
    assert list(named) == [name for name, _ in masked.named_parameters()] == names
    assert all(parameter.requires_grad == named[name].requires_grad for name, parameter in masked.named_parameters())
    assert {name: named[name].numel() for name in masked.masks} == masked.counts
    assert all(parameter is named[name] for name, parameter in compact.named_parameters())
    dense = dict(compact.module.named_parameters())
    assert all(named[name] is dense[name] for name in dense.keys() & named.keys())


@pytest.mark.parametrize("method", ["dsr", "set", "rigl", "static", "gmp", "deepr"])
def test_every_method_takes_the_same_steps(pair, steps, method):
    models = pair()
    options = {"final_sparsity": 0.9, "every": 2} if method == "gmp" else {}
    pairs = attached(models, OPTIMIZERS["momentum"], method, **options)
    before = models[0].counts
    for one, other in steps.take(pairs, 40):
        assert one == other
    assert same(*models)
    assert (models[0].counts != before) == (method in ("dsr", "gmp", "deepr"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_the_same_steps(pair, steps, name):
    models = pair()
    pairs = attached(models, OPTIMIZERS[name], "dsr")
    losses = list(steps.take(pairs, 30))
    # Vectorised loops round the ends of a tensor in another way, and LARS adds its norm in another order.
    assert max(abs(one - other) for one, other in losses) < 1e-3
    assert models[0].counts == models[1].counts
    for (_, parameter), count in zip(models[1].named_parameters(), _lengths(models[1]), strict=True):
        assert all(v.shape in ((), (count,), parameter.shape) for v in pairs[1][1].state[parameter].values())


def _lengths(model):
    return [model.counts.get(name, parameter.numel()) for name, parameter in model.named_parameters()]


def test_groups_make_a_difference(pair, steps):
    grouped, other = pair()[1], pair()[1]
    pairs = [(grouped, OPTIMIZERS["momentum"](grouped))]
    pairs.append((other, optim.SGD(other.module.parameters(), lr=0.1, momentum=0.9, nesterov=True)))
    *_, (one, two) = steps.take(pairs, 5)
    assert one != two


def test_on_kernels_the_steps_are_the_same_to_rounding(pair, steps):
    masked, compact = pair()
    compact.store.kernels = True
    pairs = attached((masked, compact), OPTIMIZERS["momentum"], "dsr")
    for one, other in steps.take(pairs, 8):
        assert math.isclose(one, other, rel_tol=1e-4)


def batches(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(6, 3, 9, 9, generator=generator), torch.randint(10, (6,), generator=generator)


def add_gradients(model, images, labels):
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss


def plainly(model, optimizer, images, labels):
    optimizer.zero_grad()
    add_gradients(model, images, labels)
    optimizer.step()


def to_zero(model, optimizer, images, labels):
    optimizer.zero_grad(set_to_none=False)
    add_gradients(model, images, labels)
    optimizer.step()


def cleared_after_forward(model, optimizer, images, labels):
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def cleared_by_the_module(model, optimizer, images, labels):
    model.module.zero_grad()
    add_gradients(model, images, labels)
    optimizer.step()


def added_up(model, optimizer, images, labels):
    optimizer.zero_grad()
    for part in (slice(0, 3), slice(3, 6)):
        add_gradients(model, images[part], labels[part])
    optimizer.step()


def never_cleared(model, optimizer, images, labels):
    add_gradients(model, images, labels)
    optimizer.step()


def clipped(model, optimizer, images, labels):
    optimizer.zero_grad()
    add_gradients(model, images, labels)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad.clamp_(-1e-3, 1e-3)
    optimizer.step()


def replaced(model, optimizer, images, labels):
    optimizer.zero_grad()
    add_gradients(model, images, labels)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = parameter.grad.sign()
    optimizer.step()


def clipped_in_the_module(model, optimizer, images, labels):
    optimizer.zero_grad()
    add_gradients(model, images, labels)
    nn.utils.clip_grad_value_(model.module.parameters(), 1e-3)
    optimizer.step()


def by_closure(model, optimizer, images, labels):
    def closure():
        optimizer.zero_grad()
        return add_gradients(model, images, labels)

    optimizer.step(closure)


def scaled(model, optimizer, images, labels):
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


LOOPS = [
    plainly, to_zero, cleared_after_forward, cleared_by_the_module, added_up, never_cleared, clipped, replaced,
    clipped_in_the_module, by_closure, scaled,
]  # fmt: skip


@pytest.mark.parametrize("with_method", [False, True], ids=["alone", "attached"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loops_of_every_kind_take_the_same_steps(pair, loop, with_method):
    models = pair()
    optimizers = [OPTIMIZERS["momentum"](model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        # Without a method, nothing zeroes the gradients of inactive weights in masked storage.
        attach(model, optimizer, "set" if with_method else "static", total_steps=12, seed=3)
    if not with_method:
        compact = copy.deepcopy(models[1])
        models, optimizers = (models[0], compact), (optimizers[0], OPTIMIZERS["momentum"](compact))
    for images, labels in batches(12):
        for model, optimizer in zip(models, optimizers, strict=True):
            loop(model, optimizer, images, labels)
    assert same(*models)


def test_two_optimizers_clear_their_own_layers_alone(pair):
    masked, compact = pair()
    for model in (masked, compact):
        mask = model.masks["head.weight"]
        named = dict(model.named_parameters())
        head = [named.pop("head.weight")]
        one, other = optim.SGD(head, lr=0.1), optim.SGD(list(named.values()), lr=0.0)
        for index, (images, labels) in enumerate(batches(6)):
            one.zero_grad()
            if index % 3 == 0:
                other.zero_grad()
            add_gradients(model, images, labels)
            if model is masked:
                head[0].grad.mul_(mask)
            one.step()
            other.step()
    assert same(masked, compact)
    sums = [float(dict(m.named_parameters())["first.weight"].grad.abs().sum()) for m in (masked, compact)]
    assert sums[1] > 0
    inside = masked.module.first.weight.grad[masked.masks["first.weight"]]
    assert torch.equal(inside, dict(compact.named_parameters())["first.weight"].grad)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("in_messages", [False, True])
@pytest.mark.parametrize("method", ["dsr", None])
def test_layers_step_with_the_gradients_that_ddp_leaves(pair, in_messages, method):
    _, reference = pair()
    compact = copy.deepcopy(reference)
    replica = DistributedDataParallel(compact.module, gradient_as_bucket_view=in_messages)
    # Stands for the mean over processes: what this rank computed itself is half of it.
    replica.register_comm_hook(None, _double)
    optimizers = [OPTIMIZERS["momentum"](model) for model in (reference, compact)]
    for model, optimizer in zip((reference, compact), optimizers, strict=True):
        if method:
            attach(model, optimizer, method, total_steps=9, seed=3, every=3)
    for images, labels in batches(9):
        for forward, optimizer, factor in zip((reference, replica), optimizers, (2.0, 1.0), strict=True):
            optimizer.zero_grad()
            (factor * nn.functional.cross_entropy(forward(images), labels)).backward()
            optimizer.step()
    assert same(reference, compact)


def _double(_, bucket):
    made = torch.futures.Future()
    made.set_result(bucket.buffer() * 2)
    return made


def test_a_saved_optimizer_goes_on_with_a_copy_of_the_model(pair, steps):
    _, compact = pair()
    pairs = attached((compact,), OPTIMIZERS["adam"], "dsr")
    list(steps.take(pairs, 10))
    other = copy.deepcopy(compact)
    optimizer = OPTIMIZERS["adam"](other)
    optimizer.load_state_dict(copy.deepcopy(pairs[0][1].state_dict()))
    pairs = [(compact, OPTIMIZERS["adam"](compact)), (other, optimizer)]
    pairs[0][1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, two in steps.take(pairs, 5, seed=2):
        assert one == two


@pytest.mark.parametrize(
    "make", [OPTIMIZERS["fused"], lambda model: optim.SGD(model.module.parameters(), momentum=0.9)]
)
def test_the_state_of_another_model_is_refused(pair, steps, make):
    _, compact = pair()
    _, other = pair(sparsity=0.7)
    optimizer, its = make(compact), make(other)
    attach(compact, optimizer, "static")
    list(steps.take([(other, its)], 1))
    with pytest.raises(UsageError, match=r"'momentum_buffer' has shape .* load the state that was saved together"):
        optimizer.load_state_dict(its.state_dict())


def test_layers_follow_the_module_to_another_type(pair):
    masked, compact = pair()
    before = dict(compact.named_parameters())
    for model in (masked, compact):
        model.to(torch.float64)
    after = dict(compact.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    for model in (masked, compact):
        optimizer = OPTIMIZERS["momentum"](model)
        attach(model, optimizer, "set", total_steps=5, seed=3)
        for images, labels in batches(5):
            plainly(model, optimizer, images.double(), labels)
    assert same(masked, compact)


def test_a_step_between_forward_and_backward_is_seen(pair):
    _, compact = pair()
    optimizer = OPTIMIZERS["momentum"](compact)
    (images, labels), *_ = batches(1)
    plainly(compact, optimizer, images, labels)
    loss = nn.functional.cross_entropy(compact(images), labels)
    optimizer.step()
    with pytest.raises(RuntimeError, match="changed between forward and backward pass"):
        loss.backward()


def test_what_would_train_something_else_is_refused(pair):
    _, compact = pair()
    named = dict(compact.named_parameters())
    both = optim.SGD([*named.values(), compact.module.sparse_values], lr=0.1)
    with pytest.raises(UsageError, match=r"has the values of 'first\.weight' twice; make it from"):
        attach(compact, both, "static")
    part = optim.SGD([parameter for name, parameter in named.items() if name != "head.weight"], lr=0.1)
    with pytest.raises(UsageError, match=r"values of 'head\.weight' are not among.*model\.named_parameters"):
        attach(compact, part, "static")
    with pytest.raises(UsageError, match="Adafactor steps by the shape of each weight"):
        attach(compact, optim.Adafactor(named.values()), "static")
    with pytest.raises(UsageError, match=r"LARS steps by the norm.*make the optimizer from model\.named_parameters"):
        attach(compact, LARS(compact.module.parameters()), "static")
    with pytest.raises(UsageError, match=r"loss reads the parameter 'head\.weight'.*take the weight from its module"):
        named["head.weight"].pow(2).sum().backward()
    named["head.weight"].requires_grad_(False)
    with pytest.raises(UsageError, match=r"'head\.weight' was frozen after the model became compact; call"):
        attach(compact, optim.SGD(named.values(), lr=0.1), "static")


def test_what_was_frozen_before_the_model_became_compact_cannot_be_trained_silently(pair):
    masked, _ = pair()
    masked.module.head.weight.requires_grad_(False)
    compact = masked.to_storage("compact")
    named = dict(compact.named_parameters())
    optimizer = optim.SGD(named.values(), lr=0.1)
    attach(compact, optimizer, "static")
    (images, labels), *_ = batches(1)
    plainly(compact, optimizer, images, labels)
    optimizer.step()
    named["head.weight"].requires_grad_(True)
    refused = r"'head\.weight' was frozen when the model became compact.*'masked'"
    with pytest.raises(UsageError, match=refused):
        optimizer.step()
    for module in (compact.module, compact.module.head):
        with pytest.raises(UsageError, match=refused):
            module.requires_grad_(True)
    with pytest.raises(UsageError, match=r"'first\.weight' is trained.*'masked'"):
        compact.module.first.requires_grad_(False)
    compact.module.first.requires_grad_(True)
    assert not compact.module.requires_grad_(False).sparse_values.requires_grad


def _split(model, chosen):
    """Returns an optimizer of the module's parameters, with other settings for those that are chosen."""
    named = dict(model.module.named_parameters())
    return optim.SGD(
        [
            {"params": [parameter for name, parameter in named.items() if chosen(name)], "weight_decay": 0.1},
            {"params": [parameter for name, parameter in named.items() if not chosen(name)]},
        ],
        lr=0.1,
    )


@pytest.mark.parametrize("chosen", [lambda name: "head" in name, lambda name: "head" not in name])
def test_groups_by_layer_without_its_weights_are_refused(pair, chosen):
    _, compact = pair()
    with pytest.raises(UsageError, match=r"head\.bias.*make its groups from model\.named_parameters\(\), or load"):
        attach(compact, _split(compact, chosen), "static")


@pytest.mark.parametrize(
    "chosen",
    [
        lambda name: "bias" in name or "norm" in name,
        lambda name: "norm" in name,
        lambda name: name == "sparse_values",
        lambda name: True,
    ],
)
def test_groups_by_kind_are_taken(pair, chosen):
    _, compact = pair()
    attach(compact, _split(compact, chosen), "static")
