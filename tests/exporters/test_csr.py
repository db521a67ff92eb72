"""Exports to CSR files: scipy computes with them what PyTorch computes."""

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.nn import functional

import dsr_tool
from dsr_tool.errors import CheckFailed, FormatError, UsageError
from dsr_tool.formats.csr_file import write_csr
from exporters.export import export, verify


def test_every_layer_multiplies_as_in_pytorch(make_model, tmp_path):
    model = make_model()
    verification = export(model, tmp_path / "m.npz")
    assert verification.kind == "csr" and verification.passed and set(verification.runtimes) == {"pytorch"}
    layers = dsr_tool.load_csr(tmp_path / "m.npz")
    assert list(layers) == list(model.module.state_dict())
    for name, value in model.module.state_dict().items():
        if name in model.masks:
            assert scipy.sparse.issparse(layers[name])
            assert layers[name].nnz == int(model.masks[name].sum())
            np.testing.assert_array_equal(layers[name].toarray(), value.numpy().reshape(len(value), -1))
        else:
            np.testing.assert_array_equal(layers[name], value.numpy())
    x = torch.randn(192)
    expected = functional.linear(x, model.module[8].weight, model.module[8].bias).detach()
    np.testing.assert_allclose(layers["8.weight"] @ x.numpy() + layers["8.bias"], expected, atol=1e-6)


def test_a_convolution_equals_a_product_with_the_flattened_weight(make_model, tmp_path):
    model = make_model()
    export(model, tmp_path / "m.npz")
    weight = dsr_tool.load_csr(tmp_path / "m.npz")["0.weight"]
    x = torch.randn(1, 3, 16, 16)
    columns = functional.unfold(x, 3, padding=1)[0].numpy()
    expected = functional.conv2d(x, model.module[0].weight, padding=1).detach().reshape(32, -1)
    np.testing.assert_allclose(weight @ columns, expected, atol=1e-5)


def test_float16_weights_are_stored_and_widened_on_loading(make_model, tmp_path):
    model = make_model()
    verification = export(model, tmp_path / "m.npz", values="fp16")
    assert verification.passed and verification.weights_equal
    assert (tmp_path / "m.npz").stat().st_size < export(model, tmp_path / "n.npz").file_bytes
    with np.load(tmp_path / "m.npz") as file:
        assert file["8.weight:data"].dtype == np.float16 and file["3.weight"].dtype == np.float16
        assert file["8.bias"].dtype == file["1.weight"].dtype == np.float32
    layers = dsr_tool.load_csr(tmp_path / "m.npz")
    half = model.module[8].weight.detach().half().float().numpy()
    assert layers["8.weight"].dtype == layers["3.weight"].dtype == np.float32
    np.testing.assert_array_equal(layers["8.weight"].toarray(), half)
    assert layers.tensor("8.weight").values.dtype == np.float16


def test_the_same_model_gives_the_same_bytes(make_model, tmp_path):
    for name in ("one.npz", "two.npz"):
        export(make_model(), tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_a_file_passes_against_its_model_and_no_other(make_model, tmp_path):
    export(make_model(), tmp_path / "m.npz")
    assert verify(tmp_path / "m.npz", make_model(), seed=3).passed
    assert not verify(tmp_path / "m.npz", make_model(0.7)).masks_equal
    changed = make_model()
    with torch.no_grad():
        changed.weights["8.weight"][changed.masks["8.weight"]] += 0.25
    found = verify(tmp_path / "m.npz", changed)
    assert found.masks_equal and not found.weights_equal
    assert any("'8.weight'" in problem for problem in found.problems)
    assert any("pytorch differs from PyTorch" in problem for problem in found.problems)
    with pytest.raises(CheckFailed, match="'10.weight' is of shape"):
        verify(tmp_path / "m.npz", make_model(classes=7))
    (tmp_path / "m.npz").write_bytes((tmp_path / "m.npz").read_bytes()[:-30])
    with pytest.raises(FormatError, match="damaged"):
        verify(tmp_path / "m.npz", make_model())


def test_a_failed_verification_leaves_no_file(make_model, tmp_path, monkeypatch):
    def broken(path, tensors, *rest, **options):
        weight = tensors["8.weight"]
        tensors = {**tensors, "8.weight": type(weight)(weight.mask, weight.values * np.float32(1.01))}
        write_csr(path, tensors, *rest, **options)

    monkeypatch.setattr("dsr_tool.formats.csr_file.write_csr", broken)
    with pytest.raises(CheckFailed, match="'8.weight'"):
        export(make_model(), tmp_path / "m.npz")
    assert not list(tmp_path.iterdir())


def test_unknown_options_and_a_missing_input_shape_are_refused(make_model, tmp_path):
    with pytest.raises(UsageError, match="'delta' does not exist in csr files"):
        export(make_model(), tmp_path / "m.npz", encoding="delta")
    with pytest.raises(UsageError, match="fp16"):
        export(make_model(), tmp_path / "m.npz", values="fp8")
    with pytest.raises(UsageError, match="input shape"):
        export(make_model(input_shape=()), tmp_path / "m.npz")
    assert not list(tmp_path.iterdir())
