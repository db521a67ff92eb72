"""Files that are no checkpoints are named for what they are, and values are checked in every tensor."""

import gzip
import json
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from converters.conversion import convert
from converters.state_dicts import fitting, load_strictly, read_weights
from dsr_tool.errors import FormatError, UsageError


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 40))


def exported_program(path):
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),)), path)


def archive(path):
    from exporters.export import export

    export(convert(nn.Linear(30, 20), sparsity=0.5, input_shape=(30,)), path.with_suffix(".dsr"))
    path.with_suffix(".dsr").rename(path)


FOREIGN = {
    "is an HDF5 file": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)),
    "is one array of numpy": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"),
    "holds arrays of numpy.*torch.from_numpy": lambda path: path.write_bytes(npz(path)),
    "is a GGUF file": lambda path: path.write_bytes(b"GGUF\x03"),
    "pointer of Git LFS.*git lfs pull": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "is a web page": lambda path: path.write_text("\n<!DOCTYPE html><html>Not found</html>"),
    "is compressed with gzip": lambda path: path.write_bytes(gzip.compress(b"weights")),
    "is an ONNX file": lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch"),
    "is the index of a checkpoint in several files": lambda path: path.write_text(json.dumps({"weight_map": {}})),
    "is JSON and holds no tensors": lambda path: path.write_text(json.dumps({"epoch": 3})),
    "is empty": lambda path: path.touch(),
    "is a program of torch.export.*torch.export.load": exported_program,
    "is an archive of dsr-tool.*dsr_tool.load": archive,
    "is a zip archive that torch.save did not write": lambda path: zipped(path, "weights.pth"),
}


def npz(path):
    with path.with_suffix(".npz").open("wb") as file:
        np.savez(file, weight=np.ones(3))
    return path.with_suffix(".npz").read_bytes()


def zipped(path, name):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, b"hello")


@pytest.mark.filterwarnings("ignore")  # of torch.export
@pytest.mark.parametrize("words", FOREIGN)
def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path, words):
    FOREIGN[words](tmp_path / "w.pt")
    with pytest.raises(FormatError, match=rf"--weights file '.*w.pt' {words}" if words[0] == "i" else words):
        read_weights(str(tmp_path / "w.pt"), network())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state": {"a": np.ones(3), "b": np.ones(2)}}, "holds 2 arrays of numpy.*torch.from_numpy"),
        ({"epoch": 3, "best": np.float64(0.5)}, "no state_dict of tensors but the keys 'epoch' and 'best'"),
        ([network().state_dict(), 3], r"holds a list.*torch.load\(FILE, weights_only=True\)\[0\]"),
        ((3, network().state_dict()), r"holds a tuple.*\[1\]"),
        (torch.ones(3), "an object of type Tensor"),
        ({"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}, "the keys 'state' and 'param_groups'"),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(FormatError, match=words):
        read_weights(str(tmp_path / "w.pth"), network())


@pytest.mark.filterwarnings("ignore:Sparse C")  # torch's own
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
def test_sparse_tensors_of_any_layout_are_read(layout):
    state = network(1).state_dict()
    sparse = {**state, "4.weight": getattr(state["4.weight"], layout)(), "0.weight": state["0.weight"].to_sparse()}
    found = fitting({"state_dict": sparse}, network())
    assert all(torch.equal(found.state[name], value) for name, value in state.items())


@pytest.mark.filterwarnings("ignore:Sparse C")
def test_sparse_values_and_masks_of_pruning_are_read():
    state = network(1).state_dict()
    mask = torch.rand_like(state["4.weight"]) < 0.5
    pruned = {name: value for name, value in state.items() if name != "4.weight"}
    pruned |= {"4.weight_orig": state["4.weight"].to_sparse(), "4.weight_mask": mask.float().to_sparse_csr()}
    found = fitting(pruned, network())
    assert torch.equal(found.masks["4.weight"], mask)
    assert torch.equal(found.state["4.weight"], state["4.weight"] * mask)


def test_a_mask_of_another_size_is_named(tmp_path):
    state = network(1).state_dict()
    state["4.weight_orig"], state["4.weight_mask"] = state.pop("4.weight"), torch.ones(3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"a mask of shape \(3,\) for '4.weight' of shape \(40, 288\)"):
        load_strictly(network(), "Net", read_weights(str(tmp_path / "w.pth"), network()).state, "w.pth")


BAD = [("0.bias", "nan"), ("0.bias", "inf"), ("0.weight", "-inf"), ("1.weight", "nan"), ("4.weight", "nan")]
BAD += [("1.running_var", "nan"), ("1.running_mean", "nan"), ("1.running_var", "inf")]


@pytest.mark.parametrize("sparsity", [0.5, "keep", 0])
@pytest.mark.parametrize(("name", "value"), BAD)
def test_values_that_are_not_finite_are_refused_in_every_tensor(name, value, sparsity):
    net = network()
    net.get_parameter("4.weight").data[0] = 0
    net.state_dict()[name].view(-1)[0] = float(value)
    with pytest.raises(UsageError, match=f"'{name}' contains NaN"):
        convert(net, sparsity=sparsity, input_shape=(3, 8, 8))


def test_masks_of_attention_may_hold_minus_infinity():
    net = network()
    net.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    assert convert(net, sparsity=0.5, input_shape=(3, 8, 8)).sparsity == 0.5


def test_a_network_on_the_meta_device_is_refused():
    with torch.device("meta"):
        net = network()
    with pytest.raises(UsageError, match="has no values yet, since it is on the meta device"):
        convert(net, sparsity=0.5)
