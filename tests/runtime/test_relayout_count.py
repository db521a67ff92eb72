"""The number of relayouts of a whole network is pinned: each moves a value, and a wrong look-ahead only costs time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision

from dsr_tool.graph.fold import fold_norms
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.compiler.program import KernelStep
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.ops import Kind
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")


def test_efficientnet_b0_has_four_relayouts():
    """One loads the input, three follow where the grid has become too fine; without a look-ahead there are ten."""
    torch.manual_seed(0)
    module = torchvision.models.efficientnet_b0().eval()
    tensors = {}
    rng = np.random.default_rng(0)
    for name, value in module.state_dict().items():
        mask = rng.random(tuple(value.shape)) < (0.02 if value.dim() > 1 else 1)
        tensors[name] = SparseTensor.from_dense(value.numpy(), Mask.from_bool(mask))
    graph = trace(module, (3, 224, 224))
    graph, tensors = fold_norms(graph, {name: tensors[name] for name in graph.parameters})
    plan = Plan(graph, tensors, (1, 3, 224, 224), Machine(library(), 1))
    assert not plan.coverage.fallbacks
    ops = [op for step in plan.steps if isinstance(step, KernelStep) for op in step.ops]
    assert sum(op.kind in (Kind.RELAYOUT, Kind.GATHER) and op.out_stride > 0 for op in ops) == 4
