"""Methods compared with the authors' published code, written out layer by layer."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

from converters.conversion import convert
from dsr_tool.methods import DSR, SET, ReallocationSchedule, attach, make
from dsr_tool.sparse.active import ActiveWeights, Positions

ALWAYS = ReallocationSchedule(((0, 1),), 10**9)

layers = st.lists(
    st.integers(20, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(2, n // 2))), min_size=1, max_size=6
)


def network(layers, seed):
    rng = np.random.default_rng(seed)
    sizes, counts = [n for n, _ in layers], [c for _, c in layers]
    starts = np.cumsum([0, *sizes])
    flat = [np.sort(rng.permutation(n)[:c]) + s for (n, c), s in zip(layers, starts[:-1], strict=True)]
    values = [rng.normal(size=c) * rng.uniform(0.5, 2) for c in counts]
    return ActiveWeights(
        Positions(tuple(sizes), tuple(counts), torch.from_numpy(np.concatenate(flat))),
        torch.from_numpy(np.concatenate(values).astype(np.float32)),
    )


def pruned_by_threshold(weights, threshold):
    """`prune_threshold` of Mostafa & Wang's code for each layer; a layer that would be emptied keeps its first."""
    gone = []
    for positions, values in zip(weights.positions.per_layer(), weights.values.split(weights.counts), strict=True):
        small = positions[values.abs() < threshold].tolist()
        gone.append(small[1:] if len(small) == len(positions) else small)
    return gone


def next_threshold(threshold, pruned, target):
    """The end of a reallocation in their `main.py`."""
    if pruned > 1.1 * target:
        return threshold / 2
    return threshold * 2 if pruned < 0.9 * target else threshold


@settings(max_examples=200)
@given(layers, st.integers(0, 10**6), st.floats(0.01, 3.0), st.integers(1, 300))
def test_dsr_prunes_grows_and_adapts_as_the_authors_code(layers, seed, threshold, target):
    weights = network(layers, seed)
    gone = pruned_by_threshold(weights, threshold)
    pruned = sum(map(len, gone))
    survivors = [had - len(lost) for had, lost in zip(weights.counts, gone, strict=True)]
    shares = [pruned * left / sum(survivors) for left in survivors]
    # In a full layer they try again at random, and ours pours over; that is a test of its own.
    assume(all(share <= room - 1 for share, room in zip(shares, weights.free, strict=True)))
    method = DSR(ALWAYS, target=target, threshold=threshold)
    moved = method.update(weights, 1, torch.Generator().manual_seed(seed))
    assert [len(lost) for lost in gone] == list(moved.dropped.counts)
    emptied = 0
    for mine, theirs, values in zip(moved.dropped.per_layer(), gone, weights.values.split(weights.counts), strict=True):
        everything = bool((values.abs() < threshold).all())
        emptied += everything
        assert everything or mine.tolist() == theirs
    assert moved.grown.counts == pytest.approx(shares, abs=1) and sum(moved.grown.counts) == pruned
    assert not np.isin(moved.grown.flat, weights.positions.flat).any()
    # Ours counts the weight that an emptied layer keeps among those below the threshold.
    assert method.threshold in {next_threshold(threshold, pruned + kept, target) for kept in (0, emptied)} | (
        {threshold} if pruned + emptied == sum(weights.counts) else set()
    )


@settings(max_examples=50)
@given(layers, st.integers(0, 10**6), st.floats(0.02, 0.9))
def test_set_prunes_what_the_comparison_prunes(layers, seed, fraction):
    """`prune_small_connections` of Mostafa & Wang's code, which rounds the number down and adds one."""
    weights = network(layers, seed)
    moved = SET(ALWAYS, drop_fraction=fraction).update(weights, 1, torch.Generator())
    parts = zip(weights.positions.per_layer(), weights.values.split(weights.counts), strict=True)
    for index, ((positions, values), mine) in enumerate(zip(parts, moved.dropped.per_layer(), strict=True)):
        cutoff = int(fraction * len(values)) + 1
        theirs = positions[values.abs().argsort()[:cutoff]]
        # Theirs also empties layers, and grows where it has just pruned if a layer is nearly full.
        assert len(mine) == min(cutoff, len(values) - 1, weights.sizes[index] - len(values))
        assert np.isin(mine, theirs).all()


class Sorts(TorchDispatchMode):
    """Notes the most entries that any sort or selection sees, and any draw of a permutation makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("sort", "argsort", "topk", "kthvalue", "_unique2", "unique_dim", "msort", "randperm"):
            size = args[0].numel() if isinstance(args[0], torch.Tensor) else args[0]
            self.largest = max(self.largest, size)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["dsr", "set", "deepr"])
def test_no_update_sorts_all_positions(name):
    """Pruned weights may be sorted, and active ones selected from; never all positions, nor all free ones."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 500), nn.ReLU(), nn.Linear(500, 400))
    model = convert(net, sparsity=0.9, positions="random")
    optimizer = optim.SGD(net.parameters(), 0.1)
    options = {"deepr": {"temperature": 1e-3}}.get(name, {})
    attached = attach(model, optimizer, make(name, 100, every=1, **options))
    most, moved = 0, 0
    for _ in range(20):
        optimizer.zero_grad()
        net(torch.randn(4, 300)).square().mean().backward()
        with Sorts() as seen:
            optimizer.step()
        moved = max(moved, len(attached.last.grown.flat))
        most = max(most, seen.largest)
    assert 1000 < moved < 10_000
    assert 0 < most <= max(1.5 * moved, *(int(mask.sum()) for mask in model.masks.values()))
