"""`export` into every container, and `report` and `verify` of the files."""

import json
import shutil

import numpy as np
import pytest
import torch
from torchvision import models

import dsr_tool
from dsr_tool.sparse.trace import trace

pytestmark = pytest.mark.usefixtures("trace_once")
FILES = {"a.dsr": "archive", "a.onnx": "onnx", "a.npz": "csr", "a.safetensors": "safetensors", "a.pth": "state-dict"}


@pytest.fixture
def trace_once(monkeypatch, captured):
    """Lets exports and verifications share one captured graph, which saves seconds for each."""
    monkeypatch.setattr("exporters.checked.trace", lambda module, shape: captured)


@pytest.fixture(scope="module")
def captured(folder):
    return trace(dsr_tool.load(folder).module, (3, 64, 64))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_export_and_verify_agree_about_every_container(run_json, folder, tmp_path, name, values):
    exported = run_json("export", folder, "-o", tmp_path / name, "--values", values)
    assert exported["schema"] == "dsr-tool/export/1" and exported["kind"] == FILES[name]
    assert exported["passed"] and exported["masks_equal"] and exported["weights_equal"]
    assert exported["file_bytes"] == (tmp_path / name).stat().st_size
    verified = run_json("verify", tmp_path / name, "--against", folder)
    assert verified["passed"] and verified["kind"] == FILES[name]


def test_an_archive_is_a_source_like_its_folder(run_json, archive, tmp_path):
    for to in ("onnx", "csr", "safetensors", "state-dict"):
        assert run_json("export", archive, "-o", tmp_path / to, "--to", to)["kind"] == to


def test_layers_of_a_csr_file_multiply_as_in_the_readme(run, folder, tmp_path):
    assert run("export", folder, "-o", tmp_path / "m.npz")[0] == 0
    layers = dsr_tool.load_csr(tmp_path / "m.npz")
    y = layers["classifier.1.weight"] @ np.ones(512, np.float32)
    expected = dsr_tool.load(folder).module.classifier[1].weight.sum((1, 2, 3)).detach().numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)


def test_a_state_dict_loads_into_torchvision_and_its_size_is_noted(run, folder, tmp_path):
    code, out, err = run("export", folder, "-o", tmp_path / "m.pth")
    assert (code, err) == (0, "")
    assert "as large as a dense one" in out and out.count("\n") == 4
    net = models.squeezenet1_1(num_classes=5)
    net.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True))


def test_report_of_a_csr_file_accounts_for_every_byte(run, run_json, folder, tmp_path):
    run_json("export", folder, "-o", tmp_path / "m.npz")
    whole, report = run_json("report", folder), run_json("report", tmp_path / "m.npz")
    assert report["kind"] == "csr" and report["prunable"] == whole["prunable"] and report["model"] == whole["model"]
    assert report["file_bytes"] == report["computed_bytes"] == (tmp_path / "m.npz").stat().st_size
    assert set(report["parts_bytes"]) == {"sparse weights", "dense rest", "description", "zip container"}
    assert report["parts_bytes"]["sparse weights"] < report["prunable"]["csr_bytes"]
    code, out, _ = run("report", tmp_path / "m.npz")
    assert code == 0 and "agrees" in out


@pytest.mark.parametrize("command", ["report", "verify"])
def test_damaged_csr_files_are_refused(run, folder, tmp_path, command):
    assert run("export", folder, "-o", tmp_path / "m.npz")[0] == 0
    raw = bytearray((tmp_path / "m.npz").read_bytes())
    raw[len(raw) // 2] ^= 0x55
    (tmp_path / "m.npz").write_bytes(raw)
    against = ["--against", folder] if command == "verify" else []
    code, out, err = run(command, tmp_path / "m.npz", *against)
    assert (code, out, err.count("\n")) == (3 if against else 1, "", 1)
    assert "damaged" in err


def test_a_compact_onnx_file_becomes_dense(run_json, folder, onnx_file, tmp_path):
    done = run_json("export", onnx_file, "-o", tmp_path / "d.onnx", "--encoding", "dense")
    assert done["schema"] == "dsr-tool/export/1" and done["kind"] == "onnx" and done["passed"]
    assert done["file_bytes"] == (tmp_path / "d.onnx").stat().st_size > onnx_file.stat().st_size
    assert run_json("verify", tmp_path / "d.onnx", "--against", folder)["passed"]


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Returns a folder of preprocessed inputs."""
    path = tmp_path_factory.mktemp("arrays")
    np.save(path / "some.npy", np.random.default_rng(0).standard_normal((20, 3, 64, 64), np.float32))
    return path


def test_rounding_by_pictures_and_the_agreement_on_others(run, run_json, folder, arrays, tmp_path):
    few = ("--values", "int5", "--calibrate", arrays, "--images", arrays)
    found = run_json("export", folder, "-o", tmp_path / "a.dsr", *few, "--min-agreement", "0.01")
    assert found["passed"] and found["pictures"] == 20 and 0 < found["agreement"] <= 1
    assert found["rounding_largest"] > found["rounding_mean"] > 0
    code, out, err = run("export", folder, "-o", tmp_path / "b.dsr", *few, "--calibration-images", "4", "--quiet")
    assert (code, err) == (0, "") and "top-1 answers equal to those of the model: " in out
    assert "26 weights were rounded to keep the outputs on 4 pictures" in out and "mostly noise" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "a.dsr", "--calibrate", "x"], "--values 'fp32' does not do that"),
        (["-o", "a.dsr", "--values", "int5", "--calibrate", "x", "--compact"], "leave one of them out"),
        (["-o", "a.dsr", "--min-agreement", "0.9"], "give --images too"),
        (["-o", "a.npz", "--encoding", "delta"], "does not exist in csr files"),
        (["-o", "a.dsr", "--values", "fp61"], "did you mean fp16"),
        (["-o", "a.pth", "--compact"], "which state-dict files lack"),
        (["-o", "a.npz", "--to", "safetensors"], "call it a.safetensors"),
        (["-o", "a.dsr", "--to", ""], "--to '' is unknown"),
    ],
)
def test_wrong_arguments_of_export_are_one_sentence(run, folder, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("export", folder, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert not list(tmp_path.iterdir())


def test_an_onnx_file_becomes_an_archive_that_every_command_takes(run_json, run, onnx_file, tmp_path):
    exported = run_json("export", onnx_file, "-o", tmp_path / "a.dsr")
    assert (
        exported["passed"] and exported["kind"] == "archive" and set(exported["runtimes"]) == {"onnxruntime", "sparse"}
    )
    assert run_json("verify", tmp_path / "a.dsr", "--against", onnx_file)["passed"]
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32))
    (one,), (other,) = (
        run_json("predict", file, tmp_path / "x.npy")["predictions"] for file in (onnx_file, tmp_path / "a.dsr")
    )
    assert [best["class"] for best in one["top"]] == [best["class"] for best in other["top"]]
    shares = [run_json("report", file)["sparsity_of_prunable_weights"] for file in (onnx_file, tmp_path / "a.dsr")]
    assert shares[0] == shares[1] > 0
    # The file does not say how pictures become inputs, and neither does the archive.
    code, _, err = run("predict", tmp_path / "a.dsr", tmp_path / "x.jpg")
    assert code == 2 and "x.jpg" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "a.npz"], "csr files take the parameters of a model"),
        (["-o", "a.dsr", "--calibrate", "photos"], "--calibrate takes a model"),
        (["-o", "a.dsr", "--input-shape", "3,32,32"], "does not fit"),
        (["-o", "a.dsr", "--encoding", "novel"], "--encoding"),
    ],
)
def test_wrong_options_beside_an_onnx_file_are_one_sentence(run, onnx_file, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("export", onnx_file, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert not list(tmp_path.iterdir())


def test_an_input_shape_is_for_onnx_files(run, folder, tmp_path):
    code, _, err = run("export", folder, "-o", tmp_path / "a.dsr", "--input-shape", "3,64,64")
    assert code == 2 and "--input-shape is for ONNX files" in err


def test_an_archive_over_its_budget_is_reported(run, run_json, folder, tmp_path):
    assert run_json("export", folder, "-o", tmp_path / "a.dsr")["budget"] is None
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["model"]["conversion"].update(budget_bytes=400_000, budget_unit="kB")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    code, out, _ = run("export", tmp_path / "m", "-o", tmp_path / "b.dsr", "--encoding", "csr")
    assert code == 0 and "  budget 400.0 kB: does not fit, " in out
    assert run_json("export", tmp_path / "m", "-o", tmp_path / "c.dsr", "--values", "fp16")["budget"]["fits"]
    assert run_json("export", tmp_path / "m", "-o", tmp_path / "c.npz")["budget"] is None


def test_reports_name_float16_weights(run, folder, tmp_path):
    for name, values, says in (("a.dsr", "fp32", "dense fp32 "), ("b.dsr", "fp16", "dense fp16 (weights) ")):
        assert run("export", folder, "-o", tmp_path / name, "--values", values)[0] == 0
        assert says in run("report", tmp_path / name)[1]
