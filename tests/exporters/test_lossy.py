"""Exports that lose something: rounding by pictures, and how often a file answers as its model."""

import json

import numpy as np
import pytest
import torch

from dsr_tool.errors import CheckFailed, FileError, UsageError
from dsr_tool.formats.archive import open_archive
from dsr_tool.report.verification import verification_document, verification_text
from dsr_tool.sparse.sparsify import sparsify
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.grid import GridTensor
from exporters.calibrated import rounded_by_pictures
from exporters.checked import CheckedModel
from exporters.export import export, verify
from exporters.values import stored_as
from exporters.verify import agreement
from exporters.verify.rounding import rounded_model

pytestmark = pytest.mark.usefixtures("trace_once")
SHAPE = (3, 16, 16)


def inputs_of(count, seed):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["m.dsr", "m.onnx", "m.safetensors"])
def test_rounding_by_pictures_is_what_the_file_holds(make_model, tmp_path, name):
    model, pictures = make_model(0.5), inputs_of(64, 1)
    steps = []
    progress = lambda done, total: steps.append((done, total))  # noqa: E731
    path = tmp_path / name
    found = export(model, path, values="int4", calibrate=pictures, on_progress=progress)
    assert found.passed and found.weights_equal and found.masks_equal
    assert steps[-1] == (5, 5)
    assert any("5 weights were rounded to keep the outputs on 64 pictures" in note for note in found.notes)
    plain = export(model, tmp_path / f"plain-{name}", values="int4")
    assert 0 < found.rounding_mean < 0.8 * plain.rounding_mean and found.rounding_mean <= found.rounding_largest
    assert verify(path, model).passed
    export(model, tmp_path / f"again-{name}", values="int4", calibrate=pictures)
    assert (tmp_path / f"again-{name}").read_bytes() == path.read_bytes()
    if name == "m.dsr":
        expected, _ = rounded_by_pictures(CheckedModel(model, "int4"), pictures, None, None)
        archive = open_archive(path)
        for weight, tensor in expected.items():
            held = archive.tensor(weight)
            assert isinstance(held, GridTensor) and np.array_equal(held.codes, tensor.codes)
            assert np.array_equal(held.scales, tensor.scales) and held.mask.equals(model.tensors()[weight].mask)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"values": "fp32", "calibrate": "x"},
            "--values 'fp32' does not do that; leave it out, or give --values int8,",
        ),
        ({"values": "fp16", "calibrate": "x"}, "--values 'fp16' does not do that"),
        (
            {"values": "int8", "calibrate": "x", "compact": True},
            "--compact removes channels before weights are rounded",
        ),
        ({"values": "int8", "calibrate": ""}, "--calibrate is empty"),
        ({"values": "int8", "calibration_images": 8}, "--calibration-images goes with --calibrate"),
        ({"values": "int8", "calibrate": inputs_of(4, 0), "calibration_images": 0}, "--calibration-images 0 is not 1"),
        ({"values": "int8", "calibrate": torch.zeros(4, 3, 8, 8)}, "the model expects preprocessed"),
        ({"min_agreement": 0.9}, "--min-agreement compares answers on pictures; give --images too"),
        ({"images": inputs_of(4, 0), "min_agreement": 0.0}, "--min-agreement 0.0 is not in .0, 1."),
        ({"images": inputs_of(4, 0), "min_agreement": 98}, "--min-agreement 98 is not in .0, 1."),
        ({"images": inputs_of(4, 0), "min_agreement": float("nan")}, "--min-agreement nan is not in"),
        ({"images": ""}, "--images is empty"),
        ({"images": torch.zeros(4, 3, 8, 8)}, r"images holds \(4, 3, 8, 8\), and the model expects"),
        ({"images": [1]}, "images holds int, and the model expects"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(make_model, tmp_path, options, says):
    with pytest.raises(UsageError, match=says) as caught:
        export(make_model(), tmp_path / "m.dsr", **options)
    assert str(caught.value).count(". ") == 0 and not list(tmp_path.iterdir())


def test_folders_without_usable_pictures_are_refused(make_model, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"no picture")
    for option in ("calibrate", "images"):
        for folder, says in (("absent", "does not exist"), ("damaged", "a.png")):
            with pytest.raises(FileError, match=says):
                export(make_model(), tmp_path / "m.dsr", values="int8", **{option: tmp_path / folder})
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("name", ["m.dsr", "m.onnx", "m.safetensors"])
def test_agreement_is_counted_on_the_pictures(make_model, tmp_path, name):
    model, images = make_model(0.5), inputs_of(200, 2)
    with torch.no_grad():
        # Without its mean, the output depends on the picture, so that rounding changes some answers.
        model.module[10].bias -= model.module.eval()(images).mean(0)
    found = export(model, tmp_path / name, values="int4", images=images)
    rounded = rounded_model(model, stored_as(model.tensors(), model.specs, "int4")).module.eval()
    with torch.no_grad():
        equal = rounded(images).argmax(1) == model.module.eval()(images).argmax(1)
    assert found.pictures == 200 and found.agreement == pytest.approx(float(equal.float().mean()))
    # A test that no rounding fails would show nothing.
    assert found.agreement < 1
    document = json.loads(json.dumps(verification_document("export", found)))
    assert document["agreement"] == found.agreement and document["pictures"] == 200
    assert document["rounding_largest"] > document["rounding_mean"] > 0
    assert f"top-1 answers equal to those of the model: {found.agreement:.2%} of 200" in verification_text(found)
    # Batches of a loader are the same pictures.
    least = found.agreement
    again = export(model, tmp_path / f"2{name}", values="int4", images=images.split(37), min_agreement=least)
    assert again.agreement == found.agreement
    says = rf"answers {round(200 * least)} of 200 pictures as the model does, which is less than --min-agreement"
    with pytest.raises(CheckFailed, match=says):
        export(model, tmp_path / f"3{name}", values="int4", images=images, min_agreement=least + 0.004)
    assert {path.name for path in tmp_path.iterdir()} == {name, f"2{name}"}


def test_a_share_that_is_exactly_the_floor_is_enough(make_model, tmp_path, monkeypatch):
    # 0.55 * 100 is above 55 in floats.
    model, images = make_model(0.5), inputs_of(100, 2)
    module = model.module.eval()
    with torch.no_grad():
        answers = module(images).numpy()
    answers[55:] = -answers[55:]
    rows = iter(answers)
    monkeypatch.setattr(agreement, "_run", lambda *_: lambda x: {"output": np.stack([next(rows) for _ in x])})
    assert export(model, tmp_path / "m.dsr", images=images, min_agreement=0.55).agreement == 0.55


def test_an_exact_file_answers_as_its_model(make_model, tmp_path):
    found = export(make_model(), tmp_path / "m.dsr", images=inputs_of(20, 2), min_agreement=1)
    assert (found.agreement, found.pictures) == (1, 20)
    assert found.rounding_largest is None and found.rounding_mean is None


def test_a_folder_may_hold_arrays_and_damaged_files(make_model, tmp_path):
    images = inputs_of(5, 3)
    folder = tmp_path / "images"
    folder.mkdir()
    np.save(folder / "some.npy", images[:4].numpy())
    np.save(folder / "one.npy", images[4].numpy())
    (folder / "bad.png").write_bytes(b"no picture")
    found = export(make_model(), tmp_path / "m.dsr", values="int8", images=folder)
    assert found.pictures == 5 and "1 damaged file of --images not counted, such as 'bad.png'" in found.notes


def test_networks_without_classes_are_refused(make_model, tmp_path):
    whole = make_model()
    model = sparsify(whole.module[:7], whole.config, Budget(sparsity=0))
    with pytest.raises(UsageError, match=r"returns an output of shape \(1, 48, 2, 2\) where a classifier has"):
        export(model, tmp_path / "m.dsr", images=inputs_of(4, 0))
