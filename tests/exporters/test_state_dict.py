"""Exports to plain state_dicts: other tools' loaders read them into ordinary modules."""

import resource
import signal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision import models

from dsr_tool.errors import CheckFailed, FileError, FormatError, UsageError
from dsr_tool.formats.footprint import footprint
from dsr_tool.sparse.sparsify import sparsify
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from exporters.export import export, verify


def torch_load(path):
    return torch.load(path, weights_only=True)


KINDS = {
    "m.safetensors": (load_file, "safetensors"),
    "m.pth": (torch_load, "state-dict"),
}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    """Returns a path, the function that loads such a file, and the name of its container."""
    return (tmp_path / request.param, *KINDS[request.param])


@pytest.fixture(scope="module")
def mobilenet():
    torch.manual_seed(0)
    config = ModelConfig("torchvision", "mobilenet_v3_small", 7, (3, 64, 64))
    return sparsify(models.mobilenet_v3_small(num_classes=7), config, Budget(sparsity=0.9))


def test_a_fresh_torchvision_model_computes_the_same(kind, mobilenet):
    path, load, called = kind
    verification = export(mobilenet, path)
    assert verification.passed and verification.kind == called and set(verification.runtimes) == {"pytorch"}
    fresh = models.mobilenet_v3_small(num_classes=7)
    state = load(path)
    assert fresh.load_state_dict(state).missing_keys == []
    for name, value in mobilenet.module.state_dict().items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = mobilenet.module.eval()(x)
        torch.testing.assert_close(fresh.eval()(x), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_a_full_disk_leaves_the_old_file(kind, mobilenet):
    path, *_ = kind
    path.write_text("old")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(FileError, match="could not be written: .*File too large"):
            export(mobilenet, path, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_float16_loads_into_a_plain_module(kind, mobilenet):
    path, load, _ = kind
    verification = export(mobilenet, path, values="fp16")
    assert verification.passed and "rounded to float16" in verification.notes[0]
    state = load(path)
    for name, spec in mobilenet.specs.items():
        value = mobilenet.module.state_dict()[name]
        assert state[name].dtype == (torch.float16 if spec.weight else value.dtype)
        assert torch.equal(state[name], value.to(state[name].dtype))
    fresh = models.mobilenet_v3_small(num_classes=7)
    fresh.load_state_dict(state)
    assert fresh.classifier[0].weight.dtype == torch.float32
    assert verify(path, mobilenet).passed


def test_the_file_is_as_large_as_dense_and_the_export_notes_it(kind, mobilenet):
    path, _, _ = kind
    note = export(mobilenet, path).notes[-1]
    dense = sum(value.nbytes for value in mobilenet.module.state_dict().values())
    assert path.stat().st_size > dense
    coded = footprint(mobilenet.tensors(), mobilenet.specs).everything.codec_bytes["delta"]
    assert "as large as a dense one" in note and f"{coded:,} bytes" in note


def test_the_same_model_gives_the_same_bytes(kind, make_model):
    path, _, _ = kind
    export(make_model(), path)
    other = path.with_name("another" + path.suffix)
    export(make_model(), other)
    assert path.read_bytes() == other.read_bytes()


def test_safetensors_files_name_their_format_as_pytorch(make_model, tmp_path):
    export(make_model(), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_file_passes_against_its_model_and_no_other(kind, make_model):
    path, _, _ = kind
    export(make_model(), path)
    assert verify(path, make_model(), seed=3).passed
    assert not verify(path, make_model(0.95)).masks_equal
    changed = make_model()
    with torch.no_grad():
        changed.module[10].bias += 1
    found = verify(path, changed)
    assert found.masks_equal and not found.weights_equal and not found.passed
    with pytest.raises(CheckFailed, match="'10.weight' is of shape"):
        verify(path, make_model(classes=7))


def test_a_value_where_the_model_has_a_zero_is_found(make_model, tmp_path):
    model = make_model()
    state = {name: value.clone() for name, value in model.module.state_dict().items()}
    state["8.weight"][~model.masks["8.weight"]] = 1e-30
    save_file(state, tmp_path / "m.safetensors")
    found = verify(tmp_path / "m.safetensors", model)
    assert not found.masks_equal and "zeros of '8.weight'" in found.problems[0]


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_cut_files_are_refused(make_model, tmp_path, name):
    path = tmp_path / name
    export(make_model(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FormatError):
        verify(path, make_model())


@pytest.mark.parametrize("content", [[torch.zeros(3)], {"a": 3}, torch.zeros(3), {1: "x"}])
def test_pickles_that_are_no_state_dict_are_refused(make_model, tmp_path, content):
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(FormatError, match="no state_dict of tensors"):
        verify(tmp_path / "m.pth", make_model())


def test_pickles_are_never_run(make_model, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"a": Evil()}, tmp_path / "m.pth")
    with pytest.raises(FormatError, match="cannot be read as a state_dict"):
        verify(tmp_path / "m.pth", make_model())
    assert not (tmp_path / "owned").exists()


def test_types_that_no_export_writes_are_refused(make_model, tmp_path):
    model = make_model()
    save_file({name: value.bfloat16() for name, value in model.module.state_dict().items()}, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match="bfloat16"):
        verify(tmp_path / "m.safetensors", model)


def test_a_failed_verification_leaves_no_file(kind, make_model, monkeypatch):
    path, _, _ = kind
    model = make_model()
    tensors = model.tensors()
    weight = tensors["8.weight"]
    answers = iter([{**tensors, "8.weight": type(weight)(weight.mask, weight.values * np.float32(1.01))}])
    monkeypatch.setattr(model, "tensors", lambda: next(answers, tensors))
    with pytest.raises(CheckFailed, match="'8.weight'"):
        export(model, path)
    assert not list(path.parent.iterdir())


def test_unknown_options_and_a_missing_input_shape_are_refused(kind, make_model):
    path, _, _ = kind
    with pytest.raises(UsageError, match="dense"):
        export(make_model(), path, encoding="denze")
    with pytest.raises(UsageError, match="input shape"):
        export(make_model(input_shape=()), path)
    assert not list(path.parent.iterdir())
