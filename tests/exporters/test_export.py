"""The public function `export`: every combination of options is verified or refused in one sentence."""

import functools
from dataclasses import replace

import pytest
import torch
from torchvision import models

import dsr_tool
from converters.conversion import convert
from converters.loading import load
from dsr_tool.errors import FileError, UsageError
from dsr_tool.sparse.trace import trace
from exporters.containers import CONTAINERS, container_of
from exporters.export import densify_export, export
from exporters.onnx.native_node import NATIVE

FILES = {"m.dsr": "archive", "m.onnx": "onnx", "m.npz": "csr", "m.safetensors": "safetensors", "m.pth": "state-dict"}


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize("name", [*FILES, "m.pt", "m", "m.DSR"])
def test_the_ending_chooses_the_container_and_the_content_shows_it(make_model, tmp_path, name):
    verification = export(make_model(), tmp_path / name)
    expected = FILES.get(name, "state-dict" if name == "m.pt" else "archive")
    assert verification.passed and verification.kind == expected == container_of(tmp_path / name).name
    assert verification.path == tmp_path / name and verification.file_bytes == (tmp_path / name).stat().st_size


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize(
    ("to", "encoding"), [(to, e) for to, one in CONTAINERS.items() for e in one.encodings if e != "nm"]
)
def test_every_encoding_of_every_container_is_verified(make_model, tmp_path, to, encoding):
    if CONTAINERS[to].compiles or encoding == NATIVE:
        try:
            dsr_tool.library()
        except UsageError as error:
            pytest.skip(str(error))
    assert export(make_model(), tmp_path / "m", to=to, encoding=encoding).passed
    assert container_of(tmp_path / "m").name == to


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize("to", [name for name, one in CONTAINERS.items() if "fp16" in one.values])
def test_float16_makes_every_container_smaller(make_model, tmp_path, to):
    exact = export(make_model(), tmp_path / "exact", to=to)
    half = export(make_model(), tmp_path / "half", to=to, values="fp16")
    assert half.passed and half.file_bytes < exact.file_bytes


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("m", {"to": "onix"}, "--to 'onix' is unknown; did you mean onnx"),
        ("m", {"to": "statedict"}, "did you mean state-dict"),
        ("m.npz", {"to": "archive"}, "an archive file, which readers of .npz files do not understand; call it m.dsr"),
        ("m.dsr", {"to": "csr"}, "a csr file, which readers of .dsr files do not understand; call it m.npz"),
        ("m.pth", {"to": "safetensors"}, "call it m.safetensors"),
        ("m.safetensors", {"to": "state-dict"}, "call it m.pth"),
        ("m.npy", {}, "call it m.dsr"),
        ("m.dsr", {"encoding": "delt"}, "--encoding 'delt' is unknown; did you mean delta"),
        ("m.npz", {"encoding": "delta"}, "'delta' does not exist in csr files, which take auto, csr"),
        ("m.safetensors", {"encoding": "csr"}, "does not exist in safetensors files, which take auto, dense"),
        ("m.onnx", {"encoding": "csr"}, "does not exist in onnx files"),
        ("m.dsr", {"values": "fp61"}, "--values 'fp61' is unknown; did you mean fp16"),
        ("m.npz", {"compact": True}, "--compact removes channels from a graph, which csr files lack"),
        ("m.pth", {"compact": True}, "or use --to archive, onnx or plan"),
    ],
)
def test_options_that_exclude_each_other_are_refused(make_model, tmp_path, name, options, says):
    with pytest.raises(UsageError, match=says):
        export(make_model(), tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_replaced_without_force(make_model, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileError, match="exists already"):
        export(make_model(), tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize("to", [name for name, one in CONTAINERS.items() if "fp16" in one.values])
def test_a_model_that_a_container_cannot_hold_is_refused_before_anything_is_written(make_model, tmp_path, to):
    model = make_model()
    with torch.no_grad():
        model.weights["8.weight"][model.masks["8.weight"]] = 1e6
    with pytest.raises(UsageError, match="cannot hold weight '8.weight'"):
        export(model, tmp_path / "new" / "m", to=to, values="fp16")
    assert not list(tmp_path.iterdir())


def test_a_folder_and_an_archive_export_to_the_same_bytes(tmp_path, monkeypatch):
    traced = functools.cache(lambda name, shape: trace(models.squeezenet1_1(num_classes=5), shape))
    monkeypatch.setattr("exporters.checked.trace", lambda module, shape: traced(type(module).__name__, shape))
    convert("squeezenet1_1", sparsity=0.9, num_classes=5, input_size=64).save(tmp_path / "net")
    export(load(tmp_path / "net"), tmp_path / "net.dsr")
    for name in FILES:
        for source in ("net", "net.dsr"):
            assert export(load(tmp_path / source), tmp_path / f"{source}-{name}").passed
        assert (tmp_path / f"net-{name}").read_bytes() == (tmp_path / f"net.dsr-{name}").read_bytes()


def test_a_dense_onnx_file_is_not_called_by_the_ending_of_another_container(tmp_path):
    with pytest.raises(UsageError, match=r"would hold an onnx file, .*call it d\.onnx"):
        densify_export(tmp_path / "m.onnx", tmp_path / "d.dsr")


@pytest.mark.usefixtures("trace_once")
def test_a_compact_onnx_file_becomes_dense(make_model, tmp_path):
    small = export(make_model(0.9), tmp_path / "m.onnx")
    done = densify_export(tmp_path / "m.onnx", tmp_path / "d.onnx")
    plain = export(make_model(0.9), tmp_path / "p.onnx", encoding="dense")
    assert done.passed and done.file_bytes > small.file_bytes
    assert abs(done.file_bytes - plain.file_bytes) < 0.02 * plain.file_bytes
    assert dsr_tool.verify(tmp_path / "d.onnx", make_model(0.9)).passed
    with pytest.raises(FileError, match="exists already"):
        densify_export(tmp_path / "m.onnx", tmp_path / "d.onnx")


def test_a_graph_that_was_captured_already_gives_the_same_file(make_model, captured, monkeypatch, tmp_path):
    model = make_model()
    export(model, tmp_path / "own.dsr")
    monkeypatch.setattr("exporters.checked.trace", lambda *_: pytest.fail("captured again"))
    for name in ("given.dsr", "given.onnx"):
        assert export(model, tmp_path / name, graph=captured).passed
    assert (tmp_path / "own.dsr").read_bytes() == (tmp_path / "given.dsr").read_bytes()


def test_a_graph_of_another_network_is_refused(make_model, captured, tmp_path):
    foreign = replace(captured, parameters=("other.weight", *captured.parameters[1:]))
    with pytest.raises(UsageError, match="'other.weight' that the model lacks"):
        export(make_model(), tmp_path / "x.dsr", graph=foreign)
    assert list(tmp_path.iterdir()) == []
