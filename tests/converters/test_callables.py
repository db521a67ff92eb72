"""`module:callable`: networks of the user's own, from the command line to a file and back."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from converters.callables import build, is_callable_name
from converters.conversion import convert
from converters.loading import load
from dsr_tool.errors import CheckFailed, FormatError, UsageError
from dsr_tool.formats.archive import open_archive

X, Y = np.zeros((16, 8, 8), np.uint8), np.arange(16) % 4
NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        layers = nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 4)
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)

class makers:
    @staticmethod
    def wide():
        return Net(16)

def needs(width):
    return Net(width)

def number():
    return 3

net = nn.Linear(2, 2)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "my_nets_for_test.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield "my_nets_for_test"
    sys.modules.pop("my_nets_for_test", None)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("a:b", True), ("a.b:c.d", True), ("resnet18", False), ("a:", False), (":b", False), ("a b:c", False)],
)
def test_names_of_callables_are_recognised(source, expected):
    assert is_callable_name(source) is expected


def test_a_callable_is_converted_and_loads_only_if_the_user_names_it(nets, tmp_path):
    source = f"{nets}:Net"
    path = list(sys.path)
    model = convert(source, sparsity=0.5, input_shape=(1, 8, 8), seed=3)
    assert sys.path == path
    assert (model.config.source, model.config.architecture) == ("callable", source)
    assert model.config.num_classes == 4
    assert model.active_weights == round(model.prunable_weights / 2)
    assert sum(spec.macs_per_weight for spec in model.specs.values()) > 0
    model.save(tmp_path / "m")
    with pytest.raises(UsageError, match=f"--model {source}"):
        load(tmp_path / "m")
    again = load(tmp_path / "m", source)
    assert all(torch.equal(again.module.state_dict()[name], value) for name, value in model.module.state_dict().items())
    with pytest.raises(FormatError, match="disagrees about"):
        load(tmp_path / "m", f"{nets}:makers.wide")


def test_the_same_seed_gives_the_same_weights_and_the_largest_stay(nets):
    one, other, third = (convert(f"{nets}:Net", sparsity=0.5, input_shape=(1, 8, 8), seed=n) for n in (1, 1, 2))
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert not torch.equal(one.weights["layers.0.weight"], third.weights["layers.0.weight"])
    whole = build(f"{nets}:Net", 1).layers[3].weight.abs()
    mask = one.masks["layers.3.weight"]
    assert whole[mask].min() >= whole[~mask].max()


def test_weights_come_from_a_file(nets, tmp_path):
    state = build(f"{nets}:Net", 7).state_dict()
    torch.save(state, tmp_path / "w.pth")
    # Sparsity 0, since biases are corrected for what becomes zero.
    model = convert(f"{nets}:Net", weights=str(tmp_path / "w.pth"), sparsity=0, input_shape=(1, 8, 8))
    assert torch.equal(model.module.layers[3].bias, state["layers.3.bias"])
    with pytest.raises(UsageError, match="no state_dict of my_nets_for_test:makers.wide"):
        convert(f"{nets}:makers.wide", weights=str(tmp_path / "w.pth"), sparsity=0.5, input_shape=(1, 8, 8))


@pytest.mark.parametrize("ending", [".safetensors", ".bin", ".pth"])
@pytest.mark.parametrize("write", [save_file, torch.save])
def test_a_file_of_weights_is_recognised_by_its_content(nets, tmp_path, write, ending):
    state = build(f"{nets}:Net", 7).state_dict()
    write(state, tmp_path / f"w{ending}")
    model = convert(f"{nets}:Net", weights=str(tmp_path / f"w{ending}"), sparsity=0, input_shape=(1, 8, 8))
    assert torch.equal(model.module.layers[3].bias, state["layers.3.bias"])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Net", {}, "needs --input-shape"),
        ("Net", {"input_shape": (1, 8, 8), "num_classes": 3}, "--num-classes"),
        ("Net", {"input_shape": (1, 0, 8)}, "input-shape \\[1, 0, 8\\]"),
        ("Net", {"input_shape": (1, 8, 8), "input_size": 3}, "exclude each other"),
        ("Net", {"input_shape": (3, 8, 8)}, "does not fit Net"),
        ("Nett", {"input_shape": (1, 8, 8)}, "closest.*Net|'Nett' is unknown"),
        ("needs", {"input_shape": (1, 8, 8)}, "failed when it was called without arguments"),
        ("number", {"input_shape": (1, 8, 8)}, "returned int"),
        ("net", {"input_shape": (1, 8, 8)}, "is Linear, expected a function or class"),
        ("1", {"input_shape": (1, 8, 8)}, "not written as module:callable"),
    ],
)
def test_callables_and_options_that_do_not_fit_are_refused(nets, name, options, words):
    with pytest.raises(UsageError, match=words):
        convert(f"{nets}:{name}", sparsity=0.5, **options)


def test_a_missing_module_is_refused():
    with pytest.raises(UsageError, match="'no_such_module_here'.*cannot be imported"):
        convert("no_such_module_here:Net", sparsity=0.5, input_shape=(1, 8, 8))


def test_the_command_line_converts_trains_and_exports_a_callable(nets, tmp_path, run):
    source = f"{nets}:Net"
    code, out, err = run("convert", source, "--input-shape", "1,8,8", "--sparsity", "0.5", "-o", "m", "--json")
    assert code == 0, err
    assert json.loads(out)["model"]["input_shape"] == [1, 8, 8]
    code, _, err = run("export", "m", "-o", "m.dsr")
    assert code == 2 and f"--model {source}" in err
    assert not (tmp_path / "m.dsr").exists()
    assert run("export", "m", "-o", "m.dsr", "--model", source)[0] == 0
    assert open_archive("m.dsr").config.architecture == source
    assert run("verify", "m.dsr", "--against", "m", "--model", source)[0] == 0
    np.savez("d.npz", x_train=X, y_train=Y, x_test=X, y_test=Y)
    train = ("train", "m.dsr", "--data", "arrays:d.npz", "--epochs", "1", "--batch-size", "8", "--method", "static")
    code, _, err = run(*train, "-o", "run", "--model", source, "--quiet")
    assert code == 0, err
    load(tmp_path / "run", source).check()
    assert run("convert", source, "--input-shape", "1,8,x", "--sparsity", "0.5", "-o", "n")[0] == 2


def test_a_name_in_a_file_is_never_imported(nets, tmp_path):
    convert(f"{nets}:Net", sparsity=0.5, input_shape=(1, 8, 8)).save(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    (tmp_path / "evil_for_test.py").write_text("raise SystemExit('imported')")
    config.write_text(config.read_text().replace(nets, "evil_for_test"))
    with pytest.raises((UsageError, CheckFailed), match="evil_for_test"):
        load(tmp_path / "m")
    assert "evil_for_test" not in sys.modules
