"""Compact storage holds the same network: names, bytes, copies, errors."""

import copy
import io

import pytest
import torch
from torch import nn

from converters.conversion import convert
from converters.loading import load
from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.sparse.compact.store import UnexpectedAccessError


def same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_compact_model_has_one_flat_parameter_and_the_same_state(pair):
    masked, compact = pair()
    assert (masked.storage, compact.storage) == ("masked", "compact")
    same_state(masked.module, compact.module)
    names = {name for name, _ in compact.module.named_parameters()}
    assert "sparse_values" in names
    assert not names & set(masked.masks)
    assert compact.store.values.numel() == masked.active_weights
    for attribute in ("active_weights", "prunable_weights", "parameters", "sparsity", "model_sparsity", "trained"):
        assert getattr(masked, attribute) == getattr(compact, attribute)
    assert masked.counts == compact.counts
    assert masked.sizes == compact.sizes
    assert all(torch.equal(mask, compact.masks[name]) for name, mask in masked.masks.items())
    assert all(torch.equal(weight, compact.weights[name]) for name, weight in masked.weights.items())


def test_both_conversions_are_exact(pair):
    masked, compact = pair()
    compact.to_storage("masked")
    same_state(masked.module, compact.module)
    assert [name for name, _ in compact.module.named_parameters()] == [n for n, _ in masked.module.named_parameters()]
    assert type(compact.module) is type(masked.module)
    assert type(compact.module.first) is nn.Conv2d
    compact.check()


def test_layers_keep_their_classes_and_weights_on_access(pair):
    masked, compact = pair()
    assert isinstance(compact.module.first, nn.Conv2d)
    assert torch.equal(compact.module.first.weight, masked.module.first.weight)
    assert repr(compact.module) == repr(masked.module)
    with pytest.raises((AttributeError, KeyError), match="weight"):
        compact.module.first.weight = nn.Parameter(torch.ones(16, 3, 3, 3))


def test_copies_and_pickles_are_independent(pair):
    masked, compact = pair()
    masked.module.eval(), compact.module.eval()
    buffer = io.BytesIO()
    torch.save(compact.module, buffer)
    buffer.seek(0)
    images = torch.randn(2, 3, 9, 9)
    for other in (copy.deepcopy(compact.module), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(images), masked.module(images))
        with torch.no_grad():
            other.sparse_values.zero_()
        assert not torch.count_nonzero(other.first.weight)
    same_state(masked.module, compact.module)


def test_folders_are_the_same_bytes_and_load_in_either_storage(pair, tmp_path):
    masked, compact = pair()
    masked.save(tmp_path / "masked")
    compact.save(tmp_path / "compact")
    for file in (tmp_path / "masked").iterdir():
        assert file.read_bytes() == (tmp_path / "compact" / file.name).read_bytes(), file.name
    for storage in ("masked", "compact"):
        loaded = load(tmp_path / "compact", type(masked.module)(), storage=storage)
        assert loaded.storage == storage
        same_state(masked.module, loaded.module)
        assert loaded.counts == masked.counts
    with pytest.raises(UsageError, match="storage 'packed' is unknown"):
        load(tmp_path / "compact", type(masked.module)(), storage="packed")


def test_a_folder_with_values_outside_its_masks_is_refused(pair, tmp_path):
    masked, _ = pair()
    with torch.no_grad():
        masked.module.first.weight.fill_(1.0)
    masked.check = lambda: None
    masked.save(tmp_path / "broken")
    with pytest.raises(CheckFailed, match=r"'first\.weight' has .* non-zero values outside its mask"):
        load(tmp_path / "broken", type(masked.module)(), storage="compact")


def test_a_state_dict_loads_if_it_fits_the_masks(pair):
    masked, compact = pair()
    state = {
        name: value * 2 if value.is_floating_point() else value for name, value in masked.module.state_dict().items()
    }
    compact.module.load_state_dict(state)
    assert torch.equal(compact.module.head.weight, state["head.weight"])
    state["head.weight"] = torch.ones(10, 16)
    with pytest.raises(RuntimeError, match=r"head\.weight has \d+ non-zero values outside of its mask"):
        compact.module.load_state_dict(state)
    state["head.weight"] = torch.ones(10, 17)
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        compact.module.load_state_dict(state)
    del state["head.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"head\.weight"'):
        compact.module.load_state_dict(state)


def test_frozen_layers_are_held_apart(pair):
    masked, _ = pair()
    masked.module.head.weight.requires_grad_(False)
    compact = copy.deepcopy(masked).to_storage("compact")
    assert compact.trained == masked.trained
    assert compact.store.values.numel() == masked.active_weights - masked.counts["head.weight"]
    same_state(masked.module, compact.module)
    compact.to_storage("masked")
    assert not compact.module.head.weight.requires_grad
    assert compact.module.first.weight.requires_grad


def test_moving_the_module_moves_the_store(pair):
    masked, compact = pair()
    compact.to(torch.float64)
    assert compact.store.values is compact.module.sparse_values
    assert compact.module.first.weight.dtype == torch.float64
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert torch.equal(compact(images), masked.to(torch.float64)(images))


def test_weights_of_two_types_and_a_name_that_is_taken_are_refused(pair):
    masked, _ = pair()
    masked.module.head.half()
    with pytest.raises(UsageError, match=r"compact storage holds all in one vector; give --storage masked"):
        masked.to_storage("compact")
    other, _ = pair()
    other.module.sparse_values = 1
    with pytest.raises(UsageError, match="'sparse_values' of its own"):
        other.to_storage("compact")


def test_a_network_that_is_one_layer_can_be_compact():
    model = convert(nn.Linear(40, 30), sparsity=0.9)
    dense = copy.deepcopy(model.module)
    model.to_storage("compact")
    inputs = torch.randn(5, 40)
    assert torch.equal(model(inputs), dense(inputs))
    model.to_storage("masked")
    same_state(dense, model.module)


def test_weights_cannot_be_read_while_tracing(pair):
    _, compact = pair()
    with compact.store.tracing(), pytest.raises(UnexpectedAccessError, match=r"reads the weight 'first\.weight'"):
        compact.module.first.weight.sum()


def test_convert_returns_the_storage_that_is_asked_for():
    model = convert(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 10)), sparsity=0.9, storage="compact")
    assert model.storage == "compact"
    assert model.store.values.numel() == model.active_weights
    with pytest.raises(UsageError, match="storage 'packed' is unknown"):
        convert(nn.Linear(40, 30), sparsity=0.9, storage="packed")
