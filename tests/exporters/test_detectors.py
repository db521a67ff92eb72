"""Detectors up to their raw outputs: every runtime computes what PyTorch does, in every output by itself."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn, optim
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from converters.conversion import convert
from converters.loading import load
from dsr_tool import attach
from dsr_tool.formats.archive import open_archive
from dsr_tool.runtime import Session
from dsr_tool.sparse.feeding import graph_form, named_floats
from dsr_tool.sparse.trace import trace
from exporters.export import export
from exporters.onnx.session import OnnxSession

SIDE = 64
RUNTIMES = {
    "onnxruntime": lambda folder: OnnxSession(folder / "m.onnx"),
    "our runtime": lambda folder: Session(folder / "m.dsr"),
    "the reference": lambda folder: Session(folder / "m.dsr", runtime="scipy"),
}


def check_files(model, folder, names, monkeypatch, endings=("onnx", "dsr")):
    """Exports a model, and compares every output of every runtime with PyTorch."""
    graph = trace(model.module, (3, SIDE, SIDE))  # once, since it takes seconds
    monkeypatch.setattr("exporters.checked.trace", lambda *_: graph)
    done = {ending: export(model, folder / f"m.{ending}") for ending in endings}
    assert all(one.passed for one in done.values())
    module = graph_form(model.module).eval()
    x = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = named_floats(module(x))
    assert list(expected) == names
    for name, make in RUNTIMES.items():
        found = make(folder).run_all(x.numpy())
        assert list(found) == names
        for output, tensor in expected.items():
            scale = float(tensor.abs().max())
            assert scale > 0
            np.testing.assert_allclose(found[output], tensor.numpy(), rtol=0, atol=1e-4 * scale, err_msg=name)
    plain = onnxruntime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in plain.get_outputs()] == names
    return done


def test_a_network_like_yolo_is_trained_exported_and_run(tmp_path, run, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    model = convert("small_yolo:small", sparsity=0.8, input_shape=(3, SIDE, SIDE))
    roles = {name: spec.role for name, spec in model.specs.items() if spec.weight}
    assert all(role == "sparse" for name, role in roles.items() if name.startswith(("stage5", "bottom5")))
    assert all(spec.macs_per_weight > 0 for spec in model.specs.values() if spec.weight)
    # A head multiplies each weight once for each cell of its map.
    cells = {
        name: spec.macs_per_weight for name, spec in model.specs.items() if name.startswith("heads") and spec.weight
    }
    assert list(cells.values()) == [64, 16, 4]
    optimizer = optim.SGD(model.module.parameters(), 0.01, momentum=0.9)
    attached = attach(model, optimizer, "set", total_steps=2, every=1, stop=1.0)
    active = model.active_weights
    for _ in range(2):
        levels = model.module.train()(torch.rand(2, 3, SIDE, SIDE))
        assert [tuple(level.shape) for level in levels] == [(2, 27, n, n) for n in (8, 4, 2)]
        optimizer.zero_grad()
        sum(level.square().mean() for level in levels).backward()
        optimizer.step()
    assert attached.step == 2 and model.active_weights == active
    check_files(model, tmp_path, ["output_0", "output_1", "output_2"], monkeypatch)
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.zeros((3, SIDE, SIDE), np.float32))
    code, out, _ = run("predict", "m.dsr", "x.npy", "--json")
    (one,) = json.loads(out)["predictions"]
    assert code == 0
    assert [(each["name"], each["shape"]) for each in one["outputs"]][2] == ("output_2", [1, 27, 2, 2])
    assert all(each["least"] < each["largest"] for each in one["outputs"])


def backbone():
    body = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
    body.out_channels = 32
    return body


def one_stage():
    return FCOS(backbone(), 3, anchor_generator=AnchorGenerator(((8,),), ((1.0,),)))


def two_stages():
    return FasterRCNN(
        backbone(),
        3,
        rpn_anchor_generator=AnchorGenerator(((32, 64),), ((0.5, 1.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
    )


@pytest.mark.parametrize(
    ("make", "names"),
    [
        pytest.param(one_stage, ["cls_logits", "bbox_regression", "bbox_ctrness"], marks=pytest.mark.slow),
        (two_stages, ["objectness_0", "pred_bbox_deltas_0", "features_0"]),
    ],
)
def test_detectors_of_torchvision_are_files_of_their_raw_outputs(make, names, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = convert(make(), sparsity=0.5, input_shape=(3, SIDE, SIDE))
    done = check_files(model, tmp_path, names, monkeypatch)
    absent = "the file lacks 4 weights that no output depends on, such as 'roi_heads.box_head.fc6.weight'"
    assert list(done["onnx"].notes) == ([absent] if make is two_stages else [])
    # An archive has them all the same.
    assert open_archive(tmp_path / "m.dsr").entries.keys() == model.module.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("ssdlite320_mobilenet_v3_large", ["bbox_regression", "cls_logits"]),
        ("retinanet_resnet50_fpn", ["cls_logits", "bbox_regression"]),
        ("fcos_resnet50_fpn", ["cls_logits", "bbox_regression", "bbox_ctrness"]),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", None),
    ],
)
def test_every_kind_of_torchvisions_detectors_is_exported(name, names, tmp_path, monkeypatch):
    model = convert(name, sparsity=0.5, num_classes=3, input_size=SIDE)
    levels = ("0", "1", "pool")
    two = [*(f"{what}_{i}" for what in ("objectness", "pred_bbox_deltas") for i in range(3))]
    names = names or [*two, *(f"features_{level}" for level in levels)]
    check_files(model, tmp_path, names, monkeypatch, ("onnx", "dsr", "npz", "safetensors", "pth"))
    model.save(tmp_path / "folder")
    again = load(tmp_path / "folder").module.state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.module.state_dict().items())
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["num_classes"] == 3
