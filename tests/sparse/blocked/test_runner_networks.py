import pytest
import torch
from torchvision import models

from converters.paper_networks import WideResNet
from dsr_tool.runtime.kernels.training import available

pytestmark = pytest.mark.skipif(not available(), reason="needs the compiled kernels")


RESIDUAL = {
    "resnet18": lambda: models.resnet18(num_classes=10),
    "resnet50": lambda: models.resnet50(num_classes=10),
    "wrn-16-1": lambda: WideResNet(16, 1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", RESIDUAL)
def test_a_residual_network_runs_on_kernels_alone(networks, name, training):
    found = networks.compare(
        networks.smooth(RESIDUAL[name]()), torch.randn(12, 3, 48, 48), training=training, skip=("conv1.weight",)
    )
    found.check()
    coverage = found.runner.coverage
    assert coverage.sparse_on_kernels == coverage.sparse > 9
    assert found.calls["dsr_conv"] >= 2 * coverage.sparse and found.calls["dsr_conv_weights"] == coverage.sparse
