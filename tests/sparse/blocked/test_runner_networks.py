"""Whole networks run on kernels, with the outputs, gradients and buffers that torch gives them."""

import pytest
import torch
from torchvision import models

from converters.paper_networks import Perceptron, WideResNet
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
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "vgg11_bn" else name for name in FAMILIES]
)
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


def convnext():
    block = models.convnext.CNBlockConfig
    return models.ConvNeXt([block(16, 32, 1), block(32, None, 1)], 0.0, 1.0, num_classes=5)


TOKENS = {
    "vit": lambda: models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5),
    "convnext": convnext,
    "swin": lambda: models.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=5
    ),
    "swin_v2": lambda: models.SwinTransformer(
        [4, 4],
        16,
        [2, 2],
        [2, 4],
        [4, 4],
        stochastic_depth_prob=0.0,
        num_classes=5,
        block=models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=models.swin_transformer.PatchMergingV2,
    ),
    "maxvit": lambda: models.MaxVit((32, 32), 16, 4, [16, 32], [1, 1], 8, stochastic_depth_prob=0.0, num_classes=5),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TOKENS)
def test_a_network_of_tokens_runs_its_layers_on_kernels(networks, name, training):
    network = TOKENS[name]()
    for name_, parameter in network.named_parameters():
        # The last layer of a ViT and the scales of ConvNeXt start at zero, which hides all before them.
        if name_.startswith("heads") or name_.endswith("layer_scale"):
            torch.nn.init.normal_(parameter, std=0.3)
    found = networks.compare(networks.smooth(network), torch.randn(5, 3, 32, 32), training=training)
    found.check()
    coverage = found.runner.coverage
    assert coverage.sparse_on_kernels == coverage.sparse
    # Each attention of Swin runs as it is, and multiplies by the weights of its layers itself.
    assert len(coverage.notes) == 4 * name.startswith("swin")


@pytest.mark.parametrize("training", [True, False])
def test_a_perceptron_runs_on_kernels_with_its_norms(networks, training):
    found = networks.compare(networks.smooth(Perceptron(64, [32, 16], 10)), torch.randn(24, 1, 8, 8), training=training)
    found.check()
    assert found.calls["dsr_conv"] >= 5 and found.calls["dsr_norm_forward"] == 3
    assert found.runner.coverage.torch == ("flatten",)


def test_a_segmenter_returns_a_dictionary(networks):
    network = models.segmentation.lraspp_mobilenet_v3_large(num_classes=4, weights_backbone=None)
    found = networks.compare(network, torch.randn(3, 3, 64, 64), training=False)
    found.check()
    assert set(found.runner.coverage.torch) == {"interpolate"}
    assert list(found.runner(torch.randn(3, 3, 64, 64))) == ["out"]
