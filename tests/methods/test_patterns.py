"""Training in patterns: fan-in and N:M hold at every step, and weights move by the rules of each method."""

import copy

import pytest
import torch
from torch import nn, optim

from converters.conversion import convert
from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.methods import SET, Reallocation, ReallocationSchedule, RigL, attach, make
from dsr_tool.sparse.active import Positions, gather
from dsr_tool.sparse.pattern import split_blocks, torn_layer

ALWAYS = ReallocationSchedule(((0, 1),), 10**9)
PATTERNS = {"2:4": {}, "3:4": {}, "1:8": {}, "fan-in": {"sparsity": 0.7}, "fan-in dense": {"sparsity": 0.2}}


def network(layout=torch.contiguous_format):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2), nn.Flatten(), nn.Linear(256, 24)
    ).to(memory_format=layout)


def model(pattern, layout=torch.contiguous_format, **options):
    options = {**PATTERNS[pattern], "positions": "random", "input_shape": (8, 6, 6), **options}
    return convert(network(layout), granularity=pattern.split()[0], **options)


def method(name):
    if name == "static":
        return make("static", 100)
    return SET(ALWAYS, drop_fraction=0.3) if name == "set" else RigL(ReallocationSchedule(((0, 1),), 10**6))


def steps(sparse, attached, optimizer, count, seed=0):
    """Trains, and yields after each step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        sparse(torch.randn(4, 8, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        yield attached


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("name", ["static", "set", "rigl"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_pattern_holds_after_every_step(pattern, name, storage, layout):
    sparse = model(pattern, layout)
    assert len(sparse.masks) == 3
    sparse.to_storage(storage)
    optimizer = optim.SGD(sparse.module.parameters(), lr=0.05, momentum=0.9)
    attached = attach(sparse, optimizer, method(name))
    counts, before, moved = sparse.counts, {n: m.clone() for n, m in sparse.masks.items()}, 0
    for _ in steps(sparse, attached, optimizer, 4):
        assert torn_layer(sparse.masks, sparse.granularity) is None and sparse.counts == counts
        sparse.check()
        if attached.last is not None:
            moved += len(attached.last.dropped.flat)
            assert attached.last.dropped.counts == attached.last.grown.counts
    changed = any(not torch.equal(before[n], m) for n, m in sparse.masks.items())
    assert changed == (moved > 0) == (name != "static")


def definition(weight, mask, gradient, size, share, again):
    """SRigL's rule and that of groups, written out block by block; returns the new mask."""
    outputs, inputs = weight.shape[:2]
    flat = [t.reshape(outputs, inputs, -1) for t in (weight.abs(), mask, gradient.abs())]
    count = int(share * int(mask.sum()))
    cut = flat[0][flat[1]].sort().values[count - 1] if count else -1.0
    dropped, new = flat[1] & (flat[0] <= cut), flat[1].clone()
    groups = [range(inputs)] if size is None else [range(i, i + size) for i in range(0, inputs, size)]
    for o in range(outputs):
        for group in groups:
            for taps in [range(flat[0].shape[2])] if size is None else [[t] for t in range(flat[0].shape[2])]:
                places = [(o, i, t) for i in group for t in taps]
                lost = [p for p in places if dropped[p]]
                for p in lost:
                    new[p] = False
                free = [p for p in places if not flat[1][p] or (again and dropped[p])]
                for p in sorted(free, key=lambda p: -flat[2][p])[: len(lost)]:
                    new[p] = True
    return new.reshape(weight.shape)


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "fan-in", "fan-in dense"])
def test_rigl_prunes_the_smallest_of_a_layer_and_grows_by_gradient_in_the_block(pattern, storage):
    sparse = model(pattern)
    dense = copy.deepcopy(sparse.module)
    masks = {name: mask.clone() for name, mask in sparse.masks.items()}
    sparse.to_storage(storage)
    optimizer = optim.SGD(sparse.module.parameters(), lr=0.0)
    attached = attach(sparse, optimizer, RigL(ReallocationSchedule(((0, 1),), 10**6), drop_fraction=0.3))
    for _ in steps(sparse, attached, optimizer, 1):
        pass
    dense(torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    size = sparse.granularity.group or None
    for name, mask in masks.items():
        weight = dense.get_parameter(name)
        share = attached.method.fraction(1)
        expected = definition(weight.detach(), mask, weight.grad, size, share, again=True)
        assert torch.equal(sparse.masks[name], expected) and not torch.equal(expected, mask)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_set_never_grows_what_it_prunes_and_reaches_every_free_position(pattern):
    sparse = model(pattern)
    weights, generator = gather(sparse), torch.Generator().manual_seed(0)
    hits = torch.zeros(sum(weights.sizes))
    for step in range(1, 100):
        moved = SET(ALWAYS, drop_fraction=0.4).update(weights, step, generator)
        assert not set(moved.grown.flat.tolist()) & set(weights.positions.flat.tolist())
        hits[moved.grown.flat] += 1
    free = torch.ones(len(hits), dtype=torch.bool)
    free[weights.positions.flat] = False
    assert not hits[~free].any()
    pieces = zip(hits.split(weights.sizes), free.split(weights.sizes), weights.blocks, strict=True)
    for layer, open_, blocks in pieces:
        rows, places = split_blocks(layer, blocks), split_blocks(open_, blocks)
        moving = rows.any(1)  # the same blocks lose weights each time, since nothing is trained
        assert moving.any() and (rows[moving][places[moving]] > 0).float().mean() > 0.99


def test_gradients_of_nan_still_give_every_block_what_it_lost():
    sparse = model("2:4")
    weights = gather(sparse)
    gradients = [torch.full((size,), torch.nan) for size in weights.sizes]
    object.__setattr__(weights, "gradients", gradients)
    moved = RigL(ReallocationSchedule(((0, 1),), 10**6)).update(weights, 1, torch.Generator())
    assert moved.dropped.counts == moved.grown.counts


@pytest.mark.parametrize("pattern", ["2:4", "fan-in"])
def test_other_methods_are_refused_by_name_with_those_that_work(pattern):
    sparse = model(pattern)
    optimizer = optim.SGD(sparse.module.parameters(), lr=0.1, momentum=0.9)
    for name, options in (
        ("dsr", {}),
        ("deepr", {}),
        ("snfs", {}),
        ("neuron-set", {}),
        ("gmp", {"final_sparsity": 0.9}),
        ("granet", {"final_sparsity": 0.9}),
        ("dst", {"final_sparsity": 0.9}),
        ("tied", {"final_sparsity": 0.9}),
    ):
        says = f"method {name} does not keep the pattern of --granularity {pattern}.*train it with static, set or rigl"
        with pytest.raises(UsageError, match=says):
            attach(sparse, optimizer, make(name, 1000, **options))


class Careless(SET):
    """Prunes and grows single weights wherever they are."""

    def update(self, weights, step, generator):  # noqa: ARG002 - the interface has them
        lost = weights.positions.flat[:1]
        free = torch.ones(sum(weights.sizes), dtype=torch.bool)
        free[weights.positions.flat] = False
        return Reallocation(Positions.of(lost, weights.sizes), Positions.of(free.nonzero()[-1], weights.sizes))


def test_a_method_of_ones_own_that_tears_the_pattern_is_refused():
    sparse = convert(nn.Sequential(nn.Linear(64, 32)), granularity="2:4", positions="random")
    optimizer = optim.SGD(sparse.module.parameters(), lr=0.1)
    attach(sparse, optimizer, Careless(ALWAYS))
    sparse(torch.randn(2, 64)).sum().backward()
    with pytest.raises(CheckFailed, match="changes the number of active weights of an output or a group in layer 0"):
        optimizer.step()
