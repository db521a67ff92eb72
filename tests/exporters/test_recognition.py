"""Files are recognised by their content everywhere; files of no container are refused in one sentence."""

import json

import numpy as np
import pytest
import torch

import dsr_tool
from dsr_tool.errors import DsrError, FileError, FormatError
from dsr_tool.measure.latency import Settings, bench_document
from dsr_tool.report.sources import read
from dsr_tool.runtime import Session
from exporters.base import Head
from exporters.containers import CONTAINERS, container_of
from exporters.export import densify_export
from exporters.onnx.session import OnnxSession

pytestmark = pytest.mark.usefixtures("trace_once")

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


@pytest.mark.parametrize("to", CONTAINERS)
def test_exactly_one_container_recognises_a_file(make_model, tmp_path, to):
    dsr_tool.export(make_model(), tmp_path / "m", to=to)
    head = Head(tmp_path / "m")
    assert [name for name, container in CONTAINERS.items() if container.recognises(head)] == [to]


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
    kinds = "archive (.dsr), onnx (.onnx), plan (.dsrplan), csr (.npz), safetensors (.safetensors), state-dict (.pth)"
    assert kinds in err


def test_paths_without_a_file(tmp_path):
    for use in (Session, container_of):
        with pytest.raises(FileError, match="does not exist"):
            use(tmp_path / "none")
        with pytest.raises(FileError, match="is not a file"):
            use(tmp_path)
    with pytest.raises(DsrError):
        densify_export(tmp_path / "none.onnx", tmp_path / "d.onnx")


def test_safetensors_whose_header_length_begins_like_an_onnx_file(tmp_path):
    from safetensors.numpy import save_file

    # Headers are padded to multiples of 8, so one of 0x..08 bytes is as likely as any other.
    for length in range(400):
        save_file({"x" * (length + 1): np.zeros(1, np.float32)}, tmp_path / "m")
        if (tmp_path / "m").read_bytes()[:1] == b"\x08":
            break
    assert container_of(tmp_path / "m").name == "safetensors"
