"""What a network computes with: multiply-adds and zeros of functions of weights."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from converters.conversion import convert
from dsr_tool.errors import CheckFailed
from dsr_tool.sparse.computed import shortfalls
from dsr_tool.sparse.discover import discover
from dsr_tool.sparse.macs import with_macs

SHAPE = (3, 8, 8)
WORDS = "the network computes with a function of it"


def layer_of(function, kind=nn.Conv2d):
    """Returns a class of layers that compute with a function of their weight."""

    def forward(self, x):
        weight = function(self.weight)
        if isinstance(self, nn.Linear):
            return functional.linear(x, weight, self.bias)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)

    return type("Computing", (kind,), {"forward": forward})


def network(function=None):
    torch.manual_seed(0)
    convolution, linear = (
        (nn.Conv2d, nn.Linear) if function is None else [layer_of(function, kind) for kind in (nn.Conv2d, nn.Linear)]
    )
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), convolution(8, 8, 3), nn.Flatten(), linear(128, 10))


def centred(weight):
    return weight - weight.mean(tuple(range(1, weight.ndim)), keepdim=True)


def standardised(weight):
    return centred(weight) / (weight.std(tuple(range(1, weight.ndim)), keepdim=True) + 1e-5)


DENSER = {
    "centred": centred,
    "standardised": standardised,
    "shifted": lambda weight: weight + 1,
    "binary, zero counts as one": lambda weight: torch.where(weight >= 0, 1.0, -1.0),
    "smoothed": lambda weight: weight + weight.roll(1, 0),
}
KEPT = {
    "scaled": lambda weight: weight * 2,
    "masked": lambda weight: weight * (weight > 0),
    "cast": lambda weight: weight.bfloat16().float(),
    "rounded": lambda weight: torch.fake_quantize_per_tensor_affine(weight, 0.01, 0, -127, 127),
    "flipped": lambda weight: weight.flip(1),
    "sign": torch.sign,
    "copied": lambda weight: weight.clone().reshape(weight.shape),
}


@pytest.mark.parametrize("function", [*DENSER.values(), *KEPT.values()], ids=[*DENSER, *KEPT])
def test_multiply_adds_of_a_function_of_a_weight_are_those_of_the_plain_layer(function):
    plain, computing = (with_macs(module, discover(module), SHAPE) for module in (network(), network(function)))
    assert {name: spec.macs_per_weight for name, spec in plain.items()} == {
        name: spec.macs_per_weight for name, spec in computing.items()
    }
    assert [name for name, spec in computing.items() if WORDS in spec.reason] == ["2.weight", "4.weight"]
    assert not any(WORDS in spec.reason for spec in plain.values())


@pytest.mark.parametrize("function", KEPT.values(), ids=KEPT)
def test_functions_that_keep_zeros_convert(function):
    assert convert(network(function), sparsity=0.8, input_shape=SHAPE).sparsity == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("function", DENSER.values(), ids=DENSER)
@pytest.mark.parametrize("options", [{"sparsity": 0.8}, {"budget": "500params"}])
def test_functions_that_lose_zeros_are_refused_with_the_layers(function, options):
    with pytest.raises(CheckFailed, match=r"fewer zeros than asked: .*2.weight \(\d.*--keep-dense .[24]"):
        convert(network(function), input_shape=SHAPE, **options)
    dense = convert(network(function), input_shape=SHAPE, sparsity=0.8, keep_dense=["2", "4"])
    assert list(dense.masks) == ["0.weight"]
    assert not shortfalls(convert(network(function), input_shape=SHAPE, sparsity=0))


def test_zeros_of_given_weights_are_looked_at_too():
    module = network(centred)
    module[2].weight.data[:, 0] = 0
    with pytest.raises(CheckFailed, match=r"2.weight \(0.0% zeros for 12.5%\)"):
        convert(module, sparsity="keep", input_shape=SHAPE)


def test_the_shares_are_exact():
    module = network(lambda weight: weight + (weight.detach() * 0 + 1) * (weight == weight.max()))
    model = convert(module, sparsity=0.75, input_shape=SHAPE)  # the largest weight stays, so nothing is denser
    module[2].weight.data.view(-1)[:] = model.masks["2.weight"].view(-1).float() * 0
    (found,) = [one for one in shortfalls(model) if one.names == ("2.weight",)]
    assert found.wanted == pytest.approx(1 - model.counts["2.weight"] / 576) and found.found == 0


class Fused(nn.Module):
    """Two layers in one product."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(32, 48), nn.Linear(32, 16), nn.Linear(64, 10)

    def forward(self, x):
        return self.out(functional.linear(x, torch.cat([self.first.weight, self.second.weight])))


class LowRank(nn.Module):
    """A weight with a product of two others added."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(32, 48), nn.Linear(32, 4), nn.Linear(4, 48)

    def forward(self, x):
        return functional.linear(x, self.base.weight + self.up.weight @ self.down.weight)


def test_weights_in_one_product_share_its_multiply_adds():
    for distribution in ("uniform", "erk"):  # layers of other densities, whose zeros are all kept
        model = convert(Fused(), sparsity=0.8, distribution=distribution, input_shape=(32,))
        assert [spec.macs_per_weight for spec in model.specs.values() if spec.weight] == [1, 1, 1]


def test_every_kind_of_layer_with_weights_counts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.two, self.one = nn.Bilinear(6, 6, 20), nn.Conv1d(2, 8, 3)
            self.wide, self.turned = nn.Conv3d(1, 4, 1), nn.ConvTranspose1d(8, 4, 2)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            y = self.turned(self.one(x[:, None].repeat(1, 2, 1)))
            z = (
                self.wide(x[:, None, None, None]).mean((1, 2, 3))
                + self.attention(x[:, None], x[:, None], x[:, None])[0]
            )
            return self.two(x, x).sum(1) + y.mean((1, 2)) + z.sum((1, 2))

    specs = with_macs(Net(), discover(Net()), (6,))
    found = {name: spec.macs_per_weight for name, spec in specs.items() if spec.weight}
    assert all(found.values()) and found["two.weight"] == 1 and found["one.weight"] == 4


def test_a_sum_with_a_dense_product_is_refused():
    with pytest.raises(CheckFailed, match="base.weight, down.weight and up.weight"):
        convert(LowRank(), sparsity=0.8, input_shape=(32,))


def test_what_depends_on_no_input_and_what_depends_on_it_are_told_apart():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.gate = nn.Linear(32, 32), nn.Linear(32, 32)
            self.register_buffer("last", torch.zeros(2, 32))

        def forward(self, x):
            self.last.copy_(self.layer(x))
            return functional.linear(x, self.gate.weight * self.last.mean())  # its values are those of one input

    module = Gated()
    specs = with_macs(module, discover(module), (32,))
    assert specs["layer.weight"].macs_per_weight == 1
    assert not any(WORDS in spec.reason for spec in specs.values())


def test_networks_that_decide_by_values_are_counted_on_noise():
    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer_of(centred, nn.Linear)(32, 32)

        def forward(self, x):
            return self.layer(x) if x.sum() > -1e9 else x

    with pytest.raises(CheckFailed, match=r"fewer zeros than asked: layer.weight \(0.0% zeros for 80"):
        convert(Deciding(), sparsity=0.8, input_shape=(32,))


def test_the_command_line_says_it_and_writes_nothing(tmp_path, run, monkeypatch):
    (tmp_path / "nets_of_computed_test.py").write_text(
        "import torch\n"
        "class Layer(torch.nn.Linear):\n"
        "    def forward(self, x): return torch.nn.functional.linear(x, self.weight - self.weight.mean(1, True))\n"
        "def net(): return torch.nn.Sequential(Layer(32, 32), torch.nn.Linear(32, 8))\n"
    )
    monkeypatch.chdir(tmp_path)
    given = ("convert", "nets_of_computed_test:net", "--input-shape", "32", "--sparsity", "0.8", "-o", "m")
    code, out, err = run(*given)
    assert (code, out) == (3, "") and "fewer zeros than asked: 0.weight (" in err and "Traceback" not in err
    assert not (tmp_path / "m").exists()
    code, out, _ = run(*given, "--keep-dense", "0", "--json")
    layers = {layer["name"]: layer for layer in json.loads(out)["layers"]}
    assert code == 0 and layers["0.weight"]["macs_per_weight"] == 1 and WORDS in layers["0.weight"]["reason"]
