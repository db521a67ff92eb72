"""The ledger against the memory that torch holds when it really trains."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from dsr_tool.errors import UsageError
from dsr_tool.measure.memory.ledger import (
    OPTIMIZERS,
    inference_ledger,
    make_optimizer,
    optimizer_state_bytes,
    training_ledger,
)
from dsr_tool.sparse.mask_keeper import MaskKeeper
from dsr_tool.sparse.sparsify import sparsify
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig

BATCH = 16


def _sparse(module, shape):
    return sparsify(module, ModelConfig("module", "Small", 10, shape), Budget(sparsity=0.8), positions="random")


@pytest.fixture
def convolutions():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 48, 3)]
    layers += [
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(48 * 36, 64),
        nn.GELU(),
        nn.Linear(64, 10),
    ]
    return _sparse(nn.Sequential(*layers), (3, 16, 16))


@pytest.fixture
def products():
    """A network without convolutions: oneDNN's copies do not go through torch's allocator."""
    torch.manual_seed(0)
    layers = [nn.Linear(256, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10)]
    return _sparse(nn.Sequential(*layers), (256,))


def _step(model, optimizer, inputs):
    loss = cross_entropy(model(inputs), torch.zeros(len(inputs), dtype=torch.int64))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_gradients_and_masks_equal_those_of_a_real_step(convolutions, name):
    model = convolutions
    optimizer = make_optimizer(name, model.module.parameters())
    keeper = MaskKeeper(model, optimizer)
    _step(model, optimizer, torch.randn(BATCH, 3, 16, 16))
    state = [value for values in optimizer.state_dict()["state"].values() for value in values.values()]
    state_bytes = sum(value.nbytes for value in state if isinstance(value, torch.Tensor))
    assert optimizer_state_bytes(model, name) == state_bytes
    held = training_ledger(model, BATCH, optimizer=name).held
    assert held["optimizer state"] == state_bytes
    assert held["gradients"] == sum(p.grad.nbytes for p in model.module.parameters())
    assert held["weights"] == sum(t.nbytes for t in (*model.module.parameters(), *model.module.buffers()))
    assert held["masks"] == 5 * model.prunable_weights  # one byte of SparseModel's, four of MaskKeeper's
    keeper.remove()


def test_saved_activations_equal_those_of_a_real_forward_pass(convolutions):
    inputs, storages = torch.randn(BATCH, 3, 16, 16), {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    module = convolutions.module.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = cross_entropy(module(inputs), torch.zeros(BATCH, dtype=torch.int64))
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    real = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)
    assert loss.isfinite()
    assert training_ledger(convolutions, BATCH).held["saved activations"] == real


def _allocated_peak(run):
    """Returns the peak of torch's allocator above its start, from each allocation that the profiler saw."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now, most = 0, 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_the_peak_equals_that_of_torchs_allocator(products):
    model, inputs = products, torch.randn(BATCH, 256)
    optimizer = make_optimizer("sgd", model.module.parameters())
    keeper = MaskKeeper(model, optimizer)
    model.module.train()
    for _ in range(2):
        _step(model, optimizer, inputs)
    optimizer.zero_grad()  # the profiler misses the end of storages whose start it missed
    real = _allocated_peak(lambda: [_step(model, optimizer, inputs) for _ in range(2)])
    ledger = training_ledger(model, BATCH)
    there = sum(ledger.held[kind] for kind in ("weights", "masks", "optimizer state")) + inputs.nbytes
    computed = ledger.peak_bytes - there
    assert computed == pytest.approx(real, rel=0.02, abs=4096)
    keeper.remove()

    model.module.eval()
    with torch.no_grad():
        real = _allocated_peak(lambda: model(inputs))
    run = inference_ledger(model, BATCH)
    assert run.peak_bytes - run.held["weights"] - inputs.nbytes == pytest.approx(real, rel=0.02, abs=4096)


def test_computing_a_ledger_does_not_change_the_model(convolutions):
    before = {name: value.clone() for name, value in convolutions.module.state_dict().items()}
    convolutions.module.eval()
    training_ledger(convolutions, BATCH)
    inference_ledger(convolutions, BATCH)
    assert not convolutions.module.training
    assert all(p.grad is None for p in convolutions.module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in convolutions.module.state_dict().items())
    make_optimizer("sgd", convolutions.module.parameters()).step()  # no hook of the ledger's is left


def test_saved_activations_grow_with_the_batch_and_shrink_with_bf16(convolutions):
    small, large = (training_ledger(convolutions, batch) for batch in (8, 32))
    assert large.held["saved activations"] == pytest.approx(4 * small.held["saved activations"], rel=0.01)
    assert {k: v for k, v in large.held.items() if "saved" not in k} == {
        k: v for k, v in small.held.items() if "saved" not in k
    }
    low = training_ledger(convolutions, 32, precision="bf16")
    assert low.held["saved activations"] < large.held["saved activations"]
    assert low.held["gradients"] == large.held["gradients"]
    assert sum(large.at_peak.values()) == large.peak_bytes


def test_values_that_are_not_allowed_are_refused(convolutions):
    with pytest.raises(UsageError, match="--optimizer 'adm' is unknown; did you mean adam"):
        training_ledger(convolutions, 1, optimizer="adm")
    with pytest.raises(UsageError, match="precision 'fp8' is unknown"):
        training_ledger(convolutions, 1, precision="fp8")
    with pytest.raises(UsageError, match="batch 0 is not 1 or more"):
        inference_ledger(convolutions, 0)
    with pytest.raises(UsageError, match=r"for a batch of 2 inputs \[3, 4, 4\] cannot be computed"):
        inference_ledger(convolutions, 2, input_shape=(3, 4, 4))
