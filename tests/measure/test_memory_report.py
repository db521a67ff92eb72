"""The memory report: sizes, what numpy and the compiler's plan say, the command, and the system's view."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from dsr_tool.errors import DsrError, UsageError
from dsr_tool.formats.archive import open_archive
from dsr_tool.graph.fold import fold_norms
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.measure.memory import activations, inference, request
from dsr_tool.measure.memory.document import memory_document
from dsr_tool.measure.memory.process import Request, can_measure, measure
from dsr_tool.measure.memory.request import MemoryRequest, memory_request
from dsr_tool.measure.memory.text import memory_text
from dsr_tool.report.sources import read
from dsr_tool.runtime import Session
from dsr_tool.runtime.kernels import library

SHAPE = (3, 48, 48)


class _Network(nn.Module):
    """A network with padding, strides, groups, a sum, a view and a product."""

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
    """Exports one model as an archive and as an ONNX file."""
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


def _row(memory, name):
    return next(row for row in memory["inference"] if row["runtime"].startswith(name))


@pytest.fixture
def no_kernels(monkeypatch):
    """Sessions run on the reference, as where no kernels are built."""
    monkeypatch.setenv(library.VARIABLE, "none")


def test_sizes_at_a_batch_equal_those_of_computing_it(files):
    archive = open_archive(files / "net.dsr")
    graph, tensors = fold_norms(archive.graph, dict(archive))
    sizes = activations.value_sizes(graph, tensors, 5, SHAPE)
    assert sizes == activations._computed_sizes(graph, tensors, np.ones((5, *SHAPE), np.float32))
    assert sizes[graph.outputs[0].name].shape == (5, 10)
    views = [name for name, size in sizes.items() if size.storage != name]
    assert len(views) == 1  # flatten


def _numpy_peak(session, batch):
    """Most bytes that numpy holds at once for an input and a run on it."""
    session.run(np.ones((batch, *SHAPE), np.float32))
    tracemalloc.start()
    x = np.ones((batch, *SHAPE), np.float32)
    session.run(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_the_reference_takes_what_numpy_allocates(files, batch):
    row = _row(memory_document(read(files / "net.dsr"), MemoryRequest(batch)), "scipy runtime")
    session = Session(files / "net.dsr", runtime="scipy")
    assert row["activations_bytes"] == pytest.approx(_numpy_peak(session, batch), rel=0.05)


@pytest.mark.parametrize(
    ("op", "inputs", "arrays"),
    [
        ("Relu", (), 0),
        ("Clip", (np.float32(0), np.float32(1)), 1),
        ("Elu", (), 1),
        ("Gelu", (), 1),
        ("LayerNormalization", (np.ones(4096, np.float32),), 1),
        ("LeakyRelu", (), 1),
        ("Softmax", (), 1),
    ],
)
def test_arrays_that_an_operator_allocates_besides_its_result_are_counted(op, inputs, arrays):
    constants = {f"constant {i}": array for i, array in enumerate(inputs)}
    node = Node(op, ("x", *constants), ("y",))
    graph = Graph((Value("x", (None, 4096)),), (Value("y", (None, 4096)),), (node,), constants, (), 20)
    size = activations.value_sizes(graph, {}, 64, (4096,))["y"]
    # A mask of conditions takes a byte an entry.
    assert size.scratch_bytes == pytest.approx(arrays * size.nbytes, abs=0.3 * size.nbytes)


# Python's own objects take a few KiB, so the batches are large enough for arrays to matter more.
@pytest.mark.parametrize("batch", [6, 24])
@pytest.mark.parametrize("name", ["net.dsr", "net.onnx"])
def test_kernels_take_what_their_plan_says(files, name, batch):
    if library.level() is None:
        pytest.skip("no kernels are built here")
    row = _row(memory_document(read(files / name), MemoryRequest(batch)), "sparse runtime")
    assert row["runtime"] == f"sparse runtime ({library.level()})"
    session = Session(files / name, batch=batch)
    plan = session.memory
    assert row["weights_bytes"] > plan.weight_bytes > 0
    # The arena is not one of numpy's allocations, so what is left is what numpy allocates.
    expected = row["activations_bytes"] - plan.arena_bytes
    assert _numpy_peak(session, batch) == pytest.approx(expected, rel=0.05)


def test_a_model_that_is_given_to_onnxruntime_is_only_measured(files, monkeypatch):
    class Dense:
        runtime, memory = "onnxruntime", None

        def __init__(self, *_, **__):
            pass

    monkeypatch.setattr(inference, "Session", Dense)
    row = _row(memory_document(read(files / "net.dsr"), MemoryRequest()), "sparse runtime (onnxruntime)")
    assert row["computed_bytes"] is None


def test_an_archive_and_an_onnx_file_need_the_same_memory(files):
    ours, theirs = (memory_document(read(files / name), MemoryRequest(4)) for name in ("net.dsr", "net.onnx"))
    assert ours["activations"]["in_order_bytes"] == theirs["activations"]["in_order_bytes"] > 0
    assert len(ours["inference"]) == len(theirs["inference"]) == 2
    assert ours["training"] is None


def test_onnxruntime_is_not_computed_and_the_note_says_what_to_do(files):
    memory = memory_document(read(files / "net.dsr"), MemoryRequest())
    row = _row(memory, "ONNX Runtime")
    assert {key for key, value in row.items() if value is not None} == {"runtime"}
    assert "--measure" in memory["measurement_note"]
    assert "--measure" in memory_text(memory)


def test_options_that_do_not_go_together_are_refused(files):
    for options in ({"batch": 2}, {"input_size": 8}, {"optimizer": "sgd"}, {"measured": True}):
        arguments = {"batch": None, "input_size": None, "optimizer": None, "measured": False, **options}
        with pytest.raises(UsageError, match="need --memory"):
            memory_request(False, **arguments)
    source = read(files / "net.dsr")
    for wanted, message in (
        (MemoryRequest(0), "--batch 0 is not in 1 to 100,000"),
        (MemoryRequest(10**9), "--batch 1000000000 is not in 1 to 100,000"),
        (MemoryRequest(input_size=0), "--input-size 0 is not 1 or more"),
        (MemoryRequest(input_size=8), "--input-size 8 needs a model folder"),
        (MemoryRequest(optimizer="sgd"), "--optimizer sgd needs a model folder"),
    ):
        with pytest.raises(UsageError, match=message):
            memory_document(source, wanted)


def test_a_system_that_cannot_measure_is_named(files, monkeypatch):
    monkeypatch.setattr(request, "can_measure", lambda: False)
    memory = memory_document(read(files / "net.onnx"), MemoryRequest(measured=True))
    assert "needs Linux" in memory["measurement_note"]
    assert "needs Linux" in memory_text(memory)
    assert all(row["measured_bytes"] is None for row in memory["inference"])
    assert memory["inference"][1]["computed_bytes"] > 0


def test_the_command_reports_the_memory_of_a_folder(tmp_path, run):
    from converters.conversion import convert

    convert("squeezenet1_1", sparsity=0.9, num_classes=5, input_size=64).save(tmp_path / "net")
    options = ("--memory", "--input-size", 96, "--optimizer", "adam", "--json")
    code, out, _ = run("report", tmp_path / "net", *options)
    assert code == 0
    memory = json.loads(out)["memory"]
    assert memory["input_shape"] == [3, 96, 96]
    text = memory_text(memory)
    for words in ("PyTorch", "ONNX Runtime", "runtime", "training with adam", "optimizer state", "masks"):
        assert words in text
    training = memory["training"]
    assert training["computed_bytes"] == sum(training["at_peak_bytes"].values())
    assert training["optimizer_state_bytes"]["adam"] == training["held_bytes"]["optimizer state"]
    compact = memory["training_compact"]
    assert compact["computed_bytes"] == sum(compact["at_peak_bytes"].values())
    assert "positions" in compact["held_bytes"] and "masks" not in compact["held_bytes"]
    assert compact["held_bytes"]["optimizer state"] < 0.5 * training["held_bytes"]["optimizer state"]
    assert "training with adam, masked storage" in text and "training with adam, compact storage" in text


@pytest.mark.parametrize(("method", "per_weight"), [("dst", 4), ("tied", 12)])
def test_the_memory_that_a_method_holds_besides_is_reported(method, per_weight, tmp_path):
    from converters.conversion import convert
    from dsr_tool.methods import make

    model = convert("lenet-300-100", sparsity=0)
    model.save(tmp_path / "run")
    start = {"kind": "start", "data": "digits", "settings": {"method": method}}
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps(start) + "\n")
    memory = memory_document(read(tmp_path / "run"), MemoryRequest(batch=2))
    training = memory["training"]
    optimizer = torch.optim.SGD(model.module.parameters(), 0.1)
    keeper = make(method, 100, final_sparsity=0.9).keep(model, optimizer, seed=0, before_masking=None)
    held = (
        keeper.dense
        if method == "dst"
        else [t for ties in keeper.ties.values() for t in (ties._order, ties._number, ties._sign)]
    )
    assert training["method"] == {"name": method, "bytes": sum(tensor.nbytes for tensor in held)}
    assert training["method"]["bytes"] == per_weight * model.prunable_weights
    assert f"method {method} holds" in memory_text(memory)
    assert memory["training_compact"] is None
    assert f"no training in compact storage: method {method} trains in masked storage" in memory_text(memory)


@pytest.mark.skipif(not can_measure(), reason="needs /proc")
def test_a_child_that_fails_is_reported_in_one_sentence():
    with pytest.raises(DsrError, match="measurement of sparse for input .1, 3, 8, 8. failed: .*does not exist"):
        measure(Request("sparse", "nowhere.dsr", (1, 3, 8, 8)))


@pytest.mark.slow
@pytest.mark.skipif(not can_measure(), reason="needs /proc")
def test_computed_and_measured_agree_within_15_percent(tmp_path):
    from converters.conversion import convert

    convert("resnet18", sparsity=0.9, input_size=160).save(tmp_path / "net")
    memory = memory_document(read(tmp_path / "net"), MemoryRequest(batch=8, measured=True))
    assert _row(memory, "ONNX Runtime")["measured_bytes"] > 0
    for row in (*memory["inference"], memory["training"]):
        assert row["difference"] is None or abs(row["difference"]) < 0.15, row
