"""Torchvision's detectors: converted, saved, loaded, exported and trained; the peer is what torchvision builds."""

import re

import pytest
import torch
from torch.optim import SGD
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.ops import FrozenBatchNorm2d

import dsr_tool
from converters.conversion import convert
from converters.loading import load
from converters.torchvision_builders import architectures, build, structure
from converters.torchvision_detectors import FrozenNorm, class_head
from dsr_tool.errors import UsageError
from dsr_tool.train.failures import require_classifier
from exporters.export import export

NAMES = architectures("detection")
SMALL, FASTER = "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"
OLD_NAMES = (
    (r"(rpn\.head\.conv)\.0\.0\.", r"\1."),
    (r"(head\.\w+_head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}."),
    (r"(roi_heads\.mask_head)\.(\d)\.0\.", lambda m: f"{m[1]}.mask_fcn{int(m[2]) + 1}."),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_detector_is_converted_saved_and_loaded(tmp_path, name):
    _check_conversion(tmp_path, name)


@pytest.mark.parametrize("name", [SMALL, FASTER])
def test_small_detectors_are_converted_saved_and_loaded(tmp_path, name):
    _check_conversion(tmp_path, name)


def _check_conversion(folder, name):
    model = convert(name, sparsity="0.8", num_classes=5)
    assert model.active_weights == round(model.prunable_weights / 5)
    assert model.config.num_classes == 5
    assert all(spec.macs_per_weight > 0 for spec in model.specs.values() if spec.weight)
    model.save(folder / "m")
    again = load(folder / "m")
    pictures = [torch.rand(3, 90, 120)]
    for module in (model.module, again.module):
        module.eval()
        module.transform.min_size = (320,)  # the whole size of 800 pixels takes seconds
    with torch.no_grad():
        (one,), (other,) = model.module(pictures), again.module(pictures)
    assert one.keys() >= {"boxes", "labels", "scores"}
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", NAMES)
def test_the_layer_of_the_classes_is_found(name):
    with torch.device("meta"):
        default, module = build(name), build(name, 7)
    path, classes, each = class_head(module)
    assert classes == 7
    assert module.get_submodule(path).weight.shape[0] == 7 * each
    assert class_head(default)[1] == (2 if name.startswith("keypoint") else 91)


def published(name):
    """A state as torchvision publishes it: old names of layers, no counters of frozen norms, random statistics."""
    module, state = build(name), {}
    for own, value in module.state_dict().items():
        key = own
        for new, old in OLD_NAMES:
            if not name.endswith("_v2") and not ("fcos" in name and "conv" in key):
                key = re.sub(new, old, key)
        state[key] = torch.rand_like(value) + 1e-5 if key.endswith("running_var") else value
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    "name",
    [
        SMALL,
        FASTER,
        *(pytest.param(f"{kind}_resnet50_fpn", marks=pytest.mark.slow) for kind in ("maskrcnn", "retinanet", "fcos")),
    ],
)
def test_published_weights_give_torchvisions_own_detector(monkeypatch, tmp_path, name):
    torch.manual_seed(1)
    state = published(name)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_a, **_k: dict(state))
    expected = models.get_model(name, weights="COCO_V1").eval()
    model = convert(name, sparsity=0, weights="COCO_V1")
    model.save(tmp_path / "m")
    pictures = torch.rand(2, 3, 320, 320)
    features = [
        list(module.eval().backbone(pictures).values())
        for module in (expected, model.module, load(tmp_path / "m").module)
    ]
    assert len(model.config.labels) == 91
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*features[:2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*features[1:], strict=True))
    frozen = [m for m in expected.modules() if isinstance(m, FrozenBatchNorm2d)]
    ours = [m for m in model.module.modules() if isinstance(m, FrozenNorm)]
    assert [m.eps for m in ours] == [m.eps for m in frozen]
    assert not any(p.requires_grad for m in ours for p in m.parameters())


def test_a_frozen_norm_is_the_same_in_training():
    norm, peer = FrozenNorm(4), FrozenBatchNorm2d(4)
    state = {name: torch.rand(4) + 0.1 for name in peer.state_dict()}
    norm.load_state_dict({**state, "num_batches_tracked": torch.tensor(0)})
    peer.load_state_dict(state)
    pictures = torch.rand(2, 4, 3, 3)
    assert torch.allclose(norm.train()(pictures), peer(pictures), atol=1e-6)
    assert all(torch.equal(norm.state_dict()[name], value) for name, value in state.items())


def test_a_file_with_other_classes_and_a_new_head(tmp_path):
    torch.manual_seed(2)
    torch.save(build(SMALL, 4).state_dict(), tmp_path / "w.pth")
    own = convert(SMALL, sparsity=0, weights=str(tmp_path / "w.pth"))
    assert own.config.num_classes == 4
    new = convert(SMALL, sparsity=0, weights=str(tmp_path / "w.pth"), num_classes=9)
    differing = {
        name for name, value in own.module.state_dict().items() if new.module.state_dict()[name].shape != value.shape
    }
    assert differing == {
        f"head.classification_head.module_list.{i}.1.{kind}" for i in range(6) for kind in ("weight", "bias")
    }
    assert set(new.config.conversion["fresh"]) == differing


def test_the_input_size_is_that_to_which_pictures_are_scaled(tmp_path):
    default = convert(SMALL, sparsity=0.5)
    assert default.config.input_shape == (3, 320, 320)
    assert default.config.preprocessing.mean == (0, 0, 0)
    small = convert(SMALL, sparsity=0.5, input_shape=(3, 160, 192))
    small.save(tmp_path / "m")
    again = load(tmp_path / "m").module
    for module in (small.module, again):
        assert module.transform([torch.rand(3, 50, 70)])[0].tensors.shape == (1, 3, 160, 192)
    other = structure("fasterrcnn_mobilenet_v3_large_fpn", 3)
    assert other.transform.min_size == (800,)
    sized = convert("fasterrcnn_mobilenet_v3_large_fpn", sparsity=0.5, input_size=96).module
    assert sized.transform([torch.rand(3, 60, 70)])[0].image_sizes == [(96, 112)]


@pytest.mark.parametrize("to", ["csr", "safetensors", "state-dict"])
def test_files_of_weights_are_exported_and_verified(tmp_path, to):
    model = convert(SMALL, sparsity=0.8, num_classes=3, input_size=96)
    verification = export(model, tmp_path / "file", to=to)
    assert verification.passed
    assert verification.scale > 0
    half = export(model, tmp_path / "half", to=to, values="fp16")
    assert half.passed


def test_what_needs_classes_of_pictures_is_refused_in_one_sentence():
    model = convert(SMALL, sparsity=0.8, num_classes=3, input_size=96)
    with pytest.raises(UsageError, match="is a detector.*dsr_tool.attach"):
        require_classifier(model.module)


@pytest.mark.parametrize("method", ["dsr", "static"])
def test_a_detector_is_trained_in_a_loop_of_ones_own(method):
    torch.manual_seed(0)
    model = convert(SMALL, sparsity=0.8, num_classes=3, input_size=96)
    optimizer = SGD(model.module.parameters(), lr=0.01, momentum=0.9)
    options = {"every": 1, "threshold": 0.02} if method == "dsr" else {}
    attached = dsr_tool.attach(model, optimizer, method, total_steps=4, **options)
    before, budget = {key: mask.clone() for key, mask in model.masks.items()}, model.active_weights
    model.module.train()
    for _ in range(4):
        corners = torch.rand(2, 2, 2) * 40
        targets = [{"boxes": torch.cat([c, c + 20], dim=1), "labels": torch.randint(1, 3, (2,))} for c in corners]
        losses = model.module(list(torch.rand(2, 3, 96, 96)), targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        assert model.active_weights == budget
        model.check()
    moved = any(not torch.equal(before[key], mask) for key, mask in model.masks.items())
    assert moved == (method == "dsr")
    attached.remove()
