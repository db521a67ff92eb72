"""Budgets in bytes and multiply-adds, compared with the written file."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import converters.archive_size
from converters.archive_size import archive_bytes, smallest_sparsity
from converters.budgets import LEAST_BYTES, LEAST_MACS, solve, trim
from converters.conversion import convert
from converters.loading import load
from converters.search import search
from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.formats.archive import encode_archive, open_archive
from dsr_tool.formats.footprint import footprint
from dsr_tool.sparse.discover import Rules
from dsr_tool.sparse.sparsify import Sparsifier
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig, installed_versions

SHAPE = (3, 16, 16)


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 10))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, groups=32),
        nn.Conv2d(32, 96, 3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(384, 100),
    )


NETWORKS = {"perceptron": perceptron, "convolutions": convolutions}


@pytest.fixture(scope="module")
def graphs():
    return {name: trace(make(), SHAPE) for name, make in NETWORKS.items()}


@pytest.fixture
def trace_once(monkeypatch, graphs):
    """Replaces the capture of the networks above, a second each, by the fixture."""
    by_length = {len(make()): graphs[name] for name, make in NETWORKS.items()}
    monkeypatch.setattr(converters.archive_size, "trace", lambda module, shape: by_length[len(module)])


def planned(name, **options):
    torch.manual_seed(0)
    return Sparsifier(NETWORKS[name](), ModelConfig("module", name, 0, SHAPE), **options)


def fitted(sparsifier, budget):
    """Returns the model that meets a budget."""
    return sparsifier.apply(solve(sparsifier, budget)[0], budget)


def written(model, graph, path):
    """Returns the size of the archive on disk."""
    encoded = encode_archive(model.tensors(), model.specs, graph, model.config, versions=installed_versions())
    encoded.save(path)
    return path.stat().st_size


def macs(model):
    return footprint(model.tensors(), model.specs).model.sparse_macs


options = st.fixed_dictionaries(
    {
        "distribution": st.sampled_from(["uniform", "erk", "magnitude"]),
        "positions": st.sampled_from(["magnitude", "random"]),
        "rules": st.sampled_from([Rules(), Rules(small_layers=False), Rules(keep_dense=("7", "3"))]),
        "seed": st.integers(0, 2**40),
    }
)


@pytest.mark.usefixtures("trace_once")
@given(st.sampled_from(sorted(NETWORKS)), st.integers(0, 10**6), options)
@settings(max_examples=12, deadline=None)
def test_an_archive_has_at_most_its_budget_and_98_percent_of_it(graphs, tmp_path_factory, name, position, options):
    if name == "perceptron":
        options = {**options, "rules": Rules()}
    sparsifier = planned(name, **options)
    path = tmp_path_factory.mktemp("budget") / "a.dsr"
    anything = Budget.parse("1B")
    least, most = (
        archive_bytes(sparsifier.preview(total, anything), graphs[name])
        for total in (len(sparsifier.sparse), sparsifier.prunable)
    )
    budget = Budget(bytes=least + 200 + (most - least - 200) * position // 10**6, unit="kB")
    total, nbytes = solve(sparsifier, budget)
    model = sparsifier.apply(total, budget)
    model.check()
    assert nbytes == written(model, graphs[name], path)
    assert LEAST_BYTES * budget.bytes <= nbytes <= budget.bytes


@given(st.sampled_from(sorted(NETWORKS)), st.floats(0.01, 0.99), options)
@settings(max_examples=12, deadline=None)
def test_multiply_adds_are_within_one_percent_or_one_weight(name, position, options):
    if name == "perceptron":
        options = {**options, "rules": Rules()}
    sparsifier = planned(name, **options)
    least, most = (
        macs(sparsifier.preview(total, Budget.parse("1MAC"))) for total in (len(sparsifier.sparse), sparsifier.prunable)
    )
    budget = Budget(macs=round(least + position * (most - least)), unit="MMACs")
    model = fitted(sparsifier, budget)
    found = macs(model)
    assert found <= budget.macs
    # One weight of a convolution has up to 256 multiply-adds here, which is more than one percent of small budgets.
    if found < LEAST_MACS * budget.macs:
        assert macs(planned(name, **options).preview(model.active_weights + 1, budget)) > budget.macs


@given(st.sampled_from(sorted(NETWORKS)), st.floats(0, 1), options)
@settings(max_examples=12, deadline=None)
def test_parameters_are_exact(name, position, options):
    if name == "perceptron":
        options = {**options, "rules": Rules()}
    sparsifier = planned(name, **options)
    parameters = sum(parameter.numel() for parameter in sparsifier.module.parameters())
    least = parameters - sparsifier.prunable + len(sparsifier.sparse)
    budget = Budget(parameters=least + int(position * (parameters - least)))
    model = fitted(sparsifier, budget)
    assert parameters - sparsifier.prunable + model.active_weights == budget.parameters


def test_a_saved_model_exports_to_exactly_the_bytes_that_were_claimed(tmp_path):
    from exporters.export import export

    reached = []
    model = convert(
        "squeezenet1_1", budget="700kB", num_classes=10, input_size=32, distribution="erk", on_fitted=reached.append
    )
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    export(loaded, tmp_path / "model.dsr")
    nbytes = (tmp_path / "model.dsr").stat().st_size
    assert nbytes == reached[0].archive_bytes == archive_bytes(loaded)
    assert 0.98 * 700_000 <= nbytes <= 700_000
    assert open_archive(tmp_path / "model.dsr").config.conversion["budget_bytes"] == 700_000


@pytest.mark.parametrize("kind", ["bytes", "macs"])
@pytest.mark.usefixtures("trace_once")
def test_a_budget_out_of_reach_names_a_range_whose_ends_can_be_reached(kind):
    unit = {"bytes": "kB", "macs": "kMACs"}[kind]
    for amount, says in ((100, "can have from"), (10**9, "more than this model can fill")):
        with pytest.raises(UsageError, match=says) as refused:
            solve(planned("convolutions"), Budget(**{kind: amount}, unit=unit))
        low, high = re.search(r" from (\S+ \S+) to (\S+ \S+?)[;,]", str(refused.value)).groups()
        for end in (low, high):
            solve(planned("convolutions"), Budget.parse(end))


def test_multiply_adds_need_an_input_shape():
    with pytest.raises(UsageError, match="multiply-adds are unknown"):
        convert(perceptron(), budget="1MMACs")


def test_bytes_need_an_input_shape_and_float32():
    with pytest.raises(UsageError, match="input shape"):
        convert(perceptron(), budget="50kB")
    with pytest.raises(UsageError, match=r"model\.to\(torch\.float32\)"):
        convert(perceptron().double(), budget="50kB", input_shape=SHAPE)


def test_a_network_without_a_sparse_layer_has_one_size():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768))
    with pytest.raises(UsageError, match=r"no layer of this model is left to be sparse, so it always has 11"):
        convert(network, budget="1MB", input_shape=SHAPE)


@pytest.mark.usefixtures("trace_once")
def test_the_smallest_sparsity_of_trained_weights_fits_and_a_smaller_one_does_not(graphs, tmp_path):
    model = planned("convolutions").apply(30_000, Budget.of_sparsity(0))
    before = archive_bytes(model, graphs["convolutions"])
    limit = round(0.8 * before)
    sparsity = smallest_sparsity(model, limit)
    # These weights are also removed by hand: the smallest of the whole network.
    for wanted, fits in ((sparsity, True), (sparsity - 0.005, False)):
        magnitudes = torch.cat([weight[model.masks[name]].abs() for name, weight in model.weights.items()])
        keep = round(model.prunable_weights * (1 - wanted))
        cut = magnitudes.sort(descending=True).values[keep - 1]
        masks = {name: model.masks[name] & (weight.abs() >= cut) for name, weight in model.weights.items()}
        smaller = type(model)(model.module, model.specs, masks, model.config)
        assert (written(smaller, graphs["convolutions"], tmp_path / "a.dsr") <= limit) == fits


@pytest.mark.usefixtures("trace_once")
def test_a_trimmed_archive_has_at_most_its_limit_and_the_largest_weights(graphs, tmp_path):
    model = planned("convolutions").apply(30_000, Budget.of_sparsity(0))
    limit = round(0.9 * archive_bytes(model, graphs["convolutions"]))
    before = model.masks["7.weight"].clone()
    nbytes = trim(model, limit)
    assert nbytes == written(model, graphs["convolutions"], tmp_path / "a.dsr")
    assert LEAST_BYTES * limit <= nbytes <= limit
    model.check()
    assert model.config.conversion["active_weights"] == model.active_weights < 30_000
    assert trim(model, limit) == nbytes
    after, weight = model.masks["7.weight"], planned("convolutions").module[7].weight.detach().abs()
    assert weight[after].min() >= weight[before & ~after].max()


@pytest.mark.usefixtures("trace_once")
def test_whole_kernels_stay_whole_in_a_trim(graphs):
    model = planned("convolutions", granularity="kernel").apply(30_000, Budget.of_sparsity(0))
    limit = round(0.9 * archive_bytes(model, graphs["convolutions"]))
    before = int(model.masks["4.weight"].sum())
    assert LEAST_BYTES * limit <= trim(model, limit) <= limit
    kernels = model.masks["4.weight"].flatten(2)
    assert torch.equal(kernels.any(2), kernels.all(2))
    assert 0 < kernels.sum() < before


@pytest.mark.usefixtures("trace_once")
def test_no_number_of_weights_is_small_enough_for_a_tiny_archive():
    with pytest.raises(CheckFailed, match="give a larger budget"):
        trim(planned("convolutions").apply(30_000, Budget.of_sparsity(0)), 1000)


@pytest.mark.usefixtures("trace_once")
def test_no_sparsity_makes_a_model_smaller_than_its_dense_rest():
    assert smallest_sparsity(planned("convolutions").apply(30_000, Budget.of_sparsity(0)), 1000) is None


curve = st.sampled_from(
    [
        lambda n: 5000 + 4 * n,
        lambda n: 300 + n * math.log2(2 + 1e6 / (n + 1)),
        lambda n: n * n // 1000,
        lambda n: 1000 * math.isqrt(n),
        lambda n: 10_000 + 4 * n + (n * 2654435761 % 97),  # sizes of files waver
    ]
)


@given(curve, st.integers(0, 10**6), st.integers(1, 10**6), st.integers(0, 2**22))
def test_a_search_stays_below_its_limit_and_takes_few_steps(size, position, most, guess):
    calls = []

    def counted(number):
        calls.append(number)
        return int(size(number))

    low, high = int(size(1)), int(size(most))
    limit = low + (high - low) * position // 10**6
    found = search(counted, 1, most, guess, math.ceil(0.98 * limit), limit)
    if found.below is None:
        assert low > limit
        return
    assert found.below[1] <= limit
    assert (
        found.below[1] >= 0.98 * limit
        or found.below[0] == most
        or found.above
        == (
            found.below[0] + 1,
            counted(found.below[0] + 1),
        )
    )
    assert len(calls) <= 50
    assert np.all(np.array(calls) <= most)
