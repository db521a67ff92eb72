"""The table of containers: a new one is one class and one row, and files are recognised by their content alone."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import dsr_tool
from dsr_tool.errors import CheckFailed, DsrError, FileError, FormatError, UsageError
from dsr_tool.measure.latency import Settings, bench_document
from dsr_tool.report.sources import read
from dsr_tool.runtime import Session
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.base import Container, Draft
from exporters.containers import CONTAINERS, container_of
from exporters.contents import StoredBytes, measured
from exporters.export import densify_export
from exporters.onnx.session import OnnxSession

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
        return verify_tensors(
            path, self.name, checked, file.shapes, read_as_saved, half=False, samples=samples, seed=seed
        )

    def measure(self, path):
        file = ToyFile(path)
        stored = {name: StoredBytes(0, 8 * int(np.prod(shape))) for name, shape in file.shapes.items()}
        return measured(file, stored, {"header": file.header_bytes})


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


# --- content, not names ----------------------------------------------------------------------------------

X = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)


@pytest.fixture(params=["archive", "onnx"])
def misnamed(request, make_model, tmp_path):
    """A file with the ending of the other container, and the name of its own."""
    own, other = {"archive": (".dsr", ".onnx"), "onnx": (".onnx", ".dsr")}[request.param]
    dsr_tool.export(make_model(), tmp_path / f"m{own}", to=request.param)
    return (tmp_path / f"m{own}").rename(tmp_path / f"x{other}"), request.param


def test_sessions_go_by_content(misnamed, make_model):
    path, _ = misnamed
    with torch.no_grad():
        expected = make_model().module.eval()(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(Session(path).run(X), expected, atol=1e-5 * np.abs(expected).max())


def test_verify_and_report_go_by_content(misnamed, make_model):
    path, kind = misnamed
    found = dsr_tool.verify(path, make_model())
    assert found.passed and found.kind == kind
    assert read(path).kind == kind


@pytest.mark.parametrize("runtime", ["sparse", "onnxruntime"])
def test_predict_goes_by_content(run, misnamed, make_model, tmp_path, runtime):
    path, kind = misnamed
    np.save(tmp_path / "x.npy", X)
    code, out, err = run("predict", path, tmp_path / "x.npy", "--runtime", runtime, "--json")
    assert code == 0, err
    with torch.no_grad():
        best = make_model().module.eval()(torch.from_numpy(X)).argmax(1).tolist()
    assert [one["top"][0]["class"] for one in json.loads(out)["predictions"]] == best
    (tmp_path / "cat.png").write_bytes(b"")
    code, _, err = run("predict", path, tmp_path / "cat.png")
    # Only an archive says how pictures become inputs; this one is no picture.
    assert ("does not say how to preprocess pictures" in err) == (kind == "onnx") and code == 2 - (kind == "archive")


def test_bench_goes_by_content(misnamed, monkeypatch):
    path, _ = misnamed
    monkeypatch.setattr("dsr_tool.measure.latency._CHILDREN", 1)
    found = bench_document(path, Settings(rounds=4))
    assert found["outputs"]["largest_difference"] <= 1e-5 * found["outputs"]["scale"]
    assert found["architecture"] == "Small"


def test_export_goes_by_content(run, misnamed, tmp_path):
    path, kind = misnamed
    code, _, err = run("export", path, "-o", tmp_path / "d.onnx", "--encoding", "dense")
    if kind == "onnx":
        assert code == 0, err
        expected = OnnxSession(path).run(X)
        np.testing.assert_allclose(OnnxSession(tmp_path / "d.onnx").run(X), expected, atol=1e-6)
    else:
        # An archive goes back into its module, which this one does not name; it is not taken for an ONNX file.
        assert code in (1, 2) and "Small" in err, err


# --- files of no container -------------------------------------------------------------------------------

NONSENSE = {"empty": b"", "text": b"hello\n", "zeros": bytes(64), "zip": b"PK\x03\x04" + bytes(40), "byte": b"\x08"}


@pytest.mark.parametrize("content", NONSENSE.values(), ids=NONSENSE)
@pytest.mark.parametrize("ending", [".dsr", ".onnx", ".npz", ".pth", ""])
def test_nonsense_gets_one_sentence(make_model, tmp_path, content, ending):
    path = tmp_path / f"m{ending}"
    path.write_bytes(content)
    for use in (Session, read, lambda path: dsr_tool.verify(path, make_model())):
        with pytest.raises(FormatError) as caught:
            use(path)
        assert caught.value.exit_code == 1
        assert str(path) in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "command", [("predict", "x.npy"), ("report",), ("bench", "--quiet"), ("export", "-o", "d.onnx")]
)
@pytest.mark.parametrize("content", [b"", b"hello\n"])
def test_commands_refuse_nonsense_with_exit_code_1(run, tmp_path, monkeypatch, command, content):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    (tmp_path / "m.onnx").write_bytes(content)
    code, out, err = run(command[0], "m.onnx", *command[1:])
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert ("is empty" in err) != ("starts like no file" in err)
    assert "archive (.dsr), onnx (.onnx), csr (.npz), safetensors (.safetensors), state-dict (.pth)" in err


def test_paths_without_a_file(tmp_path):
    for use in (Session, container_of):
        with pytest.raises(FileError, match="does not exist"):
            use(tmp_path / "none")
        with pytest.raises(FileError, match="is not a file"):
            use(tmp_path)
    with pytest.raises(DsrError):
        densify_export(tmp_path / "none.onnx", tmp_path / "d.onnx", encoding="dense")


def test_safetensors_whose_header_length_begins_like_an_onnx_file(tmp_path):
    from safetensors.numpy import save_file

    # Headers are padded to multiples of 8, so one of 0x..08 bytes is as likely as any other.
    for length in range(400):
        save_file({"x" * (length + 1): np.zeros(1, np.float32)}, tmp_path / "m")
        if (tmp_path / "m").read_bytes()[:1] == b"\x08":
            break
    assert container_of(tmp_path / "m").name == "safetensors"


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
