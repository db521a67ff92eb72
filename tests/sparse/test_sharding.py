"""Models whose weights are spread over processes are refused in one sentence; replicas are not."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from converters.conversion import convert
from dsr_tool import attach
from dsr_tool.errors import UsageError

pytestmark = pytest.mark.usefixtures("alone")


def sparse():
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return convert(network, sparsity=0.5, input_shape=(8,), positions="random")


def try_to_attach(model):
    attach(model, torch.optim.SGD(model.module.parameters(), 0.1), "static")


def test_fully_sharded_modules_are_refused():
    from torch.distributed.fsdp import fully_shard

    model = sparse()
    fully_shard(model.module)
    with pytest.raises(UsageError, match="sharded by FSDP.*DistributedDataParallel"):
        try_to_attach(model)


def test_modules_that_are_sharded_after_attach_are_refused_at_the_first_step():
    from torch.distributed.fsdp import fully_shard

    model = sparse()
    optimizer = torch.optim.SGD(model.module.parameters(), 0.1)
    attach(model, optimizer, "static")
    fully_shard(model.module)
    model.module(torch.randn(4, 8)).sum().backward()
    with pytest.raises(UsageError, match="sharded by FSDP.*DistributedDataParallel"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("original", [True, False])
def test_modules_wrapped_in_fsdp_are_refused_inside_and_outside(original):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = sparse()
    wrapper = FullyShardedDataParallel(model.module, use_orig_params=original, device_id=torch.device("cpu"))
    for module in (model.module, wrapper):
        model.module = module
        with pytest.raises(UsageError, match="sharded by FSDP"):
            try_to_attach(model)


def test_tensor_parallel_modules_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = sparse()
    parallelize_module(model.module, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
    with pytest.raises(UsageError, match="sharded by tensor parallelism"):
        try_to_attach(model)


def test_replicated_modules_are_trained():
    model = sparse()
    replica = DistributedDataParallel(model.module)
    optimizer = torch.optim.SGD(model.module.parameters(), 0.1)
    attach(model, optimizer, "static")
    replica(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    model.check()
