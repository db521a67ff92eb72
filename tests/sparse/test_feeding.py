"""The tensor form of detectors: the same predictions as the detector itself, for regions that do not depend on it."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import MultiScaleRoIAlign

from dsr_tool.sparse.detectors import detector_kind
from dsr_tool.sparse.discover import discover
from dsr_tool.sparse.feeding import float_tensors, tensor_form
from dsr_tool.sparse.macs import output_shape, with_macs

SIDE = 256
CLASSES = 5


class Pyramid(nn.Module):
    """Feature maps at strides 8 and 16, with 8 channels each."""

    out_channels = 8

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 8, stride=8)
        self.second = nn.Conv2d(8, 8, 2, stride=2)

    def forward(self, x):
        fine = self.first(x).relu()
        return OrderedDict([("0", fine), ("1", self.second(fine).relu())])


class Flat(nn.Sequential):
    """One feature map, as a tensor."""

    out_channels = 8

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 16, stride=16), nn.ReLU())


def anchors(levels):
    return AnchorGenerator(((32,),) * levels, ((1.0,),) * levels)


def two_stages(kind=FasterRCNN, **options):
    # At strides 8 and 16, regions of 14 cells are 112 and 224 pixels: the canonical sizes of levels 3 and 4.
    options = {"min_size": SIDE, "max_size": SIDE, "rpn_anchor_generator": anchors(2), **options}
    pool = MultiScaleRoIAlign(["0", "1"], 7, 2)
    return kind(Pyramid(), CLASSES, box_roi_pool=pool, **options)


def one_stage():
    return RetinaNet(Flat(), CLASSES, min_size=SIDE, max_size=SIDE, anchor_generator=anchors(1))


def ssd():
    boxes = DefaultBoxGenerator([[2], [2]])
    head = SSDHead([8, 8], boxes.num_anchors_per_location(), CLASSES)
    return SSD(Pyramid(), boxes, (SIDE, SIDE), CLASSES, head=head)


def masks():
    return two_stages(MaskRCNN, mask_roi_pool=MultiScaleRoIAlign(["0", "1"], 14, 2), box_detections_per_img=7)


MAKERS = {"faster": two_stages, "mask": masks, "retina": one_stage, "ssd": ssd}


def made(maker):
    torch.manual_seed(0)
    return maker().eval()


def outputs_at(module, path, run):
    found = []
    handle = module.get_submodule(path).register_forward_hook(lambda _m, _i, out: found.extend(float_tensors(out)))
    with torch.no_grad():
        run()
    handle.remove()
    return found


@pytest.mark.parametrize(("maker", "path"), [(two_stages, "rpn.head"), (one_stage, "head"), (ssd, "head")])
def test_heads_predict_what_the_detector_predicts_inside(maker, path):
    detector, pictures = made(maker), torch.rand(2, 3, SIDE, SIDE)
    expected = outputs_at(detector, path, lambda: detector(list(pictures)))
    with torch.no_grad():
        found = float_tensors(tensor_form(detector)(pictures))
    assert len(expected) >= 2
    assert all(
        torch.allclose(one, other, atol=1e-6) for one, other in zip(expected, found[: len(expected)], strict=True)
    )


def test_regions_are_pooled_as_the_detector_pools_boxes():
    detector, pictures = made(two_stages), torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        raw = tensor_form(detector, 8)(pictures)
        scores, boxes = raw["class_logits"], raw["box_regression"]
        features = detector.backbone(detector.transform(list(pictures))[0].tensors)
        corners = [0.0, SIDE - 112.0], [0.0, SIDE - 224.0]
        regions = torch.tensor(
            [[x, y, x + side, y + side] for c, side in zip(corners, (112, 224), strict=True) for y in c for x in c]
        )
        pooled = detector.roi_heads.box_roi_pool(features, [regions, regions], [(SIDE, SIDE)] * 2)
        expected = detector.roi_heads.box_predictor(detector.roi_heads.box_head(pooled))
    # Ours are sorted by level, then picture; the detector's by picture, then box.
    order = torch.cat([torch.arange(4) + start for start in (0, 8, 4, 12)])
    assert torch.allclose(scores, expected[0][order], atol=1e-5)
    assert torch.allclose(boxes, expected[1][order], atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_parameters_keep_their_names_and_a_trace_computes_the_same(name):
    detector = made(MAKERS[name])
    form, pictures = tensor_form(detector), torch.rand(2, 3, SIDE, SIDE)
    assert list(form.state_dict()) == list(detector.state_dict())
    assert all(a is b for a, b in zip(form.parameters(), detector.parameters(), strict=True))
    traced = torch.fx.symbolic_trace(form)
    with torch.no_grad():
        found, expected = float_tensors(traced(pictures)), float_tensors(form(pictures))
    assert len(found) == len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # Regions depend on the size alone, so another picture gives outputs of the same shapes.
    with torch.no_grad():
        again = float_tensors(form(torch.rand(2, 3, SIDE, SIDE)))
    assert [one.shape for one in again] == [one.shape for one in expected]


@pytest.mark.parametrize("name", MAKERS)
def test_multiply_adds_of_every_weight_are_known(name):
    detector = made(MAKERS[name])
    specs = with_macs(detector, discover(detector), (3, SIDE, SIDE))
    assert all(spec.macs_per_weight > 0 for spec in specs.values() if spec.weight)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tensor_form(detector, regions=None)(torch.rand(1, 3, SIDE, SIDE))
    assert sum(spec.macs_per_weight * spec.size for spec in specs.values()) == counter.get_total_flops() / 2
    cells = (SIDE // (16 if name == "retina" else 8)) ** 2
    first = next(spec for spec in specs.values() if spec.weight)
    assert first.macs_per_weight == cells
    if name in ("faster", "mask"):
        assert specs["roi_heads.box_predictor.cls_score.weight"].macs_per_weight == 1000
        assert not detector.training
    if name == "mask":
        assert specs["roi_heads.mask_head.0.0.weight"].macs_per_weight == 7 * 14 * 14
    assert output_shape(detector, (3, SIDE, SIDE)) == ()


def test_other_networks_are_their_own_form():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert tensor_form(net) is net
    assert detector_kind(net) is None
    assert {name: detector_kind(make()) for name, make in MAKERS.items()} == {
        "faster": "GeneralizedRCNN",
        "mask": "GeneralizedRCNN",
        "retina": "RetinaNet",
        "ssd": "SSD",
    }


def test_outputs_are_flattened_in_order_without_auxiliary_heads():
    a, b, c = (torch.full((1,), float(n)) for n in range(3))
    assert float_tensors(a) == [a]
    assert float_tensors([a, {"x": (b, torch.tensor([1])), "y": "text"}, None, c]) == [a, b, c]
    assert float_tensors({"out": b, "aux": c}) == [b]
