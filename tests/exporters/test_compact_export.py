"""Compacted exports of whole networks are smaller, compute the same, and record what was removed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from converters.loading import load
from dsr_tool.errors import CheckFailed, FormatError, UsageError
from dsr_tool.formats.archive import open_archive
from dsr_tool.graph.compact.record import COMPACTED, Savings
from dsr_tool.graph.compact.rewrite import fold_and_compact
from dsr_tool.report.sources import read
from dsr_tool.report.tables import report_document, report_text
from dsr_tool.runtime import Session
from dsr_tool.runtime.reference.interpreter import Interpreter
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.sparsify import sparsify
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from exporters.export import export, verify
from exporters.onnx.read import read_onnx
from exporters.onnx.session import OnnxSession
from exporters.onnx.write import to_onnx
from exporters.verify.compare import RELATIVE_TOLERANCE, ROUNDING_FACTOR

pytestmark = pytest.mark.usefixtures("trace_once")


def kill(module: nn.Module, share: float, seed: int = 0) -> None:
    """Gives every layer dead filters and norms that shift, and the last layer outputs that are not zero."""
    random = torch.Generator().manual_seed(seed)
    layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5, generator=random)
                layer.bias.normal_(0, 0.5, generator=random)
        for layer in layers:
            if layer.bias is not None:
                layer.bias.normal_(0, 0.3, generator=random)
        for layer in layers[:-1]:
            layer.weight[torch.rand(len(layer.weight), generator=random) < share] = 0


def sparse_model(module: nn.Module, shape: tuple[int, ...], sparsity: float) -> SparseModel:
    """Sparsifies a module by magnitude, so that dead filters stay dead."""
    config = ModelConfig("module", type(module).__name__, 0, shape)
    return sparsify(module.eval(), config, Budget(sparsity=sparsity), positions="magnitude")


@pytest.fixture
def model(make_model) -> SparseModel:
    """Returns a small model with dead filters."""
    model = make_model(0.7)
    kill(model.module, 0.4)
    return model


def keep_signal(module: nn.Module, size: int) -> None:
    """Sets norms to the statistics of their inputs, so that outputs still depend on the model's inputs."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        module.train()(torch.randn(8, 3, size, size))
    module.eval()


def channels(tensors) -> int:
    return sum(tensor.mask.shape[0] for tensor in tensors.values() if len(tensor.mask.shape) > 1)


def test_a_compacted_archive_is_smaller_and_computes_the_same(model, tmp_path):
    plain = export(model, tmp_path / "plain.dsr")
    small = export(model, tmp_path / "small.dsr", compact=True)
    assert small.passed
    assert small.masks_equal
    assert small.weights_equal
    assert set(small.runtimes) == {"onnxruntime", "sparse"}
    assert small.largest_difference <= 1e-5 * small.scale
    assert small.file_bytes < plain.file_bytes
    archive = open_archive(tmp_path / "small.dsr")
    record = Savings.from_dict(archive.config.conversion[COMPACTED])
    assert record.plain_bytes == plain.file_bytes
    assert record.filters > 20
    assert record.weights[1] == sum(e.spec.size for e in archive.entries.values() if e.spec.weight) < record.weights[0]
    assert record.dense_macs[1] < record.dense_macs[0]
    assert record.sparse_macs[1] <= record.sparse_macs[0]
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        wanted = model.module.eval()(torch.from_numpy(x)).numpy()
    found = Session(archive).run(x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert verify(tmp_path / "small.dsr", model).passed


@pytest.mark.parametrize("container", ["archive", "onnx"])
@pytest.mark.parametrize("encoding", ["auto", "dense"])
def test_compaction_works_with_float16_and_every_encoding(model, tmp_path, container, encoding):
    path = tmp_path / "small"
    result = export(model, path, to=container, encoding=encoding, values="fp16", compact=True)
    assert result.passed
    assert result.weights_equal
    assert any("rounded to float16" in note for note in result.notes)
    assert verify(path, model).passed


def test_a_compacted_onnx_file_is_smaller_and_computes_the_same(model, tmp_path):
    plain = export(model, tmp_path / "plain.onnx")
    small = export(model, tmp_path / "small.onnx", compact=True)
    assert small.passed
    assert small.weights_equal
    assert small.largest_difference <= 1e-5 * small.scale
    assert small.file_bytes < plain.file_bytes
    file = read_onnx(tmp_path / "small.onnx")
    record = Savings.from_dict(file.record[COMPACTED])
    assert record.plain_bytes == plain.file_bytes
    assert record.weights[1] == sum(entry.spec.size for entry in file.entries.values() if entry.spec.weight)
    assert verify(tmp_path / "small.onnx", model).passed


def test_the_report_says_what_compaction_saved(model, tmp_path):
    for name in ("small.dsr", "small.onnx"):
        export(model, tmp_path / name, compact=True)
        source = read(tmp_path / name)
        text, document = report_text(source), report_document(source)
        record = Savings.from_dict(document["compaction"])
        assert f"compaction removed {record.filters:,} filters" in text
        assert f"{record.plain_bytes:,} without compaction" in text
    export(model, tmp_path / "plain.dsr")
    source = read(tmp_path / "plain.dsr")
    assert report_document(source)["compaction"] is None
    assert "compaction" not in report_text(source)


def test_a_compacted_archive_does_not_go_back_into_the_module(model, tmp_path):
    export(model, tmp_path / "small.dsr", compact=True)
    with pytest.raises(UsageError, match="compacted for inference.*without --compact"):
        load(tmp_path / "small.dsr", model.module)


def test_a_compacted_archive_of_another_model_does_not_pass(model, make_model, tmp_path):
    export(model, tmp_path / "small.dsr", compact=True)
    other = make_model(0.7)
    kill(other.module, 0.2, seed=1)
    with pytest.raises(CheckFailed):
        verify(tmp_path / "small.dsr", other)


@pytest.mark.parametrize("record", [None, {}, {"layers": {"a": [1, 2]}}, {"layers": {"a": [1, 2, 3, -1]}}, []])
def test_a_malformed_record_of_compaction_is_refused(record):
    with pytest.raises(FormatError, match="compaction"):
        Savings.from_dict(record)


def compared(module: nn.Module, size: int) -> tuple[int, int, int]:
    """Compares outputs with PyTorch; returns filters before and after, and the number of layers that lost some."""
    model = sparse_model(module, (3, size, size), 0.5)
    keep_signal(module, size)
    before, small = fold_and_compact(trace(module, (3, size, size)), model.tensors())
    x = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        single = module(torch.from_numpy(x)).numpy()
        wanted = module.double()(torch.from_numpy(x).double()).numpy()
    session = OnnxSession(to_onnx(small.graph, small.tensors, encoding="dense").SerializeToString())
    scale = np.abs(wanted).max()
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-3 * scale
    # Some networks round more than 1e-5 of their largest output, in PyTorch as much.
    allowed = RELATIVE_TOLERANCE * scale + ROUNDING_FACTOR * np.abs(single - wanted).max()
    for found in (session.run(x), *Interpreter(small.graph, small.tensors).run(x)):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=allowed)
    return channels(before), channels(small.tensors), len(small.removed)


FAST = ("resnet18", "mobilenet_v2", "squeezenet1_1")
SLOW = (
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "efficientnet_b0",
    "densenet121",
    "mobilenet_v3_small",
    "googlenet",
    "vgg11",
    "convnext_tiny",
)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_torchvision_model_loses_its_dead_filters(name):
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    module = torchvision.models.get_model(name, weights=None, **options)
    kill(module, 0.3)
    before, after, layers = compared(module, 224 if name == "vgg11" else 64)
    # Groups of a grouped convolution stay as large as the largest, which keeps dead filters.
    assert after < (0.98 if name == "resnext50_32x4d" else 0.93) * before
    assert layers >= 8


def test_a_transformer_loses_hidden_units_of_its_linear_pairs():
    torch.manual_seed(0)
    module = torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48)
    kill(module, 0.3)
    nn.init.normal_(module.heads.head.weight)
    _, _, layers = compared(module, 32)
    assert layers == 4
