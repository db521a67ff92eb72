"""The chain of docs/zoo.md, for a sample that has every kind of layer, and the table that it makes."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torchvision.models import densenet, efficientnet, maxvit, swin_transformer, vision_transformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.video import resnet as video

from converters.conversion import convert

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CLASSES = {"num_classes": 10}

# Torchvision's own classes with few layers: the operators of the large ones, in a second or two each.
FAMILIES = {
    "convnext": partial(ConvNeXt, [CNBlockConfig(24, 48, 1), CNBlockConfig(48, None, 1)], **CLASSES),
    "densenet": partial(densenet.DenseNet, 8, (2, 2), 16, **CLASSES),
    "efficientnet": partial(
        efficientnet.EfficientNet,
        [
            efficientnet.FusedMBConvConfig(2, 3, 2, 24, 32, 1),
            efficientnet.MBConvConfig(4, 5, 2, 32, 48, 2, 1.0, 1.0),
        ],
        0.2,
        last_channel=96,
        **CLASSES,
    ),
    "maxvit": partial(maxvit.MaxVit, (64, 64), 16, 4, [16, 32], [1, 1], 16, 0.1, **CLASSES),
    "swin": partial(swin_transformer.SwinTransformer, [4, 4], 24, [2, 2], [2, 4], [4, 4], **CLASSES),
    "swin_v2": partial(
        swin_transformer.SwinTransformer, [4, 4], 24, [2, 2], [2, 4], [4, 4], **CLASSES,
        block=swin_transformer.SwinTransformerBlockV2, downsample_layer=swin_transformer.PatchMergingV2,
    ),
    "vit": partial(vision_transformer.VisionTransformer, 64, 16, 2, 4, 48, 96, **CLASSES),
    "video": partial(
        video.VideoResNet, video.BasicBlock, [video.Conv3DSimple] * 4, [1, 1, 1, 1], video.BasicStem, **CLASSES
    ),
}  # fmt: skip
NAMES = ["lraspp_mobilenet_v3_large", "mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1"]


@pytest.fixture(scope="module")
def scripts():
    """The three scripts as modules, by name."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in ("zoo", "zoo_row", "zoo_table")}
    finally:
        sys.path.remove(str(BENCHMARKS))


def check(row: dict, scripts) -> None:
    assert scripts["zoo_table"].passed(row), row
    assert row["notes"] == []
    assert row["archive_bytes"] < 1.1 * row["bound_bytes"] + 20_000
    assert row["onnx_bytes"] < row["dense_bytes"]
    assert row["spread"] > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_small_models_go_the_whole_way(name, scripts):
    row = scripts["zoo_row"].measure(name, (3, 64, 64))
    check(row, scripts)
    assert row["active"] == round(row["prunable"] / 10)
    assert row["peak_bytes"] > 1e8


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_the_whole_way(family, scripts):
    torch.manual_seed(0)
    shape = (3, 4, 32, 32) if family == "video" else (3, 64, 64)
    model = convert(FAMILIES[family](), sparsity=0.9, input_shape=shape)
    check(scripts["zoo_row"].chain(model, FAMILIES[family]()), scripts)


def test_lively_models_keep_their_masks(scripts):
    model = convert(FAMILIES["vit"](), sparsity=0.9, input_shape=(3, 64, 64))
    assert not model.module.heads.head.weight.any()
    scripts["zoo_row"].enliven(model)
    assert model.module.heads.head.weight.any()
    model.check()


def row(name: str, **changes) -> dict:
    relative = dict.fromkeys(("archive in the sparse runtime", "archive in onnxruntime", "onnx in onnxruntime"), 1e-6)
    sizes = dict.fromkeys(("parameters", "prunable", "dense_bytes", "bound_bytes", "archive_bytes", "onnx_bytes"), 10)
    rest = {"bit_for_bit": True, "spread": 0.5, "model_sparsity": 0.9, "peak_bytes": 1, "seconds": 60.0}
    machine = {"machine": "one machine", "input_shape": [3, 64, 64], "notes": []}
    return {"model": name, **sizes, "relative": relative, **rest, **machine, **changes}


def test_table_has_a_line_for_every_model(scripts):
    zoo, table = scripts["zoo"], scripts["zoo_table"].table
    order = zoo.names(["*"])
    assert len(order) == len(set(order)) >= 80 + len(zoo.BEYOND)
    rows = {name: row(name) for name in order}
    rows[order[3]] = {"model": order[3], "error": "killed, as when memory runs out"}
    del rows[order[4]]
    text = table(rows, order, zoo.BEYOND)
    assert len(re.findall(r"^\| \w+ \| 3 x 64 x 64 \|", text, re.M)) == len(order) - 2
    assert f"- {order[3]}: killed" in text and f"- {order[4]}: not measured" in text
    assert "one machine" in text
    rows[order[0]] = row(order[0], bit_for_bit=False)
    assert text != table(rows, order, zoo.BEYOND)


def test_a_run_that_was_interrupted_keeps_its_whole_lines(scripts, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row("resnet18")) + "\n" + json.dumps(row("vgg11"))[:40])
    assert list(scripts["zoo"].read_rows(rows)) == ["resnet18"]


@pytest.mark.slow
def test_all_of_them(tmp_path):
    """Half an hour on two cores, and up to 16 GB for the largest."""
    command = [sys.executable, BENCHMARKS / "zoo.py", "--rows", tmp_path / "rows.jsonl", "--table", tmp_path / "zoo.md"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
