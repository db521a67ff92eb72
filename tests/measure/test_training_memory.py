"""Training memory in compact storage: the ledger against real steps on kernels, and against child processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dsr_tool.measure.memory.dry import CountedPlans, dry_kernels
from dsr_tool.measure.memory.ledger import OPTIMIZERS, make_optimizer, optimizer_state_bytes, training_ledger
from dsr_tool.measure.memory.process import Request, can_measure, measure
from dsr_tool.methods import attach
from dsr_tool.runtime.kernels import library, train_planes
from dsr_tool.runtime.kernels.training import CALLS
from dsr_tool.sparse.blocked import convolution
from dsr_tool.sparse.compact.modules import runner_of
from dsr_tool.sparse.sparsify import sparsify
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from tests.measure.test_ledger import _allocated_peak, _step

BATCH, SHAPE = 16, (3, 16, 16)
kernels = pytest.mark.skipif(library.level() is None, reason="no kernels are built here")


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(32 * 64, 10)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.pool(torch.relu(self.body(x) + x)).flatten(1))


@pytest.fixture
def compact():
    torch.manual_seed(0)
    model = sparsify(_Block(), ModelConfig("module", "Small", 10, SHAPE), Budget(sparsity=0.8), positions="random")
    model.to_storage("compact").module.train()
    return model


def _storages(tensors):
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@kernels
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_gradients_positions_and_plans_equal_those_of_a_real_step(compact, name):
    optimizer = make_optimizer(name, compact.module.parameters())
    attach(compact, optimizer, "static")
    held = training_ledger(compact, BATCH, optimizer=name).held
    before = CALLS["dsr_conv_weights"]
    _step(compact, optimizer, torch.randn(BATCH, *SHAPE))
    assert CALLS["dsr_conv_weights"] > before
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert held["optimizer state"] == sum(value.nbytes for value in state if isinstance(value, torch.Tensor))
    assert held["optimizer state"] == optimizer_state_bytes(compact, name)
    assert held["gradients"] == sum(p.grad.nbytes for p in compact.module.parameters())
    assert held["weights"] == sum(t.nbytes for t in (*compact.module.parameters(), *compact.module.buffers()))
    assert held["positions"] == 4 * compact.active_weights
    assert "masks" not in held
    runner = runner_of(compact.module)
    assert held["plans"] == runner.plans.bytes > 0


@kernels
def test_saved_activations_equal_those_of_a_real_forward_pass(compact):
    inputs, saved = torch.randn(BATCH, *SHAPE), []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = cross_entropy(compact(inputs), torch.zeros(BATCH, dtype=torch.int64))
    own = _storages([*compact.module.parameters(), *compact.module.buffers(), compact.store.positions])
    real = sum(nbytes for key, nbytes in _storages(saved).items() if key not in own)
    assert loss.isfinite()
    # The ledger also has what the caller holds: inputs, labels and the loss.
    assert training_ledger(compact, BATCH).held["saved activations"] == pytest.approx(real + inputs.nbytes, rel=0.03)


@kernels
def test_the_peak_equals_that_of_torchs_allocator(compact):
    inputs = torch.randn(BATCH, *SHAPE)
    optimizer = make_optimizer("sgd", compact.module.parameters())
    for _ in range(2):
        _step(compact, optimizer, inputs)
    optimizer.zero_grad()  # the profiler misses the end of storages whose start it missed
    real = _allocated_peak(lambda: [_step(compact, optimizer, inputs) for _ in range(2)])
    ledger = training_ledger(compact, BATCH)
    there = sum(ledger.held[kind] for kind in ("weights", "positions", "optimizer state", "plans")) + inputs.nbytes
    scratch = ledger.at_peak["scratch"]  # oneDNN's copies do not go through torch's allocator
    assert ledger.peak_bytes - there - scratch == pytest.approx(real, rel=0.03)


def test_without_kernels_one_dense_layer_at_a_time_is_counted(compact):
    on_kernels = training_ledger(compact, BATCH)
    compact.store.kernels = False
    rebuilt = training_ledger(compact, BATCH)
    assert rebuilt.held.get("plans", 0) == 0
    assert rebuilt.held["gradients"] == on_kernels.held["gradients"]
    largest = 4 * max(compact.sizes.values())
    assert rebuilt.at_peak["activations"] + rebuilt.at_peak["scratch"] > largest


@kernels
def test_a_ledger_leaves_the_model_and_the_kernels_as_they_were(compact):
    before = {name: value.clone() for name, value in compact.module.state_dict().items()}
    training_ledger(compact, BATCH)
    assert all(torch.equal(value, before[name]) for name, value in compact.module.state_dict().items())
    assert all(parameter.grad is None for parameter in compact.module.parameters())
    assert not len(runner_of(compact.module).plans)
    calls = CALLS["dsr_norm_forward"]
    compact(torch.randn(BATCH, *SHAPE))
    assert CALLS["dsr_norm_forward"] > calls  # kernels run again
    assert type(convolution._every(7)) is torch.Tensor


def test_kernels_come_back_after_an_error(compact):
    run, address = train_planes.run, torch.ones(1).data_ptr
    with pytest.raises(ZeroDivisionError), dry_kernels(CountedPlans(compact.store)):
        raise ZeroDivisionError
    assert train_planes.run is run
    assert address()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_state_is_at_most_the_density_times_1_4_of_dense(optimizer):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256))
    config, density = ModelConfig("module", "Small", 256, (256,)), 0.1
    model = sparsify(module, config, Budget(sparsity=1 - density), distribution="uniform", positions="random")
    kinds = ("weights", "positions", "gradients", "optimizer state")
    masked = training_ledger(model, BATCH, optimizer=optimizer).held
    held = training_ledger(model.to_storage("compact"), BATCH, optimizer=optimizer).held
    state, dense = (sum(each.get(kind, 0) for kind in kinds) for each in (held, masked))
    # Biases stay dense: with SGD 12 bytes each, beside 16 for each of a tenth of the weights.
    assert state <= 1.4 * density * dense
    assert state + held["plans"] <= 2.1 * density * dense


_RUN = """
import json, sys, torch
torch.set_num_threads(1)
from torch.nn.functional import cross_entropy
from converters.loading import load
from dsr_tool.measure.memory.child import warm_torch
from dsr_tool.measure.memory.ledger import make_optimizer
from dsr_tool.measure.memory.process import held_bytes, reset_peak
from dsr_tool.methods import attach
from dsr_tool.train.checkpoint import write_state
from pathlib import Path

folder, target, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
warm_torch()
reset_peak()
base = held_bytes("VmRSS")
model = load(folder, storage="compact")
model.module.train()
optimizer = make_optimizer("sgd", model.module.parameters())
attach(model, optimizer, "static")
cross_entropy(model(torch.randn(batch, 3, 64, 64)), torch.zeros(batch, dtype=torch.int64)).backward()
optimizer.step()
model.save(target)
write_state(Path(target) / "training.safetensors", {"optimizer": optimizer.state_dict()})
print(json.dumps(held_bytes("VmHWM") - base))
"""


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory):
    from converters.conversion import convert

    folder = tmp_path_factory.mktemp("resnet50") / "net"
    convert("resnet50", sparsity=0.9, distribution="uniform", input_size=64).save(folder)
    return folder


@kernels
@pytest.mark.slow
@pytest.mark.skipif(not can_measure(), reason="needs /proc")
def test_loading_a_step_and_saving_hold_at_most_200_mb(resnet50, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = (sys.executable, "-c", _RUN, resnet50, tmp_path / "out", "8")
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) <= 200e6
    # Values, positions are in the model; momentum of nnz values and of the dense rest is in the checkpoint.
    assert (tmp_path / "out" / "training.safetensors").stat().st_size < 0.12 * 102e6


@kernels
@pytest.mark.slow
@pytest.mark.skipif(not can_measure(), reason="needs /proc")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_computed_and_measured_agree_and_the_peak_is_below_six_tenths_of_dense(resnet50, optimizer):
    from converters.loading import load

    shape = (16, 3, 64, 64)
    compact, dense = (
        measure(Request("training", str(resnet50), shape, optimizer, storage=storage)).peak_bytes
        for storage in ("compact", "dense")
    )
    model = load(resnet50, storage="compact")
    computed = training_ledger(model, 16, input_shape=shape[1:], optimizer=optimizer).peak_bytes
    assert computed == pytest.approx(compact, rel=0.15)
    assert compact <= 0.6 * dense
