"""Exports to archives with float16 weights."""

import re

import numpy as np
import pytest
import torch

from converters.loading import load
from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.formats.archive import open_archive
from dsr_tool.runtime import Session
from exporters.export import export, verify
from exporters.values import stored_as
from exporters.verify.rounding import rounded_model

pytestmark = pytest.mark.usefixtures("trace_once")


def halved(model):
    return rounded_model(model, stored_as(model.tensors(), model.specs, "fp16"))


@pytest.fixture
def half(make_model, tmp_path):
    export(make_model(), tmp_path / "half.dsr", values="fp16")
    return tmp_path / "half.dsr"


def test_weights_are_stored_as_float16_and_nothing_else(make_model, half, tmp_path):
    export(make_model(), tmp_path / "whole.dsr")
    whole, rounded = open_archive(tmp_path / "whole.dsr"), open_archive(half)
    assert rounded.nbytes < whole.nbytes
    for name, entry in rounded.entries.items():
        expected = whole.tensor(name)
        values = expected.values.astype(np.float16) if entry.spec.weight else expected.values
        assert rounded.tensor(name).values.tobytes() == values.tobytes()
        assert rounded.tensor(name).mask.equals(expected.mask)


def test_verification_compares_with_the_rounded_model_and_notes_the_effect_of_rounding(make_model, tmp_path):
    model = make_model()
    found = export(model, tmp_path / "m.dsr", values="fp16")
    assert found.passed and found.weights_equal and found.masks_equal
    assert set(found.runtimes) == {"onnxruntime", "sparse"} and found.largest_difference <= found.tolerance
    measured = float(re.search(r"differ by up to (\S+) ", found.notes[0]).group(1))
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, *model.config.input_shape)).astype(np.float32))
    with torch.no_grad():
        moved = (model.module.eval()(x) - halved(model).module(x)).abs().max().item()
    assert moved <= measured * 1.01 and 0 < measured < found.scale / 100
    assert verify(tmp_path / "m.dsr", make_model()).notes == found.notes
    assert not export(model, tmp_path / "whole.dsr").notes


def test_a_model_that_rounds_to_other_values_does_not_pass(make_model, half):
    model = make_model()
    with torch.no_grad():
        weight = model.weights["8.weight"]
        weight[model.masks["8.weight"]] *= 1.01
    found = verify(half, model)
    assert found.masks_equal and not found.weights_equal and not found.passed


def test_a_float16_archive_loads_as_float32_and_exports_to_the_same_bytes(make_model, half, tmp_path):
    loaded = load(half, make_model().module)
    assert {tensor.dtype for tensor in loaded.module.state_dict().values()} == {torch.float32, torch.int64}
    expected = halved(make_model()).module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.module.state_dict().items())
    again = export(loaded, tmp_path / "again.dsr", values="fp16")
    assert (tmp_path / "again.dsr").read_bytes() == half.read_bytes()
    assert again.notes[0].startswith("with weights rounded to float16, outputs differ by up to 0 from")


def test_the_sparse_runtime_computes_with_float32(half, make_model):
    session = Session(half)
    x = np.random.default_rng(1).standard_normal((2, *make_model().config.input_shape)).astype(np.float32)
    with torch.no_grad():
        expected = halved(make_model()).module(torch.from_numpy(x)).numpy()
    assert session.run(x).dtype == np.float32
    np.testing.assert_allclose(session.run(x), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_a_weight_that_float16_cannot_hold_leaves_no_file(make_model, tmp_path, value):
    model = make_model()
    with torch.no_grad():
        model.weights["8.weight"][model.masks["8.weight"]] = value
    with pytest.raises(UsageError, match="cannot hold weight '8.weight'"):
        export(model, tmp_path / "m.dsr", values="fp16")
    assert list(tmp_path.iterdir()) == []


def test_unknown_values_and_inconsistent_models_leave_no_file(make_model, tmp_path):
    with pytest.raises(UsageError, match="--values 'int7' is unknown"):
        export(make_model(), tmp_path / "m.dsr", values="int7")
    model = make_model()
    with torch.no_grad():
        model.weights["8.weight"].fill_(1)
    with pytest.raises(CheckFailed):
        export(model, tmp_path / "m.dsr", values="fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["delta", "bitmask", "csr", "dense"])
def test_every_encoding_holds_the_rounded_model(make_model, tmp_path, encoding):
    assert export(make_model(), tmp_path / "m.dsr", encoding=encoding, values="fp16").passed
