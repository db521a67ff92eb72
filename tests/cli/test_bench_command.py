"""dsr-tool bench and predict on archives and on ONNX files."""

import json
import re

import numpy as np
import pytest

from dsr_tool.measure import latency as bench
from dsr_tool.runtime.compiler import plan
from dsr_tool.runtime.kernels.library import library


@pytest.fixture
def one_child(monkeypatch):
    monkeypatch.setattr(bench, "_CHILDREN", 1)


@pytest.fixture(autouse=True)
def no_kernel_for_concat(monkeypatch):
    """In this process, so that a network has nodes on the reference."""
    monkeypatch.setattr(plan, "RULES", {name: rule for name, rule in plan.RULES.items() if name != "Concat"})


@pytest.mark.usefixtures("one_child")
@pytest.mark.parametrize("runtime", ["sparse", "scipy"])
def test_bench_of_an_archive(run_json, archive, runtime):
    done = run_json("bench", archive, "--rounds", 4, "--batch", 2, "--runtime", runtime)
    assert done["schema"] == "dsr-tool/bench/1"
    assert done["runtime"] == runtime
    assert (done["fallback"] or {}).get("operators") == (["Concat"] if runtime == "sparse" and library() else None)
    assert done["latency"]["ratio"]["low"] <= done["latency"]["ratio"]["median"] <= done["latency"]["ratio"]["high"]
    assert done["outputs"]["largest_difference"] <= 1e-5 * done["outputs"]["scale"]
    for key in ("load_s", "loaded_bytes", "peak_bytes"):
        assert set(done[key]) == {"ours", "dense"}
        assert min(done[key].values()) > 0


@pytest.mark.usefixtures("one_child")
@pytest.mark.skipif(library() is None, reason="no kernels")
def test_bench_lists_the_time_of_each_op(run_json, run, archive):
    layers = run_json("bench", archive, "--rounds", 4, "--batch", 2, "--layers")["layers"]
    rows = layers["ops"]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert layers["ops_s"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert layers["reference_s"] == pytest.approx(sum(row["seconds"] for row in rows if row["operator"] == "Concat"))
    assert {row["layer"] for row in rows} > {"features.0", "classifier.1"}
    for row in rows:
        assert row["on_reference"] == (row["operator"] == "Concat")
        assert (row["gflops"] is None) == (row["multiply_adds"] == 0)
        if row["gflops"] is not None:
            assert row["gflops"] == pytest.approx(2e-9 * row["multiply_adds"] / row["seconds"])
            assert row["peak_share"] == pytest.approx(row["gflops"] / layers["peak_gflops"])
    code, out, _ = run("bench", archive, "--rounds", 4, "--layers")
    assert code == 0
    assert "8 nodes on the reference took" in out
    assert "in registers reach here" in out


@pytest.mark.usefixtures("one_child")
def test_bench_of_an_onnx_file(run, onnx_file):
    code, out, err = run("bench", onnx_file, "--rounds", 4, "--quiet")
    assert (code, err) == (0, "")
    assert "onnxruntime, dense" in out
    if library():
        assert re.search(r"^8 of \d+ nodes run on the reference: Concat$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere.dsr",), 1, "'nowhere.dsr' does not exist"),
        (("nowhere.onnx",), 1, "'nowhere.onnx' does not exist"),
        (("nowhere.dsr", "--threads", 0), 2, "--threads 0 is not in 1 to"),
        (("nowhere.dsr", "--batch", 0), 2, "--batch 0 is not in 1 to"),
        (("nowhere.dsr", "--runtime", "scipy", "--layers"), 2, "--layers times the kernels"),
        (("nowhere.dsr", "--batch", "two"), 2, "'two' is not a valid integer"),
    ],
)
def test_wrong_arguments_of_bench_are_one_sentence(run, arguments, code, message):
    found, out, err = run("bench", *arguments, "--quiet")
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1


def test_bench_names_an_unknown_operator(run, tmp_path):
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Det", ["x"], ["y"])], "g", values[:1], values[1:])
    path = tmp_path / "det.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    code, _, err = run("bench", path, "--quiet")
    assert code == 2
    assert "operator Det (output 'y')" in err


@pytest.mark.parametrize("runtime", ["sparse", "onnxruntime"])
def test_predict_of_an_onnx_file(run, archive, onnx_file, tmp_path, runtime):
    inputs = tmp_path / "x.npy"
    np.save(inputs, np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32))
    results = []
    for file in (archive, onnx_file):
        code, out, err = run("predict", file, inputs, "--runtime", runtime, "--json")
        assert code == 0, err
        results.append(json.loads(out)["predictions"])
    for one, other in zip(*results, strict=True):
        assert [item["class"] for item in one["top"]] == [item["class"] for item in other["top"]]
        ours, theirs = ([item["probability"] for item in found["top"]] for found in (one, other))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_predict_refuses_pictures_for_files_without_preprocessing(run, onnx_file):
    code, _, err = run("predict", onnx_file, "x.npy", "cat.jpg")
    assert code == 2
    assert "does not say how to preprocess pictures such as 'cat.jpg'" in err
