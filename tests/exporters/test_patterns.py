"""Models with masks N:M and fan-in in files: archives, and safetensors in the form that torch compresses."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from converters.conversion import convert
from converters.loading import load
from dsr_tool.formats.archive import open_archive
from dsr_tool.report.sources import read
from dsr_tool.report.tables import report_document, report_text
from exporters.export import export

WEIGHTS = ("0.weight", "2.weight")


def model(granularity, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(256, 64))
    return convert(net, granularity=granularity, input_shape=(64, 4, 4), **options)


@pytest.fixture(scope="module")
def graph():
    from dsr_tool.sparse.trace import trace

    return trace(model("2:4").module, (64, 4, 4))


@pytest.fixture
def trace_once(monkeypatch, graph):
    monkeypatch.setattr("exporters.checked.trace", lambda module, shape: graph)


def matrix(weight):
    """Returns a weight as the matrix of its layer, input channels last."""
    return weight.reshape(len(weight), -1) if weight.ndim == 2 else weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize("granularity, values", [("2:4", "fp16"), ("1:4", "fp16"), ("1:2", "fp16"), ("2:4", "int8")])
def test_torch_compresses_weights_of_safetensors_and_gives_back_every_value(tmp_path, granularity, values):
    exported = export(model(granularity), tmp_path / "m.safetensors", values=values)
    assert any("torch.sparse.to_sparse_semi_structured takes the weights" in note for note in exported.notes)
    state = load_file(tmp_path / "m.safetensors")
    for name in WEIGHTS:
        dense = matrix(state[name])
        packed, meta = sparse_semi_structured_from_dense_cutlass(dense)
        assert packed.numel() * 2 == dense.numel()
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), dense)


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize("granularity, options", [("weight", {"sparsity": 0.5}), ("4:8", {}), ("3:4", {})])
def test_of_other_masks_torch_would_lose_values(tmp_path, granularity, options):
    exported = export(model(granularity, **options), tmp_path / "m.safetensors", values="fp16")
    assert not any("semi_structured" in note for note in exported.notes)
    dense = load_file(tmp_path / "m.safetensors")["2.weight"]
    compressed = sparse_semi_structured_from_dense_cutlass(dense)
    assert not torch.equal(sparse_semi_structured_to_dense_cutlass(*compressed), dense)


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize("values, codec", [("fp32", "nm"), ("fp16", "nm"), ("int8", "grid-nm")])
def test_archives_take_the_codec_and_say_the_pattern(tmp_path, values, codec):
    assert export(model("2:4"), tmp_path / "m.dsr", values=values).passed
    archive = open_archive(tmp_path / "m.dsr")
    assert {archive.entries[name].codec for name in WEIGHTS} == {codec}
    assert archive.config.conversion["granularity"] == "2:4"
    for name in WEIGHTS:
        groups = archive.entries[name].spec.size // 4
        # 24 groups in 8 bytes, behind N and M.
        assert archive.stored_bytes(f"{name}:mask") == 2 + 8 * -(-groups // 24)
    source = read(tmp_path / "m.dsr")
    document = report_document(source)
    assert [layer["pattern"] for layer in document["layers"] if layer["role"] == "sparse"] == ["2:4", "2:4"]
    assert "pattern of the masks: 2:4 in 2 of 2 sparse weights" in report_text(source, document)


@pytest.mark.usefixtures("trace_once")
def test_reports_of_folders_say_every_pattern(tmp_path):
    model("fan-in", sparsity=0.7).save(tmp_path / "fan-in")
    assert "pattern of the masks: fan-in in 2 of 2" in report_text(read(tmp_path / "fan-in"))
    model("weight", sparsity=0.7).save(tmp_path / "weight")
    assert "pattern" not in report_text(read(tmp_path / "weight"))


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize("encoding", ["nm", "delta", "bitmask", "csr"])
def test_every_encoding_holds_the_same_weights(tmp_path, encoding):
    sparse = model("2:4")
    assert export(sparse, tmp_path / "m.dsr", encoding=encoding).passed
    again = load(tmp_path / "m.dsr", model("1:4").module)
    assert str(again.granularity) == "2:4"
    for name, tensor in sparse.tensors().items():
        assert again.tensors()[name].mask.equals(tensor.mask)
        assert again.tensors()[name].values.tobytes() == tensor.values.tobytes()
