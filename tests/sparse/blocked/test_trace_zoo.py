"""Every classifier of torchvision can be traced; only Swin's attention stays whole."""

import pytest
import torch
import torchvision
from torch.utils import _pytree as pytree

from dsr_tool.sparse.blocked.mutation import redirect_writes
from dsr_tool.sparse.blocked.trace import trace
from dsr_tool.sparse.compact.change import compacted

# The largest RegNet needs 2.6 GB, and is built like the others.
NAMES = [name for name in torchvision.models.list_models(module=torchvision.models) if name != "regnet_y_128gf"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_classifier_is_traced(name):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    # RegNets compute their widths with tensors, so they need real ones.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        network = torchvision.models.get_model(name, **options)
    masks = {
        f"{path}.weight": torch.zeros(1, dtype=torch.bool)
        for path, module in network.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    network.to("meta")
    store = compacted(network, masks)
    leaves, spec = pytree.tree_flatten(((torch.empty(2, 3, 224, 224, device="meta"),), {}))
    for training in (True, False):
        network.train(training)
        graph = trace(network, store, leaves, spec)
        redirect_writes(graph)
        kinds = {type(graph.modules[path]).__name__ for path in graph.notes}
        assert kinds == ({"ShiftedWindowAttention" + "V2" * ("v2" in name)} if name.startswith("swin") else set())
