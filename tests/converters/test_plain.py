"""Wrappers come off, and weights that torch computes before each run become plain parameters."""

import os
import socket

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

from converters.conversion import convert
from converters.loading import load
from converters.plain import make_plain
from dsr_tool.errors import UsageError
from dsr_tool.sparse.wrappers import unwrapped

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own about old norms and TorchScript
SHAPE = (3, 8, 8)
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
X = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))


def inside(wrap, *paths):
    def wrapped():
        module = network()
        for path in paths:
            module.set_submodule(path, wrap(module.get_submodule(path)))
        return module

    return wrapped


@pytest.fixture
def one_process():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPED = {
    "none": network,
    "DataParallel": lambda: nn.DataParallel(network()),
    "compiled": lambda: torch.compile(network()),
    "both": lambda: torch.compile(nn.DataParallel(torch.compile(network()))),
    "average": lambda: AveragedModel(network()),
    "a compiled layer": inside(torch.compile, "2", "4"),
    "DataParallel around a layer": inside(nn.DataParallel, "2"),
    "a checkpointed layer": inside(checkpoint_wrapper, "0", "2"),
    "nested": inside(lambda layer: torch.compile(nn.Sequential(nn.DataParallel(layer))), "2"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_come_off_and_names_are_those_of_the_network(kind):
    module = WRAPPED[kind]()
    model = convert(module, sparsity=0.5, input_shape=SHAPE)
    names = [name.replace("2.weight", "2.0.weight").replace("2.bias", "2.0.bias") for name in NAMES]
    assert list(model.specs) == list(model.module.state_dict()) == (names if kind == "nested" else NAMES)
    assert model.config.architecture == "Sequential"
    assert all(spec.macs_per_weight for spec in model.specs.values() if spec.weight)
    torch.testing.assert_close(model.module(X), unwrapped(module)(X))


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel_comes_off():
    wrapped = nn.parallel.DistributedDataParallel(network())
    assert list(convert(wrapped, sparsity=0.5, input_shape=SHAPE).masks) == NAMES[::2]


@pytest.mark.usefixtures("one_process")
def test_a_network_split_between_processes_is_refused():
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    with pytest.raises(UsageError, match="split between processes.*before it is wrapped"):
        convert(FullyShardedDataParallel(network(), device_id=torch.device("cpu")), sparsity=0.5)
    module = network()
    fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(UsageError, match="split between processes.*before fully_shard"):
        convert(module, sparsity=0.5)


@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, X)])
@pytest.mark.parametrize("paths", [("",), ("2",)])
def test_torchscript_is_refused_with_what_to_give(make, paths):
    module = make(network()) if paths == ("",) else network()
    if paths != ("",):
        module[2] = torch.jit.script(module[2])
    with pytest.raises(UsageError, match="TorchScript module.*give the network that it was scripted or traced from"):
        convert(module, sparsity=0.5, input_shape=SHAPE)


def test_a_model_that_is_wrapped_later_says_so_before_it_is_saved(tmp_path):
    model = convert(network(), sparsity=0.5, input_shape=SHAPE)
    model.module = torch.compile(model.module)
    with pytest.raises(Exception, match="'0.weight' is '_orig_mod.0.weight'.*without the wrapper"):
        model.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("source", [{"0.weight": torch.ones(3)}, None, 3, nn.Sequential])
def test_what_is_no_network_is_refused(source):
    with pytest.raises(UsageError, match="expected a torch.nn.Module"):
        convert(source, sparsity=0.5)


def test_a_model_is_loaded_into_a_wrapped_network(tmp_path):
    model = convert(network(), sparsity=0.5, input_shape=SHAPE)
    model.save(tmp_path / "m")
    loaded = load(tmp_path / "m", torch.compile(nn.DataParallel(network())))
    assert torch.equal(loaded.module(X), model.module(X))


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


class LowRank(nn.Module):
    def forward(self, base, left, right):
        return base + left @ right

    def right_inverse(self, weight):
        return weight, torch.ones(len(weight), 1), torch.ones(1, weight[0].numel())


def parametrized(parametrization):
    def wrap(layer):
        parametrize.register_parametrization(layer, "weight", parametrization())
        return layer

    return wrap


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "a function": parametrized(Doubled),
    "two functions": lambda layer: parametrized(Doubled)(parametrizations.weight_norm(layer)),
    "low rank": parametrized(LowRank),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_become_plain_parameters_exactly(kind):
    paths = ("4",) if kind == "low rank" else ("2", "4")
    module = inside(COMPUTED[kind], *paths)().train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01)  # what a hook computed before is out of date
        expected = module.eval()(X)
    module.train()
    plain = make_plain(module)
    assert plain.notes == (
        f"computed weights became plain parameters: {', '.join(f'{path}.weight' for path in paths)}",
    )
    assert list(module.state_dict()) == NAMES and type(module[2]) is nn.Conv2d and module[2].training
    assert all(parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(X), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", COMPUTED)
def test_their_zeros_are_zeros_of_what_is_computed_with(kind, tmp_path):
    wrap = inside(COMPUTED[kind], "4")
    model = convert(wrap(), sparsity=0.8, input_shape=SHAPE)
    assert list(model.masks) == NAMES[::2] and model.specs["4.weight"].macs_per_weight == 1
    assert float((model.module[4].weight == 0).float().mean()) == pytest.approx(0.8, abs=1e-3)
    model.save(tmp_path / "m")
    assert torch.equal(load(tmp_path / "m", wrap()).module(X), model.module(X))


def test_frozen_weights_stay_frozen_and_biases_may_be_computed():
    module = network()
    module[4].weight.requires_grad_(False)
    parametrizations.weight_norm(module[4])
    module[4].parametrizations.weight.requires_grad_(False)
    parametrize.register_parametrization(module[2], "bias", Doubled())
    make_plain(module)
    assert not module[4].weight.requires_grad and module[2].weight.requires_grad
    assert "2.parametrizations.bias.original" in module.state_dict()


def test_a_weight_that_is_random_is_refused():
    class Noise(nn.Module):
        def forward(self, weight):
            return weight * torch.rand_like(weight)

    with pytest.raises(UsageError, match="'4.weight' has other values each time.*remove_parametrizations"):
        convert(inside(parametrized(Noise), "4")(), sparsity=0.5)


def test_pruned_and_computed_weights_in_one_network():
    module = inside(parametrizations.weight_norm, "4")()
    prune.l1_unstructured(module[2], "weight", 0.5)
    plain = make_plain(module)
    assert list(plain.masks) == ["2.weight"] and list(module.state_dict()) == NAMES
