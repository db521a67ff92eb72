"""Memory of running a model: sizes, the runtimes' own allocations, the command, and the system's view."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from dsr_tool.errors import DsrError, UsageError
from dsr_tool.formats.archive import open_archive
from dsr_tool.graph.fold import fold_norms
from dsr_tool.measure.memory import document as memory
from dsr_tool.measure.memory import activations as values
from dsr_tool.measure.memory.document import Wanted, memory_document, wanted_memory
from dsr_tool.measure.memory.process import Request, can_measure, measure
from dsr_tool.measure.memory.text import memory_text
from dsr_tool.report.sources import read
from dsr_tool.runtime import Session
from dsr_tool.runtime.reference.interpreter import OPERATORS

SHAPE = (3, 48, 48)


class _Network(nn.Module):
    """What convolutional networks are made of: padding, strides, groups, a sum, a view and a product."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.deep = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Hardswish(), nn.Conv2d(32, 64, 1, 2))
        self.pool, self.head = nn.MaxPool2d(3, 2, 1), nn.Linear(64 * 36, 10)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.pool(self.deep(torch.relu(self.inner(x) + x))).flatten(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same model as an archive and as an ONNX file."""
    from dsr_tool.sparse.sparsify import sparsify
    from dsr_tool.sparsity.budget import Budget
    from dsr_tool.sparsity.config import ModelConfig
    from exporters.export import export

    torch.manual_seed(0)
    config = ModelConfig("module", "Small", 10, SHAPE)
    model = sparsify(_Network(), config, Budget(sparsity=0.9), positions="random")
    folder = tmp_path_factory.mktemp("memory")
    for name in ("net.dsr", "net.onnx"):
        export(model, folder / name)
    return folder


def _folded(path):
    archive = open_archive(path)
    return fold_norms(archive.graph, dict(archive))


def test_sizes_at_a_batch_are_those_of_computing_it(files):
    graph, tensors = _folded(files / "net.dsr")

    def weights(name):
        return tensors[name].to_dense()

    sizes = values.value_sizes(graph, weights, 5, SHAPE)
    assert sizes == values._recorded(graph, weights, np.ones((5, *SHAPE), np.float32))
    assert sizes[graph.outputs[0].name].shape == (5, 10)
    views = [name for name, size in sizes.items() if size.storage != name]
    assert len(views) == 1  # flatten


@pytest.mark.parametrize("batch", [1, 6])
def test_what_our_runtime_takes_is_what_numpy_allocates(files, batch):
    row = _row(memory_document(read(files / "net.dsr"), Wanted(batch)), "scipy runtime")
    session = Session(files / "net.dsr", runtime="scipy")
    session.run(np.ones((batch, *SHAPE), np.float32))
    tracemalloc.start()
    x = np.ones((batch, *SHAPE), np.float32)
    session.run(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert row["activations_bytes"] == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("op", values._TEMPORARIES)
def test_what_an_operator_holds_besides_its_result(op):
    x = np.linspace(-2, 2, 1 << 18, dtype=np.float32).reshape(64, -1)
    others = {"Clip": (np.float32(0), np.float32(1)), "LayerNormalization": (x[0],)}.get(op, ())
    OPERATORS[op](x, *others)
    tracemalloc.start()
    result = OPERATORS[op](x, *others)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A mask of conditions takes a byte an entry.
    assert peak == pytest.approx((1 + values._TEMPORARIES[op]) * result.nbytes, rel=0.15)


def test_an_archive_and_an_onnx_file_take_the_same(files):
    ours, theirs = (memory_document(read(files / name), Wanted(4)) for name in ("net.dsr", "net.onnx"))
    assert ours["activations"]["fused_bytes"] == theirs["activations"]["fused_bytes"]
    assert _row(ours, "ONNX Runtime")["computed_bytes"] == _row(theirs, "ONNX Runtime")["computed_bytes"]
    assert [row["runtime"] for row in theirs["inference"]] == ["ONNX Runtime"]
    assert ours["training"] is None
    assert ours["activations"]["fused_bytes"] < ours["activations"]["in_order_bytes"]


def _row(document, name):
    return next(row for row in document["inference"] if row["runtime"] == name)


def test_options_that_do_not_go_together(files):
    for options in ({"batch": 2}, {"input_size": 8}, {"optimizer": "sgd"}, {"measured": True}):
        given = {"batch": None, "input_size": None, "optimizer": None, "measured": False, **options}
        with pytest.raises(UsageError, match="go with --memory"):
            wanted_memory(False, **given)
    source = read(files / "net.dsr")
    for wanted, message in (
        (Wanted(0), "--batch 0 is not allowed"),
        (Wanted(10**9), "--batch 1000000000 is not allowed; give 1 to 100,000"),
        (Wanted(input_size=0), "--input-size 0 is not allowed"),
        (Wanted(input_size=8), "--input-size goes with a model folder"),
    ):
        with pytest.raises(UsageError, match=message):
            memory_document(source, wanted)


def test_a_system_that_cannot_be_measured_is_said_so(files, monkeypatch):
    monkeypatch.setattr(memory, "can_measure", lambda: False)
    document = memory_document(read(files / "net.onnx"), Wanted(measured=True))
    assert "needs Linux" in document["measurement_note"]
    assert "needs Linux" in memory_text(document)
    assert document["inference"][0]["measured_bytes"] is None
    assert document["inference"][0]["computed_bytes"] > 0


def _dsr_tool(monkeypatch, capsys, *arguments):
    from dsr_tool import cli

    monkeypatch.setattr("sys.argv", ["dsr-tool", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_command_says_what_a_folder_takes(model_folder, monkeypatch, capsys):
    options = ("--memory", "--input-size", 96, "--optimizer", "adam", "--json")
    document = json.loads(_dsr_tool(monkeypatch, capsys, "report", model_folder, *options))
    assert document["memory"]["input_shape"] == [3, 96, 96]
    text = memory_text(document["memory"])
    for words in ("PyTorch", "ONNX Runtime", "scipy runtime", "training with adam", "optimizer state", "masks"):
        assert words in text
    training = document["memory"]["training"]
    assert training["computed_bytes"] == sum(training["at_peak_bytes"].values())
    assert training["optimizer_state_bytes"]["adam"] == training["held_bytes"]["optimizer state"]


@pytest.mark.parametrize(("method", "per_weight"), [("dst", 4), ("tied", 12)])
def test_what_a_method_holds_besides_is_said(method, per_weight, tmp_path):
    from converters.conversion import convert
    from dsr_tool.methods import make

    model = convert("lenet-300-100", sparsity=0)
    model.save(tmp_path / "run")
    start = {"kind": "start", "data": "digits", "settings": {"method": method}}
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps(start) + "\n")
    document = memory_document(read(tmp_path / "run"), Wanted(batch=2))
    training = document["training"]
    optimizer = torch.optim.SGD(model.module.parameters(), 0.1)
    keeper = make(method, 100, final_sparsity=0.9).keep(model, optimizer, seed=0, before_masking=None)
    held = (
        keeper.dense if method == "dst" else [t for ties in keeper.ties for t in (ties._order, ties._place, ties._sign)]
    )
    assert training["method"] == {"name": method, "bytes": sum(tensor.nbytes for tensor in held)}
    assert training["method"]["bytes"] == per_weight * model.prunable_weights
    assert f"method {method} holds" in memory_text(document)


@pytest.mark.skipif(not can_measure(), reason="needs /proc")
def test_a_child_that_fails_is_told_in_one_sentence():
    with pytest.raises(DsrError, match="measurement of sparse for input .1, 3, 8, 8. failed: .*does not exist"):
        measure(Request("sparse", "nowhere.dsr", (1, 3, 8, 8)))


@pytest.mark.slow
@pytest.mark.skipif(not can_measure(), reason="needs /proc")
def test_computed_and_measured_agree_within_15_percent(tmp_path):
    from converters.conversion import convert

    convert("resnet18", sparsity=0.9, input_size=160).save(tmp_path / "net")
    document = memory_document(read(tmp_path / "net"), Wanted(batch=8, measured=True))
    for row in (*document["inference"], document["training"]):
        assert abs(row["difference"]) < 0.15, row
