"""In a loop of one's own, masks are kept whatever the loop does, or a sentence says why they cannot be."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn, optim

from converters.conversion import convert
from dsr_tool import attach
from dsr_tool.errors import CheckFailed, DsrError, UsageError
from exporters.export import export

STORAGES = ("masked", "compact")
FOLLOWING = ("dsr", "set", "rigl", "gmp", "static")
REMEMBERING = ("deepr", "neuron-set")
OPTIONS = {"gmp": {"final_sparsity": 0.9}, "dsr": {"threshold": "auto", "target": 0.2}}


def attached(one, optimizer, method, steps=40, **more):
    options = {} if method == "static" else {"every": 2}
    return attach(one.model, optimizer, method, total_steps=steps, **options, **OPTIONS.get(method, {}), **more)


def masks_of(one):
    return {name: mask.clone() for name, mask in one.model.masks.items()}


def moved(one, before):
    return {name for name, mask in one.model.masks.items() if not torch.equal(mask, before[name])}


@pytest.mark.parametrize("method", FOLLOWING)
def test_layers_that_are_unfrozen_later_stay_in_their_masks_and_join_the_method(loop, method):
    one = loop(freeze=("0", "2"), sparsity=0 if method == "gmp" else 0.8)
    optimizer = optim.SGD(one.net.parameters(), 0.1, momentum=0.9)
    at_work = attached(one, optimizer, method)
    for _ in range(3):
        one.step(optimizer)
    assert at_work.names == ["6.weight", "8.weight"]
    before = masks_of(one)
    for parameter in one.net.parameters():
        parameter.requires_grad_(True)
    for _ in range(12):
        one.step(optimizer)
        assert not one.outside()
    assert at_work.names == list(one.model.masks)
    assert ("2.weight" in moved(one, before)) == (method != "static")


@pytest.mark.parametrize("method", FOLLOWING)
def test_layers_that_are_frozen_later_change_no_more(loop, method):
    one = loop(sparsity=0 if method == "gmp" else 0.8)
    optimizer = optim.SGD(one.net.parameters(), 0.1)
    at_work = attached(one, optimizer, method)
    for _ in range(4):
        one.step(optimizer)
    one.net[2].weight.requires_grad_(False)
    weight, before = one.net[2].weight.detach().clone(), masks_of(one)
    active = one.model.active_weights
    for _ in range(12):
        one.step(optimizer)
        assert not one.outside()
    assert torch.equal(weight, one.net[2].weight) and "2.weight" not in moved(one, before)
    assert at_work.names == ["0.weight", "6.weight", "8.weight"]
    assert (one.model.active_weights == active) == (method != "gmp")


@pytest.mark.parametrize("method", REMEMBERING)
def test_methods_that_remember_layers_refuse_other_ones(loop, method):
    one = loop()
    optimizer = optim.SGD(one.net.parameters(), 0.01)
    first = attached(one, optimizer, method)
    one.step(optimizer)
    one.net[2].weight.requires_grad_(False)
    with pytest.raises(UsageError, match=r"'2.weight' was frozen after method .* call remove\(\)"):
        one.step(optimizer)
    first.remove()
    attached(one, optimizer, method)
    one.step(optimizer)
    one.net[2].weight.requires_grad_(True)
    with pytest.raises(UsageError, match=r"'2.weight' is trained only since method"):
        one.step(optimizer)
    assert not one.outside()


def test_methods_behind_the_masks_refuse_other_layers(loop):
    one = loop(sparsity=0)
    optimizer = optim.SGD(one.net.parameters(), 0.01)
    attached(one, optimizer, "dst", final_sparsity=0.9)
    one.step(optimizer)
    one.net[2].weight.requires_grad_(False)
    with pytest.raises(UsageError, match="others are frozen now"):
        one.step(optimizer)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_group_that_is_added_later_stays_in_its_masks(loop, frozen):
    one = loop(freeze=("0", "2") if frozen else ())
    head = [parameter for layer in one.net[6:] for parameter in layer.parameters()]
    optimizer = optim.SGD(head, 0.1, momentum=0.9)
    at_work = attached(one, optimizer, "dsr")
    one.step(optimizer)
    body = [parameter for layer in one.net[:3] for parameter in layer.parameters()]
    for parameter in body:
        parameter.requires_grad_(True)
    optimizer.add_param_group({"params": body, "lr": 0.01})
    before = masks_of(one)
    for _ in range(10):
        one.step(optimizer)
        assert not one.outside()
    assert at_work.names == list(one.model.masks)
    assert moved(one, before)


def test_each_optimizer_keeps_its_own_weights(loop):
    one = loop()
    body = optim.SGD(one.net[:3].parameters(), 0.1, momentum=0.9)
    head = optim.AdamW(one.net[6:].parameters(), 0.01)
    first = attached(one, body, "set")
    second = attached(one, head, "dsr")
    assert (first.names, second.names) == (["0.weight", "2.weight"], ["6.weight", "8.weight"])
    active, before = one.model.counts, masks_of(one)
    for _ in range(10):
        one.step(body, head)
        assert not one.outside()
    counts = one.model.counts
    assert moved(one, before) >= {"2.weight", "6.weight"}
    assert [counts[name] for name in first.names] == [active[name] for name in first.names]
    assert sum(counts[name] for name in second.names) == sum(active[name] for name in second.names)


def test_an_optimizer_without_a_method_may_not_step_sparse_weights_of_another(loop):
    one = loop()
    optimizer = optim.SGD(one.net.parameters(), 0.1)
    attached(one, optimizer, "dsr")
    for kind in (optim.SGD, lambda p, lr: optim.Adam(p, lr, fused=True)):
        with pytest.raises(UsageError, match=r"steps '0.weight', whose mask a method keeps in the steps of another"):
            one.step(kind(one.net.parameters(), 0.1))
    one.step(optimizer)
    assert not one.outside()


@pytest.mark.parametrize("storage", STORAGES)
def test_a_weight_in_two_optimizers_is_refused_until_the_first_is_gone(loop, storage):
    one = loop(storage)
    optimizer = optim.SGD(one.net.parameters(), 0.1)
    at_work = attached(one, optimizer, "dsr")
    other = optim.Adam(one.net.parameters())
    with pytest.raises(UsageError, match="is in two optimizers"):
        attached(one, other, "dsr")
    at_work.remove()
    second = attached(one, other, "dsr")
    one.step(other)
    assert second.step == 1 and at_work.step == 0
    # Whoever forgets an optimizer need not have called remove().
    del second, other
    third = optim.SGD(one.net.parameters(), 0.1)
    assert attached(one, third, "dsr").names


def test_two_optimizers_are_refused_also_if_all_sparse_layers_are_frozen(loop):
    one = loop("compact", freeze=("0", "2", "6", "8"))
    first, second = (optim.SGD(one.net.parameters(), 0.1) for _ in range(2))
    attached(one, first, "static")
    with pytest.raises(UsageError, match="weight '0.weight' is in two optimizers"):
        attached(one, second, "static")


def test_a_weight_that_comes_to_a_second_optimizer_later_is_refused(loop):
    one = loop()
    body, head = optim.SGD(one.net[:3].parameters(), 0.1), optim.SGD(one.net[6:].parameters(), 0.1)
    attached(one, body, "set"), attached(one, head, "set")
    head.add_param_group({"params": [one.net[2].weight]})
    with pytest.raises(UsageError, match="steps '2.weight', whose mask a method keeps"):
        one.step(head)


def test_a_weight_that_left_its_optimizer_is_free_for_another(loop):
    one = loop()
    body = optim.SGD([{"params": one.net[:3].parameters()}, {"params": one.net[6:].parameters()}], 0.1)
    attached(one, body, "set")
    del body.param_groups[1]
    one.step(body)
    head = optim.SGD(one.net[6:].parameters(), 0.1)
    second = attached(one, head, "set")
    one.step(body, head)
    assert second.names == ["6.weight", "8.weight"] and not one.outside()


def test_a_trainable_weight_that_nobody_keeps_is_checked(loop):
    one = loop()
    body, head = optim.SGD(one.net[:3].parameters(), 0.1), optim.SGD(one.net[6:].parameters(), 0.1)
    attached(one, body, "set")
    one.step(body, head)  # nothing is attached to the second one
    with pytest.raises(CheckFailed, match=r"weight '[68].weight' has [\d,]+ non-zero values outside its mask"):
        one.step(body)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", ["dsr", "rigl", "static"])
@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW, optim.RMSprop])
def test_a_closure_gives_the_same_bits(loop, storage, method, kind):
    ends = []
    for inside in (False, True):
        one = loop(storage)
        optimizer = kind(one.net.parameters(), 0.01)
        at_work = attached(one, optimizer, method)
        for _ in range(9):
            if inside:
                optimizer.step(closure=one.backward)
            else:
                one.step(optimizer)
            assert not one.outside()
        assert at_work.step == 9
        ends.append(one.net.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", ["dsr", "rigl", "static"])
def test_lbfgs_stays_inside_the_masks_in_every_evaluation_and_learns(loop, storage, method):
    one = loop(storage)
    optimizer = optim.LBFGS(one.net.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
    at_work = attached(one, optimizer, method)
    before, first = masks_of(one), one.loss().item()

    def closure():
        assert not one.outside()
        return one.backward()

    for _ in range(8):
        optimizer.step(closure)
    assert one.loss().item() < 0.95 * first
    assert not one.outside() and at_work.step == 8
    assert bool(moved(one, before)) == (method != "static")


def test_lbfgs_does_the_same_in_both_storages(loop):
    losses = []
    for storage in STORAGES:
        one = loop(storage)
        # Small steps: with large ones the masks depended on rounding, and thus on the number of threads.
        optimizer = optim.LBFGS(one.net.parameters(), lr=0.05, max_iter=4)
        attached(one, optimizer, "set")
        losses.append([optimizer.step(one.backward).item() for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


class Sam(optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021): a step to a worse point, then one from its gradient."""

    def __init__(self, params, base, rho=0.5, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self):
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[parameter]["before"] = parameter.data.clone()
            parameter.add_(parameter.grad, alpha=0.5)

    @torch.no_grad()
    def second_step(self):
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            parameter.data = self.state[parameter]["before"]
        self.base.step()

    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class SamByHand(optim.SGD):
    """The same without another optimizer inside."""

    first_step = Sam.first_step

    @torch.no_grad()
    def second_step(self):
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            parameter.data = self.state[parameter]["before"]
        self.step()


@pytest.mark.parametrize("method", ["dsr", "static"])
@pytest.mark.parametrize("kind", ["halves", "closure", "by hand"])
def test_steps_in_two_halves_stay_inside_the_masks_between_them(loop, method, kind):
    one = loop()
    optimizer = (
        SamByHand(one.net.parameters(), 0.1) if kind == "by hand" else Sam(one.net.parameters(), optim.SGD, lr=0.1)
    )
    at_work = attached(one, optimizer, method)
    for _ in range(6):
        one.backward()
        if kind == "closure":

            def closure():
                assert not one.outside()
                return one.backward()

            optimizer.step(closure)
        else:
            optimizer.first_step()
            assert not one.outside()
            one.backward()
            optimizer.second_step()
        assert not one.outside()
    assert at_work.step == 6
    with pytest.raises(UsageError, match="attach to the outermost one"):
        one = loop()
        sam = Sam(one.net.parameters(), optim.SGD, lr=0.1)
        attached(one, sam.base, method)
        one.backward()
        sam.step(one.backward)


class Lookahead(optim.Optimizer):
    """Averages with slow weights every second step (Zhang et al. 2019)."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for slow, p in zip(self.slow, (p for g in self.param_groups for p in g["params"]), strict=True):
                p.lerp_(slow, 0.5)
                slow.copy_(p)


class Noisy(optim.SGD):
    """A subclass that writes to weights after the step of its base."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        return loss


class Bare:
    """A wrapper that is no torch optimizer, as training frameworks have them."""

    def __init__(self, optimizer):
        self.inner = optimizer

    def step(self):
        self.inner.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Lookahead(optim.SGD(p, 0.1, momentum=0.9)),
        lambda p: Noisy(p, 0.1),
        lambda p: Bare(optim.Adam(p, 1e-3)),
    ],
)
def test_optimizers_around_others_take_one_step_each(loop, make):
    one = loop()
    optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)  # torch gives hooks to the step of the base class too
    optimizer = make(one.net.parameters())
    at_work = attached(one, optimizer, "dsr")
    for _ in range(6):
        one.step(optimizer)
        assert not one.outside()
    assert at_work.step == 6


@pytest.mark.parametrize("by_layer", [False, True])
def test_copies_of_weights_that_cannot_move_are_refused_in_compact_storage(loop, by_layer):
    one = loop("compact")
    parameters = [p for _, p in one.model.named_parameters()] if by_layer else one.net.parameters()
    with pytest.raises(UsageError, match="Lookahead keeps copies of weights outside its state.*storage='masked'"):
        attached(one, Lookahead(optim.SGD(parameters, 0.1)), "set")


@pytest.mark.parametrize("method", ["deepr", "dst"])
def test_methods_read_the_settings_of_an_optimizer_inside_a_wrapper_without_any(loop, method):
    ends = []
    for wrap in (Bare, lambda optimizer: optimizer):
        one = loop(sparsity=0 if method == "dst" else 0.8)
        optimizer = wrap(optim.SGD(one.net.parameters(), 0.1))
        attached(one, optimizer, method, **({"final_sparsity": 0.9} if method == "dst" else {}))
        for _ in range(4):
            one.step(optimizer)
        ends.append(one.net.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_what_is_no_optimizer_is_refused(loop):
    one = loop()
    several = Bare([optim.SGD(one.net[:3].parameters(), 0.1), optim.SGD(one.net[6:].parameters(), 0.1)])
    with pytest.raises(UsageError, match="Bare is no torch optimizer.*attach to each optimizer inside it"):
        attached(one, several, "static")


def test_a_step_that_failed_leaves_no_trace(loop):
    one = loop()
    optimizer = optim.SGD(one.net.parameters(), 0.1)
    at_work = attached(one, optimizer, "dsr")

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    one.step(optimizer)
    assert at_work.step == 1 and not one.outside()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", ["dsr", "rigl"])
def test_a_fused_step_that_a_scaler_leaves_out_does_not_count(loop, storage, method):
    one = loop(storage)
    optimizer = optim.SGD(one.net.parameters(), 0.01, fused=True)
    at_work = attached(one, optimizer, method)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    counts, before = [], masks_of(one)
    for number in range(7):
        one.net.zero_grad()
        scaler.scale(one.loss()).backward()
        if number in (1, 2):
            one.net[8].bias.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        counts.append(at_work.step)
        if number == 2:
            assert not moved(one, before)
        assert all(torch.isfinite(value).all() for value in one.net.parameters())
        assert not one.outside()
    assert counts == [1, 1, 1, 2, 3, 4, 5]
    assert moved(one, before)


def test_smoothed_gradients_are_free_of_the_scale_of_a_fused_step(loop):
    """The scale changes with time, so a sum of scaled gradients would weigh the steps by it."""
    smoothed = []
    for scale in (None, 64.0):
        one = loop()
        optimizer = optim.SGD(one.net.parameters(), 2.0**-7, fused=True)
        at_work = attached(one, optimizer, "snfs")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=2, enabled=scale is not None)
        for number in range(7):
            one.net.zero_grad()
            scaler.scale(one.loss()).backward()
            if scale and number == 1:
                one.net[8].bias.grad[0] = torch.inf
            if scale or number != 1:
                scaler.step(optimizer)
            scaler.update()
        assert at_work.step == 6
        smoothed.append([*at_work.method.state_dict()["smoothed"], *one.model.masks.values()])
    # Scales are powers of two, so nothing is rounded in another way.
    assert all(torch.equal(plain, scaled) for plain, scaled in zip(*smoothed, strict=True))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", ["dsr", "set"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_average_stays_inside_masks_that_move(loop, storage, method, wrapped, tmp_path):
    one = loop(storage)
    optimizer = optim.SGD(one.net.parameters(), 0.1, momentum=0.9)
    at_work = attached(one, optimizer, method)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    copied = torch.optim.swa_utils.AveragedModel(one.net, multi_avg_fn=ema) if wrapped else copy.deepcopy(one.net)
    average = at_work.average(copied)
    dense = {name: weight.detach().clone() for name, weight in one.model.weights.items()}
    for _ in range(9):
        one.step(optimizer)
        if wrapped:
            copied.update_parameters(one.net)
        else:
            with torch.no_grad():
                for mine, theirs in zip(copied.parameters(), one.net.parameters(), strict=True):
                    mine.lerp_(theirs, 0.2)
        for name, weight in one.model.weights.items():
            # The average by definition, with what is pruned set to zero for good.
            first = wrapped and at_work.step == 1
            dense[name] = (weight.detach() if first else dense[name].lerp(weight.detach(), 0.2)) * one.model.masks[name]
            torch.testing.assert_close(average.weights[name].detach(), dense[name])
            assert torch.equal(average.masks[name], one.model.masks[name])
    average.check()
    export(average, tmp_path / "ema.dsr")
    with pytest.raises(UsageError, match="this is the network itself"):
        at_work.average(one.net)
    with pytest.raises(UsageError, match="have other names or shapes"):
        at_work.average(nn.Linear(3, 3))


@pytest.mark.parametrize("wrap", [torch.compile, lambda net: torch.optim.swa_utils.AveragedModel(torch.compile(net))])
def test_an_average_may_be_compiled(loop, wrap):
    one = loop()
    at_work = attached(one, optim.SGD(one.net.parameters(), 0.1), "dsr")
    assert at_work.average(wrap(copy.deepcopy(one.net))).weights.keys() == one.model.weights.keys()


def test_an_average_follows_every_method_that_is_attached_and_those_to_come(loop):
    one = loop()
    body, head = optim.SGD(one.net[:3].parameters(), 0.1), optim.SGD(one.net[6:].parameters(), 0.1)
    first, second = attached(one, body, "set"), attached(one, head, "dsr")
    average = first.average(copy.deepcopy(one.net))
    for number in range(9):
        if number == 4:  # as after layers were frozen
            second.remove()
            attached(one, head, "set")
        one.step(body, head)
        for mine, theirs in zip(average.module.parameters(), one.net.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.2)
        average.check()
        assert all(torch.equal(average.masks[name], mask) for name, mask in one.model.masks.items())


def saved(one, optimizer, at_work):
    return copy.deepcopy({"net": one.net.state_dict(), "opt": optimizer.state_dict(), "method": at_work.state_dict()})


def begun(loop, storage, method, layers=False):
    one = loop(storage, sparsity=0 if method == "gmp" else 0.8)
    parameters = one.net.parameters() if not layers else [p for _, p in one.model.named_parameters()]
    optimizer = optim.SGD(parameters, 0.05, momentum=0.9)
    return one, optimizer, attached(one, optimizer, method)


@pytest.mark.parametrize("method", ["dsr", "set", "rigl", "gmp", "deepr", "neuron-set", "static"])
@pytest.mark.parametrize(
    ("storage", "order"),
    [
        *(("masked", order) for order in ("net opt method", "method opt net", "opt method net", "net method opt")),
        *(("compact", order) for order in ("opt method net", "method net opt", "method opt net")),
    ],
)
def test_a_loop_resumes_with_the_same_bits_in_any_order(loop, storage, order, method, tmp_path):
    one, optimizer, at_work = begun(loop, storage, method)
    before = masks_of(one)
    for _ in range(7):
        one.step(optimizer)
    torch.save(saved(one, optimizer, at_work), tmp_path / "c.pt")
    assert bool(moved(one, before)) == (method != "static")
    gone_on, its, again = begun(loop, storage, method)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    for part in order.split():
        {"net": gone_on.net, "opt": its, "method": again}[part].load_state_dict(state[part])
    assert not gone_on.outside()
    for _ in range(5):
        one.step(optimizer)
        gone_on.step(its)
    assert at_work.step == again.step == 12
    assert all(torch.equal(mask, gone_on.model.masks[name]) for name, mask in one.model.masks.items())
    ends = gone_on.net.state_dict()
    assert all(torch.equal(value, ends[name]) for name, value in one.net.state_dict().items())


@pytest.mark.parametrize("order", ["opt method net", "method opt net"])
def test_settings_by_layer_resume_in_compact_storage(loop, order):
    one, optimizer, at_work = begun(loop, "compact", "dsr", layers=True)
    for _ in range(7):
        one.step(optimizer)
    state = saved(one, optimizer, at_work)
    gone_on, its, again = begun(loop, "compact", "dsr", layers=True)
    for part in order.split():
        {"net": gone_on.net, "opt": its, "method": again}[part].load_state_dict(state[part])
    for _ in range(5):
        one.step(optimizer)
        gone_on.step(its)
    ends = gone_on.net.state_dict()
    assert all(torch.equal(value, ends[name]) for name, value in one.net.state_dict().items())


def test_a_state_is_taken_over_by_the_other_storage(loop):
    one, optimizer, at_work = begun(loop, "masked", "dsr")
    for _ in range(7):
        one.step(optimizer)
    gone_on, its, again = begun(loop, "compact", "dsr")
    again.load_state_dict(at_work.state_dict())
    gone_on.net.load_state_dict(one.net.state_dict())
    assert all(torch.equal(mask, gone_on.model.masks[name]) for name, mask in one.model.masks.items())
    gone_on.step(its)


@pytest.mark.parametrize("when", ["before attach", "after attach", "while training"])
def test_weights_without_their_masks_are_refused_and_nothing_is_lost(loop, when):
    other, one = loop(seed=5, positions="magnitude"), loop(positions="magnitude")
    optimizer = optim.SGD(one.net.parameters(), 0.1)
    if when == "before attach":
        one.net.load_state_dict(other.net.state_dict())
    attached(one, optimizer, "dsr")
    if when == "while training":
        for _ in range(3):
            one.step(optimizer)
    if when != "before attach":
        one.net.load_state_dict(other.net.state_dict())
    for _ in range(2):
        with pytest.raises(CheckFailed, match=r"non-zero values outside its mask: .*load.*apply_masks\(\)"):
            one.step(optimizer)
        assert torch.equal(one.net[0].weight, other.net[0].weight)
    one.model.apply_masks()
    one.step(optimizer)


def test_compact_storage_says_which_state_comes_first(loop):
    one, optimizer, at_work = begun(loop, "compact", "dsr")
    for _ in range(5):
        one.step(optimizer)
    gone_on, _, again = begun(loop, "compact", "dsr")
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) of what attach returned first"):
        gone_on.net.load_state_dict(one.net.state_dict())
    again.load_state_dict(at_work.state_dict())
    gone_on.net.load_state_dict(one.net.state_dict())


def test_states_of_another_model_or_method_are_refused(loop):
    one, _, at_work = begun(loop, "masked", "dsr")
    small = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50))
    model = convert(small, sparsity=0.5, keep_dense=[])
    other = attach(model, optim.SGD(small.parameters(), 0.1), "dsr", total_steps=10)
    with pytest.raises(UsageError, match="the state is from another model"):
        other.load_state_dict(at_work.state_dict())
    before = masks_of(one)
    _, _, rigl = begun(loop, "masked", "rigl")
    with pytest.raises(UsageError, match="the state is from method rigl, and method dsr is attached"):
        at_work.load_state_dict(rigl.state_dict())
    assert not moved(one, before)
    assert "masks" not in at_work.state_dict(masks=False)


def test_an_average_resumes(loop):
    one, optimizer, at_work = begun(loop, "masked", "dsr")
    copied = copy.deepcopy(one.net)
    at_work.average(copied)
    for _ in range(5):
        one.step(optimizer)
    gone_on, its, again = begun(loop, "masked", "dsr")
    other = copy.deepcopy(gone_on.net)
    average = again.average(other)
    other.load_state_dict(copied.state_dict())
    again.load_state_dict(at_work.state_dict())
    gone_on.net.load_state_dict(one.net.state_dict())
    average.check()
    gone_on.step(its)
    average.check()


def test_replaced_parameters_are_refused(loop):
    one, optimizer, _ = begun(loop, "masked", "dsr")
    one.net.load_state_dict(one.net.state_dict(), assign=True)
    one.backward()
    with pytest.raises(UsageError, match="no longer the parameter that it was"):
        optimizer.step()
    one, optimizer, _ = begun(loop, "masked", "dsr")
    nn.utils.parametrizations.weight_norm(one.net[6])
    with pytest.raises(UsageError, match="'6.weight' is no longer the parameter"):
        one.step(optimizer)
    one, optimizer, _ = begun(loop, "masked", "dsr")
    one.model.to_storage("compact")
    with pytest.raises(DsrError, match="attach"):
        optimizer.step()


def test_an_optimizer_of_two_networks_keeps_the_masks_of_both(loop):
    one, two = loop(), loop(seed=1)
    optimizer = optim.Adam([*one.net.parameters(), *two.net.parameters()], 1e-2)
    both = attached(one, optimizer, "dsr"), attached(two, optimizer, "set")
    for _ in range(6):
        one.backward()
        two.backward()
        optimizer.step()
        assert not one.outside() and not two.outside()
    assert [each.step for each in both] == [6, 6]


def test_a_forgotten_network_is_freed(loop):
    one, optimizer, at_work = begun(loop, "masked", "dsr")
    one.step(optimizer)
    gone = []
    weakref.finalize(at_work._keeper, gone.append, 1)
    del one, optimizer, at_work
    gc.collect()
    assert gone
