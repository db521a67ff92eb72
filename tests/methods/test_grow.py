import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.methods.grow import at_random, distinct
from dsr_tool.sparse.active import ActiveWeights, Positions

rooms_and_counts = st.lists(
    st.integers(0, 60).flatmap(lambda room: st.tuples(st.just(room), st.integers(0, room))), min_size=1, max_size=8
)


def network(sizes, counts, seed):
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *sizes])
    flat = [np.sort(rng.permutation(n)[:c]) + s for n, c, s in zip(sizes, counts, starts[:-1], strict=True)]
    positions = torch.from_numpy(np.concatenate(flat))
    values = torch.from_numpy(rng.normal(size=len(positions)).astype(np.float32))
    return ActiveWeights(Positions(tuple(sizes), tuple(counts), positions), values)


@given(rooms_and_counts, st.integers(0, 10**6))
def test_draws_are_distinct_exact_and_in_their_segment(layers, seed):
    rooms, counts = [room for room, _ in layers], [count for _, count in layers]
    drawn = distinct(counts, rooms, torch.Generator().manual_seed(seed))
    edges = np.cumsum([0, *rooms])
    assert (torch.diff(drawn) > 0).all()
    assert np.histogram(drawn.numpy(), bins=np.unique(edges))[0].sum() == sum(counts)
    per_layer = [int(((drawn >= a) & (drawn < b)).sum()) for a, b in itertools.pairwise(edges)]
    assert per_layer == counts


@given(rooms_and_counts, st.data())
def test_growth_takes_free_positions_only(layers, data):
    sizes, counts = [size for size, _ in layers], [count for _, count in layers]
    weights = network(sizes, counts, 0)
    grow = [data.draw(st.integers(0, free)) for free in weights.free]
    grown = at_random(weights, grow, torch.Generator().manual_seed(1))
    assert Positions.of(grown.flat, sizes).counts == tuple(grow)
    assert not np.intersect1d(grown.flat.numpy(), weights.positions.flat.numpy()).size
    assert np.unique(grown.flat.numpy()).size == sum(grow)


def test_every_free_position_is_equally_likely():
    weights = network([20, 10], [8, 7], 3)
    generator = torch.Generator().manual_seed(0)
    hits = np.zeros(30)
    rounds = 4000
    for _ in range(rounds):
        hits[at_random(weights, [5, 1], generator).flat.numpy()] += 1
    free = np.ones(30, bool)
    free[weights.positions.flat.numpy()] = False
    expected = np.where(np.arange(30) < 20, 5 / 12, 1 / 3) * free * rounds
    spread = np.sqrt(np.maximum(expected, 1))
    assert np.abs(hits - expected).max() < 5 * spread.max()
    assert (hits[~free] == 0).all()


def test_the_same_seed_grows_the_same():
    weights = network([1000, 500], [100, 50], 0)
    a, b = (at_random(weights, [30, 20], torch.Generator().manual_seed(7)).flat for _ in range(2))
    assert torch.equal(a, b)
