"""Whole networks that go through an archive compute what PyTorch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dsr_tool.formats.archive import write_archive
from dsr_tool.runtime import Session
from dsr_tool.runtime.kernels.library import library
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor


class Residual(nn.Module):
    """A block of MobileNetV3: expand, depthwise, squeeze-and-excite, project, add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()
        )
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 8, 1), nn.SiLU(), nn.Conv2d(8, wide, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(self.expand(x))
        return x + self.project(y * self.excite(y))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 32, 3, padding=2, dilation=2, groups=4),
        nn.BatchNorm2d(32),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d(2, 1, padding=1),
        nn.AdaptiveAvgPool2d((2, 2)),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(128, 10),
    )


class Encoder(nn.Module):
    """A small vision transformer: patches, a class token, two layers of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 24))
        layer = nn.TransformerEncoderLayer(24, 4, 48, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1)
        return self.head(self.layers(x)[:, 0])


def sparsified(module: nn.Module, density: float) -> dict[str, SparseTensor]:
    """Masks every weight in place, randomizes the norms, and returns all tensors by name."""
    tensors = {}
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for values in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    values.uniform_(0.5, 1.5)
        for name, value in module.state_dict().items():
            mask = torch.rand(value.shape) < density if value.dim() > 1 else torch.ones(value.shape, dtype=torch.bool)
            value.mul_(mask)
            tensors[name] = SparseTensor.from_dense(value.numpy(), Mask.from_bool(mask.numpy()))
    return tensors


@pytest.fixture(scope="module", params=[convolutional, Encoder])
def network(request):
    torch.manual_seed(0)
    module = request.param().eval()
    return module, trace(module, (3, 16, 16))


@pytest.mark.parametrize("density", [0.0, 0.1, 0.3, 1.0])
def test_networks_agree_with_torch(network, tmp_path: Path, density):
    module, graph = network
    torch.manual_seed(1)
    for layer in module.modules():
        if layer is not module and hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    tensors = sparsified(module, density)
    specs = {
        name: LayerSpec(name, tensor.mask.shape, "", "sparse" if len(tensor.mask.shape) > 1 else "dense", True, "")
        for name, tensor in tensors.items()
    }
    write_archive(tmp_path / "net.dsr", tensors, specs, graph, ModelConfig("module", "Net", 10, (3, 16, 16)))
    if library() is not None:
        for batch in (1, 3):
            assert not Session(tmp_path / "net.dsr", runtime="native", batch=batch).coverage.fallbacks
    session = Session(tmp_path / "net.dsr")
    for batch in (1, 3):
        x = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            expected = module(x).numpy()
        found = session.run(x.numpy())
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))
