"""Conversion to fan-in and N:M: masks in the pattern, exact counts, and options that contradict it."""

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn

from converters.archive_size import archive_bytes
from converters.budgets import trim
from converters.conversion import convert
from converters.loading import load
from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.sparse.sparsify import Sparsifier
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig


def network(seed=0, *, layout=torch.contiguous_format):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 24, 3, groups=2),
        nn.ConvTranspose2d(24, 8, 2),
        nn.Flatten(),
        nn.Linear(8 * 25, 20),
        nn.Linear(20, 12),
    ).to(memory_format=layout)


def converted(seed=0, layout=torch.contiguous_format, **options):
    return convert(
        network(seed, layout=layout), **{"input_shape": (3, 6, 6), "sparsify_patterns": ["[145]"], **options}
    )


def groups_of(mask, size):
    """Returns the active entries of each group of input channels, (outputs, groups, taps), by definition."""
    flat = mask.contiguous().reshape(mask.shape[0], mask.shape[1], -1)
    return torch.stack([flat[:, i : i + size].sum(1) for i in range(0, mask.shape[1], size)], 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("positions", ["magnitude", "random"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4"])
def test_every_group_of_input_channels_keeps_as_many_weights(pattern, positions, layout):
    kept, size = map(int, pattern.split(":"))
    model = converted(layout=layout, granularity=pattern, positions=positions)
    assert set(model.masks) == {"1.weight", "4.weight", "5.weight"}
    for name, mask in model.masks.items():
        assert (groups_of(mask, size) == kept).all()
        if positions == "magnitude":
            weight = network().state_dict()[name].abs()
            for first in range(0, mask.shape[1], size):
                part, inside = weight[:, first : first + size], mask[:, first : first + size]
                least = part.masked_fill(~inside, torch.inf).amin(1)
                assert (least >= part.masked_fill(inside, 0).amax(1)).all()
    assert model.active_weights * size == model.prunable_weights * kept
    record = model.config.conversion
    assert (record["granularity"], record["distribution"], record["sparsity"]) == (pattern, "uniform", 1 - kept / size)


def test_layers_without_such_groups_stay_dense_and_say_why():
    specs = converted(granularity="2:4", sparsify_patterns=["*"]).specs
    assert specs["0.weight"].reason == "3 input channels are no multiple of 4 (2:4)"
    assert specs["2.weight"].reason == "ConvTranspose2d has no input channels to choose from (2:4)"
    assert specs["0.weight"].role == specs["2.weight"].role == "dense"
    # A grouped convolution counts the channels of one group.
    assert converted(granularity="2:8").specs["1.weight"].role == "sparse"
    assert converted(granularity="2:5").specs["1.weight"].reason == "8 input channels are no multiple of 5 (2:5)"
    with pytest.raises(UsageError, match=r"--granularity 3:64 fits no layer of this model"):
        converted(granularity="3:64")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparsity": 0.9}, r"--sparsity 0.9 contradicts --granularity 2:4, .* sparsity 0.5; leave it out"),
        ({"sparsity": 0}, r"--sparsity 0 contradicts"),
        ({"budget": "1kparams"}, r"--budget 1kparams contradicts"),
        ({"budget": "3kB"}, r"--budget 3kB contradicts"),
        ({"distribution": "erk"}, r"--distribution erk contradicts"),
        ({"distribution": "file:d.csv"}, r"--distribution file:d.csv contradicts"),
    ],
)
def test_options_that_contradict_the_density_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        converted(granularity="2:4", **options)


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "2:65", "32:128", "N:M", " 2:4", "2:4:8", "-1:4"])
def test_numbers_that_make_no_pattern_are_refused(text):
    with pytest.raises(UsageError, match=f"granularity '{text}' is not allowed; in N:M, N is at least 1"):
        converted(granularity=text)


@pytest.mark.parametrize("text", ["2/4", "fanin2", ""])
def test_unknown_granularities_are_refused(text):
    with pytest.raises(UsageError, match=f"granularity '{text}' is unknown"):
        converted(granularity=text, sparsity=0.5)


def test_a_sparsity_that_says_the_same_is_allowed():
    assert converted(granularity="2:4", sparsity=0.5).sparsity == converted(granularity="2:4").sparsity == 0.5


def test_a_sparsifier_refuses_another_number():
    made = Sparsifier(network(), ModelConfig("module", "Small", 2, ()), granularity="2:4")
    assert made.active_weights(Budget(sparsity=Fraction(1, 2))) == made.least == made.prunable // 2
    with pytest.raises(UsageError, match="active weights contradicts --granularity 2:4"):
        made.active_weights(Budget.of_sparsity(0.4))


@pytest.mark.parametrize("distribution", ["uniform", "erk", "magnitude", "lamp"])
@pytest.mark.parametrize("positions", ["magnitude", "random"])
def test_every_output_has_the_same_fan_in(distribution, positions):
    fitted = []
    model = converted(
        granularity="fan-in",
        sparsity=0.7,
        distribution=distribution,
        positions=positions,
        on_fitted=fitted.append,
    )
    for name, mask in model.masks.items():
        fan_in = mask.flatten(1).sum(1)
        assert (fan_in == fan_in[0]).all() and fan_in[0] >= 1
        if positions == "magnitude":
            weight = network().state_dict()[name].abs()
            least = weight.masked_fill(~mask, torch.inf).flatten(1).amin(1)
            assert (least >= weight.masked_fill(mask, 0).flatten(1).amax(1)).all()
    allowed, steps = round(model.prunable_weights * 0.3), {mask.shape[0] for mask in model.masks.values()}
    missing = allowed - model.active_weights
    assert 0 <= missing < min(steps)
    said = f"so {model.active_weights:,} are active, {missing} below the {allowed:,} allowed"
    assert (said in fitted[0].notes[-1]) == (missing > 0)
    assert fitted[0].notes[-1].startswith("granularity fan-in: every output of a layer")


def test_too_few_weights_for_every_output_are_refused():
    with pytest.raises(UsageError, match=r"every output of the 4 sparse layers keeps a weight; allow 72 or more"):
        converted(granularity="fan-in", sparsity=0.995)


def test_random_positions_of_a_smaller_number_lie_within_those_of_a_larger_one():
    sparse, denser = (converted(granularity="fan-in", sparsity=s, positions="random") for s in (0.8, 0.6))
    for name, mask in sparse.masks.items():
        assert denser.masks[name][mask].all() and denser.masks[name].sum() > mask.sum()


def test_a_budget_in_bytes_keeps_the_fan_in():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 40))
    model = convert(copy.deepcopy(dense), granularity="fan-in", sparsity=0.4, input_shape=(64,))
    before = model.active_weights
    graph = Graph((Value("x", (None,)),), (Value("y", (None,)),), (Node("Relu", ("x",), ("y",)),), {}, (), 18)
    limit = archive_bytes(model, graph) - 2000
    assert trim(model, limit, graph) <= limit
    model.check()
    assert before - 1000 < model.active_weights < before
    for name, mask in model.masks.items():
        weight = dense.state_dict()[name].abs()
        assert (weight.masked_fill(~mask, torch.inf).amin(1) >= weight.masked_fill(mask, 0).amax(1)).all()


@pytest.mark.parametrize("granularity, options", [("2:4", {}), ("fan-in", {"sparsity": 0.8})])
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_the_pattern_is_saved_checked_and_taken_over(tmp_path, granularity, options, storage):
    model = converted(granularity=granularity, storage=storage, **options)
    model.save(tmp_path / "model")
    again = load(tmp_path / "model", network(), storage=storage)
    assert str(again.granularity) == granularity
    for name, mask in model.masks.items():
        assert torch.equal(again.masks[name], mask)
    ticket = convert(network(5), structure=tmp_path / "model")
    assert str(ticket.granularity) == granularity and ticket.counts == model.counts
    mask = ticket.masks["4.weight"]
    row, column = mask.nonzero()[0].tolist()
    mask[row, column], ticket.weights["4.weight"].data[row, column] = False, 0.0
    with pytest.raises(CheckFailed, match=f"'4.weight' does not have the pattern of --granularity {granularity}"):
        ticket.check()


def test_trained_weights_and_a_thin_model(tmp_path):
    torch.save(convert("lenet-300-100", sparsity=0, seed=3).module.state_dict(), tmp_path / "net.pth")
    fitted = []
    options = {"weights": str(tmp_path / "net.pth"), "on_fitted": fitted.append}
    model = convert("lenet-300-100", granularity="2:4", **options)
    assert all((groups_of(mask, 4) == 2).all() for mask in model.masks.values()) and len(model.masks) == 2
    assert any("granularity 2:4: 2 active in every 4 consecutive input channels" in note for note in fitted[0].notes)
    thin = convert("wrn-22-2", granularity="2:4", thin=True, preset="paper")
    assert thin.active_weights == thin.prunable_weights
