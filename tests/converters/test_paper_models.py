"""LeNet-300-100 and wide residual networks: published counts, dense layers, and the way to file and runtime."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from converters.conversion import convert
from converters.loading import load
from converters.paper_models import build
from converters.paper_networks import Perceptron, WideResNet
from dsr_tool.errors import FormatError, UsageError
from dsr_tool.runtime import Session
from dsr_tool.sparsity.config import ModelConfig
from exporters.export import export
from exporters.onnx.session import onnx_session

SHORTCUTS = [f"groups.{i}.0.shortcut.weight" for i in range(3)]


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("depth", "widen", "millions"),
    # Zagoruyko & Komodakis 2016, tables 4 and 5; 28-2 as in Oliver et al. 2018, section 4.1 (1.5 M; exactly 1.47 M).
    [(40, 1, 0.6), (40, 2, 2.2), (40, 4, 8.9), (16, 8, 11.0), (28, 10, 36.5), (28, 2, 1.5)],
)
def test_wide_residual_networks_have_the_published_parameters(depth, widen, millions):
    with torch.device("meta"):
        assert round(parameters(WideResNet(depth, widen)) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "total", "layers", "prunable"),
    # Counted by running the code of Mostafa & Wang: all parameters, sparse tensors, and their sizes in all.
    [
        ("lenet-300-100", 267_020, 3, 266_200),
        ("wrn-28-2", 1_467_610, 24, 1_451_520),
        ("wrn-22-2", 1_079_642, 18, 1_064_448),
    ],
)
def test_preset_paper_prunes_what_the_authors_prune(name, total, layers, prunable):
    model = convert(name, sparsity="0.9", preset="paper")
    assert (model.parameters, len(model.masks), model.prunable_weights) == (total, layers, prunable)
    assert model.active_weights == round(prunable / 10)
    kept = [key for key, spec in model.specs.items() if spec.weight and spec.role == "dense"]
    assert kept == ([] if name == "lenet-300-100" else ["conv1.weight", *SHORTCUTS, "fc.weight"])


def test_widen_factors_may_be_fractions():
    # The authors' thin networks, counted by running their code.
    for widen, count in ((0.75, 209_130), (0.98, 356_376), (1.18, 520_105), (1.45, 772_558)):
        assert parameters(WideResNet(28, widen)) == count
    narrowest = WideResNet(10, 0.001)
    assert narrowest.fc.in_features == 1
    assert narrowest(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    with pytest.raises(UsageError, match="depth 20 is not allowed"):
        WideResNet(20, 2)


def test_convolutions_start_as_in_he_et_al():
    torch.manual_seed(0)
    module = WideResNet(16, 2)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            wanted = math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels))
            assert layer.weight.std().item() == pytest.approx(wanted, rel=0.1)
    assert not module.fc.bias.any()


def test_the_perceptron_has_normalisation_instead_of_biases():
    module = Perceptron(12, [5, 4], 3)
    assert [name for name, _ in module.named_parameters()] == [
        f"{kind}{i}.{what}" for i in (1, 2, 3) for kind, what in (("fc", "weight"), ("bn", "weight"), ("bn", "bias"))
    ]
    assert [type(child).__name__ for child in module][-3:] == ["ReLU", "Linear", "BatchNorm1d"]


@pytest.mark.parametrize(
    ("name", "options", "shape", "inputs"),
    [
        ("lenet-300-100", {"input_size": 8, "num_classes": 7}, (1, 8, 8), 64),
        ("lenet-300-100", {"input_shape": (3, 4, 5)}, (3, 4, 5), 60),
        ("wrn-22-2", {"input_shape": (1, 16, 16), "num_classes": 100}, (1, 16, 16), 1),
    ],
)
def test_other_inputs_and_classes_are_saved_and_loaded(tmp_path, name, options, shape, inputs):
    model = convert(name, sparsity=0.8, seed=5, **options)
    assert (model.config.source, model.config.input_shape) == ("paper", shape)
    assert next(iter(model.module.parameters())).shape[1] == inputs
    assert len(model.config.preprocessing.mean) == shape[0]
    assert model(torch.randn(2, *shape)).shape == (2, options.get("num_classes", 10))
    model.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert all(torch.equal(again.module.state_dict()[key], value) for key, value in model.module.state_dict().items())
    assert again.config == ModelConfig.from_dict(model.config.to_dict())


def test_seeds_and_files_give_weights(tmp_path):
    one, same, other = (convert("lenet-300-100", sparsity=0.9, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.module.fc1.weight, same.module.fc1.weight)
    assert not torch.equal(one.module.fc1.weight, other.module.fc1.weight)
    state = build("lenet-300-100", 4).state_dict()
    torch.save(state, tmp_path / "w.pth")
    model = convert("lenet-300-100", weights=str(tmp_path / "w.pth"), num_classes=4, sparsity=0.5)
    assert torch.equal(model.module.bn1.weight, state["bn1.weight"])
    with pytest.raises(UsageError, match="no state_dict of lenet-300-100"):
        convert("lenet-300-100", weights=str(tmp_path / "w.pth"), sparsity=0.5)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("wrn-28-22", {}, "did you mean wrn-28-2 or wrn-22-2"),
        ("lenet-300", {}, "did you mean lenet-300-100"),
        ("wrn-28-2", {"weights": "DEFAULT"}, "has no published weights"),
        ("wrn-28-2", {"num_classes": 0}, "--num-classes 0 is not allowed"),
        ("wrn-28-2", {"input_size": 0}, "--input-size 0 is not allowed"),
        ("wrn-28-2", {"input_shape": (3, 16, 32, 32)}, "does not fit wrn-28-2"),
        ("lenet-300-100", {"input_shape": (3, 2000, 2000)}, "12,000,000 values"),
    ],
)
def test_names_and_options_that_do_not_fit_are_refused(name, options, words):
    with pytest.raises(UsageError, match=words):
        convert(name, sparsity=0.9, **options)


def test_an_invalid_width_in_a_file_is_refused():
    plain = ModelConfig("paper", "wrn-28-2", 10, (3, 32, 32)).to_dict()
    assert ModelConfig.from_dict({key: value for key, value in plain.items() if key != "width"}).width == 1
    for width in (0, -1, 1e9, float("nan"), "wide", None):
        with pytest.raises(FormatError):
            ModelConfig.from_dict({**plain, "width": width})


def small(name):
    """Returns a network converted as in the papers, but small."""
    if name == "lenet-300-100":
        return convert(name, sparsity=0.9, preset="paper", input_size=8)
    torch.manual_seed(0)
    return convert(WideResNet(10, 1.3), sparsity=0.9, preset="paper", input_shape=(3, 8, 8))


@pytest.mark.parametrize("name", ["lenet-300-100", "wrn"])
def test_archive_onnx_and_runtime_agree(tmp_path, name):
    model = small(name)
    model.module.train()
    x = torch.randn(32, *model.config.input_shape)
    for _ in range(3):  # statistics other than those of the start
        model(x)
    model.module.eval()
    for file in ("m.dsr", "m.onnx"):
        export(model, tmp_path / file)
    with torch.no_grad():
        wanted = model(x).numpy()
    session = onnx_session(tmp_path / "m.onnx")
    (of_onnx,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for found in (Session(tmp_path / "m.dsr").run(x.numpy()), of_onnx):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lenet-300-100", "wrn"])
def test_channels_last_computes_the_same(name):
    model = small(name)
    x = torch.randn(4, *model.config.input_shape)
    model.module.eval()
    with torch.no_grad():
        wanted = model(x)
        model.to(memory_format=torch.channels_last)
        model.check()
        torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [lambda: build("lenet-300-100", 10, (1, 8, 8)), lambda: WideResNet(10, 0.5, 10, 1)])
def test_compiles_as_one_graph(make):
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 1, 8, 8)
    module.eval()
    torch.testing.assert_close(compiled(x), module(x))
    compiled.train()
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_command_line_and_report(tmp_path, run):
    code, out, err = run("convert", "lenet-300-100", "--input-size", "8", "--sparsity", "0.9", "-o", tmp_path / "m")
    assert code == 0, err
    assert "lenet-300-100 with" in out
    train = ("train", tmp_path / "m", "--data", "digits", "--epochs", "1", "-o", tmp_path / "r", "--quiet")
    assert run(*train)[0] == 0
    code, out, err = run("report", tmp_path / "r", "--html", tmp_path / "r.html")
    assert code == 0, err
    assert "lenet-300-100" in (tmp_path / "r.html").read_text()
    assert run("convert", "wrn-28-3", "--sparsity", "0.9", "-o", tmp_path / "n")[0] == 2
