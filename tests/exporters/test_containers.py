"""The table of containers: a new one is one class and one row, and files are recognised by their content alone."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import dsr_tool
from dsr_tool.errors import CheckFailed, FileError, FormatError, UsageError
from dsr_tool.measure.memory.document import memory_document
from dsr_tool.measure.memory.request import MemoryRequest
from dsr_tool.report.fallbacks import fallback_document
from dsr_tool.report.sources import read
from dsr_tool.runtime import Session
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.source import ModelInMemory
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.base import Container, Draft
from exporters.containers import CONTAINERS, container_of, listed
from exporters.contents import StoredBytes, measured

pytestmark = pytest.mark.usefixtures("trace_once")

# --- a container from outside ----------------------------------------------------------------------------


class ToyFile:
    """A line of JSON with the tensors' shapes, and their float64 values."""

    MAGIC = b"TOY\n"

    def __init__(self, path):
        content = path.read_bytes()
        self.path, self.nbytes = path, len(content)
        header, _, self.body = content.removeprefix(self.MAGIC).partition(b"\n")
        self.header_bytes = len(content) - len(self.body)
        self.shapes = {name: tuple(shape) for name, shape in json.loads(header).items()}

    @property
    def entries(self):
        specs = {n: LayerSpec(n, shape, "any", "sparse", True, "") for n, shape in self.shapes.items()}
        return {n: type("Entry", (), {"spec": spec, "codec": "dense"}) for n, spec in specs.items()}

    def tensor(self, name):
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        start = 8 * sum(sizes[: list(self.shapes).index(name)])
        array = np.frombuffer(self.body[start:], np.float64, int(np.prod(self.shapes[name])))
        array = array.reshape(self.shapes[name]).astype(np.float32)
        return SparseTensor.from_dense(array, Mask.from_bool(array != 0))


class ToyFiles(Container):
    name = "toy"
    endings = (".toy",)
    encodings = ("auto", "text")
    values = ("fp32",)
    measurable = True

    def recognises(self, head):
        return head.start.startswith(ToyFile.MAGIC)

    def encode(self, checked, options):  # noqa: ARG002
        state = checked.model.module.state_dict()
        header = json.dumps({name: list(value.shape) for name, value in state.items()}).encode()
        body = b"".join(value.double().numpy().tobytes() for value in state.values())
        return Draft(lambda path: path.write_bytes(ToyFile.MAGIC + header + b"\n" + body), ("a toy",))

    def verify(self, path, checked, *, samples, seed):
        from exporters.verify.tensors import verify_tensors

        file, state = ToyFile(path), checked.model.module.state_dict()
        tensors = checked.model.tensors()

        def read_as_saved(name):
            dtype = tensors[name].values.dtype
            return SparseTensor.from_dense(file.tensor(name).to_dense().astype(dtype), tensors[name].mask)

        assert list(state) == list(file.shapes)
        return verify_tensors(path, self.name, checked, file.shapes, read_as_saved, samples=samples, seed=seed)

    def measure(self, path):
        file = ToyFile(path)
        stored = {name: StoredBytes(0, 8 * int(np.prod(shape))) for name, shape in file.shapes.items()}
        return measured(file, stored, {"header": file.header_bytes})


class ToyModels(ToyFiles):
    """Toy files of models; the computation stays in the container, since only its weights are written."""

    has_graph = compacts = True

    def encode(self, checked, options):
        self.graph, self.config = checked.graph, checked.model.config
        return super().encode(checked, options)

    def reader(self):
        def open_toy(path):
            file = ToyFile(path)
            tensors = {name: file.tensor(name) for name in self.graph.parameters}
            return ModelInMemory(path, self.config, self.graph, tensors)

        return open_toy


@pytest.fixture
def toy(monkeypatch):
    """Adds the one row that a container takes."""
    monkeypatch.setitem(CONTAINERS, ToyFiles.name, ToyFiles())


@pytest.mark.usefixtures("toy")
def test_a_new_container_is_one_class_and_one_row(run, make_model, tmp_path):
    model, path = make_model(), tmp_path / "m.toy"
    exported = dsr_tool.export(model, path)
    assert exported.kind == "toy" and exported.passed and exported.notes == ("a toy",)
    assert container_of(path).name == "toy"
    assert dsr_tool.verify(path, model).passed
    found = dsr_tool.footprint(path)
    assert found.file_bytes == found.computed_bytes == path.stat().st_size
    assert found.model.active == sum(int(torch.count_nonzero(v)) for v in model.module.state_dict().values())
    code, out, _ = run("report", path)
    assert code == 0 and "toy" in out and "agrees" in out
    # The other side of each function: damage is found, and the frame leaves no file that did not pass.
    raw = bytearray(path.read_bytes())
    raw[-4] ^= 0x40
    path.write_bytes(raw)
    assert not dsr_tool.verify(path, model).passed


@pytest.mark.usefixtures("toy")
def test_the_options_of_a_new_container_are_checked_by_its_row(make_model, tmp_path):
    for name, options, says in (
        ("m.toy", {"values": "fp16"}, "--values 'fp16' does not exist in toy files, which take fp32"),
        ("m.toy", {"encoding": "delta"}, "'delta' does not exist in toy files"),
        ("m.toy", {"compact": True}, "which toy files lack"),
        ("m.toy", {"to": "csr"}, "call it m.npz"),
        ("m.dsr", {"to": "toy"}, "would hold a toy file"),
        ("m.dsr", {"encoding": "text"}, "or --to toy"),
    ):
        with pytest.raises(UsageError, match=says):
            dsr_tool.export(make_model(), tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("toy")
def test_a_file_of_weights_alone_is_not_run(make_model, tmp_path):
    dsr_tool.export(make_model(), tmp_path / "m.toy")
    with pytest.raises(FormatError, match="is a toy file, which holds weights and no computation"):
        Session(tmp_path / "m.toy")


def test_a_new_container_with_a_graph_is_run_and_its_memory_computed(make_model, tmp_path, monkeypatch):
    monkeypatch.setitem(CONTAINERS, "toy", ToyModels())
    path, model = tmp_path / "m.toy", make_model()
    dsr_tool.export(model, path)
    x = np.ones((1, *model.config.input_shape), np.float32)
    with torch.no_grad():
        expected = model.module.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(Session(path).run(x), expected, atol=1e-5 * np.abs(expected).max())
    assert memory_document(read(path), MemoryRequest())["inference"][1]["computed_bytes"] > 0
    if library() is not None:
        assert fallback_document(read(path))["nodes"] > 0


def test_a_new_container_is_named_by_help_and_errors(run, make_model, tmp_path, monkeypatch):
    model, plain, missing = make_model(), tmp_path / "m.safetensors", tmp_path / "missing"
    dsr_tool.export(model, plain)
    monkeypatch.setitem(CONTAINERS, "toy", ToyModels())
    text = " ".join(run("export", "--help")[1].split())
    assert f"{listed()}; default:" in text and "state-dict (.pth), toy (.toy)" in text
    assert "for all: " in text and "coo, native, text." in text
    assert "reaches; for archive (.dsr), onnx (.onnx), plan (.dsrplan), toy (.toy)." in text
    with pytest.raises(FormatError, match=r"holds weights and no computation.*onnx \(\.onnx\), toy \(\.toy\)"):
        Session(plain)
    with pytest.raises(UsageError, match=r"does not say what is sparse.*csr \(\.npz\), toy \(\.toy\)"):
        read(plain)
    with pytest.raises(FileError, match=r"does not exist.*csr \(\.npz\), toy \(\.toy\)"):
        read(missing)
    dsr_tool.export(model, tmp_path / "m.npz")
    with pytest.raises(UsageError, match=r"--memory needs a computation.*onnx \(\.onnx\), toy \(\.toy\)"):
        memory_document(read(tmp_path / "m.npz"), MemoryRequest())


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_that_has_a_graph_has_a_reader_and_one_that_is_measurable_a_measure(name):
    kind = type(CONTAINERS[name])
    assert CONTAINERS[name].has_graph == (kind.reader is not Container.reader)
    assert CONTAINERS[name].measurable == (kind.measure is not Container.measure)


def test_a_container_that_fails_its_own_verification_leaves_nothing(make_model, tmp_path, monkeypatch):
    class Broken(ToyFiles):
        def encode(self, checked, options):
            draft = super().encode(checked, options)

            def write(path):
                draft.write(path)
                path.write_bytes(path.read_bytes()[:-8] + bytes(7) + b"\x40")

            return Draft(write)

    monkeypatch.setitem(CONTAINERS, "toy", Broken())
    (tmp_path / "m.toy").write_text("before")
    with pytest.raises(CheckFailed, match="toy file does not hold the model"):
        dsr_tool.export(make_model(), tmp_path / "m.toy", force=True)
    assert (tmp_path / "m.toy").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


# --- imports ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["exporters.containers", "dsr_tool.runtime.source"])
def test_the_table_imports_neither_torch_nor_onnx(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'onnx', 'onnxruntime'}} & set(sys.modules)))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout.strip()) == (0, ""), child.stderr


_SESSION = """
import sys
for absent in ("torch", "onnx", "onnxruntime", "google.protobuf"):
    sys.modules[absent] = None
import numpy
from dsr_tool.runtime import Session
print(Session(sys.argv[1]).run(numpy.ones((1, 3, 16, 16), numpy.float32)).shape)
"""


def test_an_archive_is_run_without_torch_and_onnx(make_model, tmp_path):
    dsr_tool.export(make_model(), tmp_path / "m.dsr")
    child = subprocess.run(
        [sys.executable, "-c", _SESSION, str(tmp_path / "m.dsr")], capture_output=True, text=True, check=False
    )
    assert (child.returncode, child.stdout.strip()) == (0, "(1, 10)"), child.stderr
