"""Small networks, one for each way in which a layer, a sum or an activation may be written."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

from dsr_tool.runtime.kernels.training import available

pytestmark = pytest.mark.skipif(not available(), reason="needs the compiled kernels")


class Net(nn.Module):
    """A network with a body of its own between a convolution and a classifier."""

    def __init__(self, body, **modules):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        for name, module in modules.items():
            self.add_module(name, module)
        self.body = body

    def forward(self, x):
        return self.body(self, self.norm(self.first(x)))


def conv(inputs=8, outputs=8, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2, **options})


def residual_in_place(net, x):
    out = net.norm2(net.c(x))
    out += x
    return net.act(out)


def write_seen_later(net, x):
    y = net.c(x)
    functional.relu(y, inplace=True)
    return y + torch.sigmoid(y)


def alias_seen_later(net, x):
    y = x = net.c(x)
    x += 1.0
    return y * 2.0


def squeeze(net, x):
    scale = torch.sigmoid(net.up(functional.silu(net.down(functional.adaptive_avg_pool2d(x, 1)))))
    return scale * x


def shuffle(net, x):
    batch, channels, height, width = x.size()
    x = net.c(x).view(batch, 2, channels // 2, height, width)
    x = torch.transpose(x, 1, 2).contiguous().view(batch, -1, height, width)
    one, other = x.chunk(2, dim=1)
    return torch.cat((net.part(one), other), dim=1)


def heads(net, x):
    pooled = functional.max_pool2d(x, 3, 2, 1)
    return {"mean": net.fc(x.mean([2, 3])), "flat": net.wide(torch.flatten(functional.avg_pool2d(pooled, 2), 1))}


def broadcast(net, x):
    return net.frozen(net.c(x) * net.p["scale"]) + net.p["shift"]


def beside_and_below(net, x):
    y = net.c(x)
    return net.d(torch.cat((x, y), 2)).mean((2, 3)) + net.d(torch.cat([x, y], dim=-1)).mean((2, 3))


def numbers(net, x):
    count = x.shape[1]
    other = count
    count += 1
    return net.c(x) * 0.5 + x * other / 4.0 - count


def norm(**options):
    return nn.BatchNorm2d(8, **options)


def switched_off():
    module = norm()
    module.track_running_stats = False
    return module


BODIES = {
    "conv relu": (lambda net, x: functional.relu(net.c(x)), {"c": conv()}),
    "relu6 after norm": (lambda net, x: functional.relu6(net.norm2(net.c(x))), {"c": conv(), "norm2": norm()}),
    "leaky": (lambda net, x: net.act(net.norm2(net.c(x))), {"c": conv(), "norm2": norm(), "act": nn.LeakyReLU(0.2)}),
    "hardswish": (lambda net, x: net.act(net.norm2(net.c(x))), {"c": conv(), "norm2": norm(), "act": nn.Hardswish()}),
    "residual": (residual_in_place, {"c": conv(), "norm2": norm(), "act": nn.SiLU(inplace=True)}),
    "residual of norms": (
        lambda net, x: torch.relu(torch.add(net.norm2(net.c(x)), net.norm3(net.d(x)))),
        {"c": conv(), "d": conv(kernel=1), "norm2": norm(), "norm3": norm()},
    ),
    "sum relu": (lambda net, x: (net.c(x) + x).relu(), {"c": conv()}),
    "sum of itself": (
        lambda net, x: torch.relu(operator.add(y := net.norm2(net.c(x)), y)),
        {"c": conv(), "norm2": norm()},
    ),
    "pre-activation": (lambda net, x: x + net.c(functional.silu(net.norm2(x))), {"c": conv(), "norm2": norm()}),
    "write seen later": (write_seen_later, {"c": conv()}),
    "alias seen later": (alias_seen_later, {"c": conv()}),
    "grouped": (lambda net, x: net.d(net.c(x)), {"c": conv(groups=4), "d": conv(groups=8, stride=2)}),
    "dilated": (lambda net, x: net.c(x), {"c": conv(dilation=2, padding="same")}),
    "odd kernel": (lambda net, x: net.c(x), {"c": nn.Conv2d(8, 5, (1, 3), (2, 1), (0, 1))}),
    "reflected": (lambda net, x: net.c(x), {"c": conv(padding_mode="reflect")}),
    "squeeze": (squeeze, {"down": nn.Conv2d(8, 4, 1), "up": nn.Conv2d(4, 8, 1)}),
    "shuffle": (shuffle, {"c": conv(), "part": nn.Conv2d(4, 4, 1)}),
    "heads": (heads, {"fc": nn.Linear(8, 5), "wide": nn.Linear(8 * 9, 5)}),
    "broadcast": (
        broadcast,
        {
            "c": conv(),
            "p": nn.ParameterDict({"scale": torch.linspace(1, 2, 8).view(8, 1, 1), "shift": torch.ones(1, 8, 1, 1)}),
            "frozen": FrozenBatchNorm2d(8),
        },
    ),
    "beside and below": (beside_and_below, {"c": conv(), "d": conv()}),
    "images cut in two": (lambda net, x: net.d(net.c(x).reshape(-1, 4, 12, 12)), {"c": conv(), "d": conv(4, 4)}),
    "norm called twice": (
        lambda net, x: torch.relu(net.norm2(net.c(x)) + net.norm2(net.d(x))),
        {"c": conv(), "d": conv(kernel=1), "norm2": norm()},
    ),
    "norm switched off": (lambda net, x: net.norm2(net.c(x)), {"c": conv(), "norm2": switched_off()}),
    "numbers": (numbers, {"c": conv()}),
    "frozen norm": (lambda net, x: net.norm2(net.c(x)), {"c": conv(), "norm2": norm().eval()}),
    "norm without affine": (lambda net, x: net.norm2(net.c(x)), {"c": conv(), "norm2": norm(affine=False)}),
    "norm without history": (
        lambda net, x: net.norm2(net.c(x)),
        {"c": conv(), "norm2": norm(track_running_stats=False)},
    ),
    "norm with mean history": (lambda net, x: net.norm2(net.c(x)), {"c": conv(), "norm2": norm(momentum=None)}),
    "shared": (lambda net, x: net.norm2(net.c(net.norm2(net.c(x)))), {"c": conv(), "norm2": norm()}),
    "two sizes of one layer": (
        lambda net, x: net.c(x).mean((2, 3)) + net.c(functional.avg_pool2d(x, 2)).mean((2, 3)),
        {"c": conv()},
    ),
    "layer without a kernel": (lambda net, x: net.t(net.c(x)), {"c": conv(), "t": nn.ConvTranspose2d(8, 4, 2, 2)}),
    "layer norm": (lambda net, x: net.c(functional.layer_norm(x, x.shape[2:])), {"c": conv()}),
    "prelu": (lambda net, x: net.act(net.c(x)), {"c": conv(), "act": nn.PReLU(8)}),
    "instance scale": (lambda net, x: net.c(x) / (1.0 + x.square().mean((1, 2, 3), keepdim=True)), {"c": conv()}),
    "tokens": (
        lambda net, x: net.attend(y := x.flatten(2).transpose(1, 2), y, y)[0] + net.fc(y),
        {"attend": nn.MultiheadAttention(8, 2, batch_first=True), "fc": nn.Linear(8, 8)},
    ),
    "tokens first": (
        lambda net, x: net.attend(y := x.flatten(2).permute(2, 0, 1), y, y, need_weights=False)[0],
        {"attend": nn.MultiheadAttention(8, 2)},
    ),
    "cross attention": (
        lambda net, x: net.attend(y := x.flatten(2).transpose(1, 2), y[:, :5], y[:, :5])[0],
        {"attend": nn.MultiheadAttention(8, 2, batch_first=True)},
    ),
}


@pytest.mark.parametrize("images", [16, 5, 2])
@pytest.mark.parametrize("name", BODIES)
def test_every_spelling_has_the_outputs_gradients_and_buffers_of_torch(networks, name, images):
    body, modules = BODIES[name]
    network = Net(body, **modules)
    # Two passes: the second one runs without being observed.
    found = networks.compare(network, torch.randn(images, 3, 12, 12), density=0.4, passes=2)
    found.check()
    assert found.calls["dsr_conv"] >= 4


@pytest.mark.parametrize("images", [16, 3, 1])
@pytest.mark.parametrize("name", [name for name in BODIES if name not in ("frozen norm",)])
def test_every_spelling_has_them_in_evaluation(networks, name, images):
    body, modules = BODIES[name]
    networks.compare(Net(body, **modules), torch.randn(images, 3, 12, 12), training=False, density=0.4).check()


FUSED = {"residual": 1, "residual of norms": 2, "relu6 after norm": 1, "pre-activation": 1, "hardswish": 1}


@pytest.mark.parametrize("name", FUSED)
def test_a_norm_takes_the_sum_and_the_activation_behind_it(networks, name):
    body, modules = BODIES[name]
    found = networks.compare(Net(body, **modules), torch.randn(16, 3, 12, 12), density=0.4)
    assert found.calls["dsr_norm_forward"] == 1 + FUSED[name]
    # An activation that needs its argument runs by itself behind a residual.
    assert found.calls["dsr_add_act_forward"] == (1 if name == "residual" else 0)


def test_attention_drops_nothing_in_evaluation(networks):
    body, _ = BODIES["tokens first"]
    network = Net(body, attend=nn.MultiheadAttention(8, 2, dropout=0.5))
    networks.compare(network, torch.randn(4, 3, 6, 6), training=False, density=0.4).check()


@pytest.mark.parametrize("name", ["layer without a kernel", "reflected", "cross attention"])
def test_what_has_no_kernel_runs_with_a_dense_weight_made_for_the_moment(networks, name):
    body, modules = BODIES[name]
    coverage = networks.compare(Net(body, **modules), torch.randn(16, 3, 12, 12), density=0.4).runner.coverage
    assert coverage.sparse_on_kernels < coverage.sparse and coverage.torch


def test_a_dense_layer_and_a_nearly_dense_one_are_right_as_well(networks):
    network = Net(lambda net, x: net.fc(net.d(net.c(x)).mean([2, 3])), c=conv(), d=conv(kernel=1), fc=nn.Linear(8, 4))
    networks.compare(network, torch.randn(16, 3, 9, 9), density=1.0).check()
    networks.compare(network, torch.randn(16, 3, 9, 9), skip=("c.weight", "d.weight", "fc.weight")).check()
