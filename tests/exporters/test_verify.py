"""A file that differs from its model does not pass, and an export that fails leaves no file."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from dsr_tool.errors import CheckFailed, FileError, FormatError, UsageError
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.export import export, verify
from exporters.onnx.decode import find
from exporters.verify.result import require

pytestmark = pytest.mark.usefixtures("trace_once")
NAMES = ("m.dsr", "m.onnx")


def code_of(proto, name):
    """Returns the initializer with the positions of a weight."""
    arrays = {tensor.name: tensor for tensor in proto.graph.initializer}
    return arrays[find(name, {node.output[0]: node for node in proto.graph.node}, arrays).leaves["code"]]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_passes_against_its_model_and_no_other(make_model, tmp_path, name):
    model = make_model()
    path = tmp_path / name
    export(model, path)
    assert verify(path, make_model(), samples=3, seed=5).passed

    with pytest.raises(CheckFailed, match="'10.weight' is of shape .10, 64. in the file and of shape .7, 64. in"):
        verify(path, make_model(classes=7))
    grown = make_model(0.7)
    assert not verify(path, grown).masks_equal
    with torch.no_grad():
        model.weights["8.weight"][model.masks["8.weight"]] += 0.25
    changed = verify(path, model)
    assert changed.masks_equal and not changed.weights_equal and not changed.passed
    assert any("'8.weight'" in problem for problem in changed.problems)
    assert any("differs from PyTorch" in problem for problem in changed.problems)
    with pytest.raises(CheckFailed, match="does not hold the model"):
        require(changed)


def test_a_wrong_computation_is_found_though_the_weights_agree(make_model, tmp_path):
    export(make_model(), tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    relu = next(node for node in proto.graph.node if node.op_type == "Relu")
    relu.op_type = "Abs"
    onnx.save(proto, tmp_path / "m.onnx")
    found = verify(tmp_path / "m.onnx", make_model())
    assert found.weights_equal and not found.passed and found.largest_difference > found.tolerance


def test_decoding_at_every_inference_is_found(make_model, tmp_path):
    export(make_model(), tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    # An initializer that a caller may replace is no constant.
    code = code_of(proto, "8.weight")
    proto.graph.input.append(onnx.helper.make_tensor_value_info(code.name, 2, code.dims))
    onnx.save(proto, tmp_path / "m.onnx")
    left = verify(tmp_path / "m.onnx", make_model())
    assert any("at every inference" in problem for problem in left.problems)


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_verification_leaves_no_file(make_model, tmp_path, monkeypatch, name):
    model = make_model()
    tensors = model.tensors()
    weight = tensors["8.weight"]
    broken = {**tensors, "8.weight": SparseTensor(weight.mask, weight.values * np.float32(1.01))}
    answers = iter([broken])  # what is written; verification asks again
    monkeypatch.setattr(model, "tensors", lambda: next(answers, tensors))
    with pytest.raises(CheckFailed, match="'8.weight'"):
        export(model, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_weights_outside_the_masks_are_not_exported(make_model, tmp_path, name):
    model = make_model()
    with torch.no_grad():
        model.weights["8.weight"].fill_(1.0)
    with pytest.raises(CheckFailed, match="outside its mask"):
        export(model, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_force_replaces_only_after_the_verification(make_model, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_text("before")
    monkeypatch.setattr("exporters.verify.compare.RELATIVE_TOLERANCE", -1.0)
    with pytest.raises(CheckFailed):
        export(make_model(), path, force=True)
    assert path.read_text() == "before"
    monkeypatch.undo()
    assert export(make_model(), path, force=True).file_bytes == path.stat().st_size


def test_outputs_that_are_all_zero_are_noted(make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.module[10].weight.zero_()
        model.module[10].bias.zero_()
    assert "every output is zero" in export(model, tmp_path / "m.dsr").notes[0]


def test_outputs_that_are_not_finite_do_not_pass(make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.module[10].bias[0] = float("nan")
    with pytest.raises(CheckFailed, match="not finite"):
        export(model, tmp_path / "m.onnx")


def test_another_architecture_is_named(make_model, tmp_path):
    export(make_model(), tmp_path / "m.dsr")
    other = make_model()
    other.module.append(torch.nn.Linear(10, 2))
    with pytest.raises(CheckFailed, match="'11.weight' is absent in the file and of shape .2, 10. in the model"):
        verify(tmp_path / "m.dsr", other)


def test_training_flags_and_active_zeros_are_kept(make_model, tmp_path):
    model = make_model()
    model.module.train()
    with torch.no_grad():
        model.weights["8.weight"].view(-1)[model.masks["8.weight"].view(-1).nonzero()[0]] = 0.0
    for name in NAMES:
        assert export(model, tmp_path / name).passed
    assert all(child.training for child in model.module.modules())
    assert all(parameter.dtype == torch.float32 for parameter in model.module.parameters())


def test_missing_files_and_text_are_refused(make_model, tmp_path):
    with pytest.raises(FileError):
        verify(tmp_path / "none", make_model())
    (tmp_path / "text").write_text("neither of the two")
    with pytest.raises(FormatError):
        verify(tmp_path / "text", make_model())


def test_a_damaged_initializer_is_a_format_error(make_model, tmp_path):
    export(make_model(), tmp_path / "m.onnx", encoding="delta")
    proto = onnx.load(tmp_path / "m.onnx")
    part = code_of(proto, "8.weight")
    part.CopyFrom(numpy_helper.from_array(np.full(part.dims[0], 255, np.uint8), part.name))
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(FormatError, match="'8.weight'"):
        verify(tmp_path / "m.onnx", make_model())


def test_a_verification_converts_to_plain_values(make_model, tmp_path):
    verification = export(make_model(), tmp_path / "m.dsr")
    data = verification.to_dict()
    assert data["passed"] is True and data["kind"] == "archive" and data["path"] == str(tmp_path / "m.dsr")
    assert replace(verification, problems=("x",)).passed is False


def test_an_archive_too_large_for_onnx_is_verified_by_our_runtime(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr("exporters.onnx.write._MAX_BYTES", 1000)
    verification = export(make_model(), tmp_path / "a.dsr")
    assert verification.passed
    assert set(verification.runtimes) == {"sparse"}
    assert "onnxruntime cannot run it" in verification.notes[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_types_are_refused(make_model, tmp_path, dtype):
    model = make_model()
    model.to(dtype)
    for name in NAMES:
        with pytest.raises(UsageError, match="float32"):
            export(model, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
