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


FAMILIES = {
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "densenet121": {},
    "squeezenet1_1": {},
    "efficientnet_b0": {},
    "googlenet": {"aux_logits": True, "init_weights": False},
    "vgg11_bn": {},
    "shufflenet_v2_x0_5": {},
    "mnasnet0_5": {},
    "regnet_y_400mf": {},
}


def family(name, options):
    network = getattr(models, name)(num_classes=10, **options)
    for module in network.modules():
        # Random numbers are drawn for lanes here, in another order than in rows.
        if isinstance(module, torch.nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return network


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_convolutional_network_of_torchvision_runs_on_kernels_alone(networks, name, training):
    # Max pools and functional ReLUs keep their kinks, at which another rounding is another gradient: one in a few.
    for seed in range(4):
        torch.manual_seed(seed)
        network = networks.smooth(family(name, FAMILIES[name]))
        found = networks.compare(network, torch.randn(6, 3, 64, 64), training=training)
        if not found.bad():
            break
    found.check()
    coverage = found.runner.coverage
    assert coverage.sparse_on_kernels == coverage.sparse > 9
    assert not coverage.torch and not coverage.notes
