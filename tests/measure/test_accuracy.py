"""Accuracy and agreement are those of a plain loop in torch for every kind of file; wrong arguments are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from converters.conversion import convert
from converters.loading import load
from dsr_tool.errors import UsageError
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.measure.accuracy.document import accuracy_document
from dsr_tool.measure.accuracy.networks import _runner, open_network
from dsr_tool.measure.accuracy.request import AccuracyRequest
from dsr_tool.measure.accuracy.scores import Scores, wilson
from dsr_tool.measure.accuracy.text import accuracy_text
from dsr_tool.report.page.accuracy_view import accuracy_headline, accuracy_section
from dsr_tool.runtime import load_inputs
from exporters.export import export
from exporters.onnx.write import to_onnx

CLASSES, PICTURES = 7, 40


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns a folder with a sparse and a dense model of one architecture, and every kind of file of them."""
    root = tmp_path_factory.mktemp("models")
    for name, sparsity in (("sparse", 0.9), ("dense", 0.0)):
        # Scores of a fresh network are nearly equal for all pictures; another head spreads its answers.
        model = convert("squeezenet1_1", sparsity=sparsity, num_classes=CLASSES, input_size=48, seed=1)
        with torch.no_grad():
            model.module.classifier[1].bias.copy_(torch.linspace(-0.01, 0.01, CLASSES))
        model.save(root / name)
    export(load(root / "sparse"), root / "sparse.dsr")
    export(load(root / "sparse"), root / "sparse.onnx")
    export(load(root / "sparse"), root / "sparse.npz")
    state = load(root / "dense").module.state_dict()
    torch.save({"model": state, "epoch": 3}, root / "dense.pth")
    save_file(state, root / "dense.safetensors")
    return root


@pytest.fixture(scope="module")
def photos(models):
    """Returns a folder of drawn pictures in class folders, of which a third has the class that `sparse` answers."""
    root = models / "photos"
    module, config = load(models / "sparse").module.eval(), load(models / "sparse").config
    random = np.random.default_rng(0)
    for index in range(PICTURES):
        pixels = np.kron(random.integers(0, 256, (4, 5, 3)), np.ones((12, 12, 1))).astype(np.uint8)
        path = root / f"{index:02}.png"
        root.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
        answer = int(module(torch.from_numpy(load_inputs([path], config))).argmax())
        own = root / str(answer if index % 3 == 0 else index % CLASSES)
        own.mkdir(exist_ok=True)
        path.rename(own / path.name)
    return root


@pytest.fixture(scope="module")
def expected(models, photos):
    """Returns the figures of a plain loop."""
    sparse, dense = (load(models / name).module.eval() for name in ("sparse", "dense"))
    config = load(models / "sparse").config
    files = sorted(photos.rglob("*.png"))
    inputs = torch.from_numpy(np.concatenate([load_inputs([path], config) for path in files]))
    classes = torch.tensor([int(path.parent.name) for path in files])
    with torch.no_grad():
        this, other = sparse(inputs), dense(inputs)
    return {
        "top1": (this.argmax(1) == classes).float().mean().item(),
        "top5": (this.topk(5, 1).indices == classes[:, None]).any(1).float().mean().item(),
        "other_top1": (other.argmax(1) == classes).float().mean().item(),
        "agreement": (this.argmax(1) == other.argmax(1)).float().mean().item(),
        "kl": torch.nn.functional.kl_div(
            this.double().log_softmax(1), other.double().log_softmax(1), log_target=True, reduction="batchmean"
        ).item(),
    }


def measured(path: Path, data: Path, against: Path | None = None):
    return accuracy_document(path, AccuracyRequest(data, against))


@pytest.mark.parametrize("file", ["sparse", "sparse.dsr", "sparse.onnx", "sparse.npz"])
@pytest.mark.parametrize("against", ["dense", "dense.pth", "dense.safetensors"])
def test_figures_are_those_of_a_plain_loop(models, photos, expected, file, against):
    if file == "sparse.onnx" and against != "dense":
        pytest.skip("an ONNX file names no architecture for plain weights")
    found = measured(models / file, photos, models / against)
    assert found["pictures"] == PICTURES and found["labels"] == "class folders by number"
    assert 1 / 3 <= expected["top1"] < 1, "the pictures should be a test"
    assert found["this"]["top1_fraction"] == pytest.approx(expected["top1"])
    assert found["this"]["top5_fraction"] == pytest.approx(expected["top5"])
    assert found["against"]["top1_fraction"] == pytest.approx(expected["other_top1"])
    assert found["agreement_fraction"] == pytest.approx(expected["agreement"])
    assert found["kl_divergence_nats"] == pytest.approx(expected["kl"], rel=1e-3)


def test_a_network_agrees_with_itself_and_batches_do_not_matter(models, photos, monkeypatch):
    ticks = []
    request = AccuracyRequest(photos, models / "dense.pth")
    whole = accuracy_document(models / "dense", request, lambda done, files: ticks.append((done, files)))
    assert whole["agreement_fraction"] == 1 and whole["kl_divergence_nats"] == pytest.approx(0, abs=1e-9)
    assert ticks == [(16, PICTURES), (32, PICTURES), (PICTURES, PICTURES)]
    monkeypatch.setattr("dsr_tool.measure.accuracy.document._BATCH", 7)
    assert accuracy_document(models / "dense", request)["this"] == whole["this"]


def test_pictures_without_classes_give_agreement_alone(models, photos, tmp_path, expected):
    for path in photos.rglob("*.png"):
        (tmp_path / path.name).symlink_to(path)
    found = measured(models / "sparse", tmp_path, models / "dense")
    assert found["agreement_fraction"] == pytest.approx(expected["agreement"])
    assert found["this"]["top1_fraction"] is None and found["labels"] == "none"
    text = accuracy_text(found)
    assert "agreement" in text and "top-1 " not in text
    assert accuracy_headline({"accuracy": found})[0].name == "Agreement"
    with pytest.raises(UsageError, match="--against"):
        measured(models / "sparse", tmp_path)


def test_damaged_pictures_are_not_counted_and_said(models, photos, tmp_path):
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "good.png").symlink_to(next(photos.rglob("*.png")))
    (tmp_path / "2" / "bad.png").write_bytes(b"\x89PNG cut off")
    found = measured(models / "sparse", tmp_path)
    assert found["pictures"] == 1 and "files that cannot be used and were not counted: 1 ('bad.png')" in found["notes"]


def test_an_onnx_file_needs_a_model_that_says_how_pictures_become_inputs(models, photos):
    with pytest.raises(UsageError, match="as --against, or preprocessed .npy"):
        measured(models / "sparse.onnx", photos)
    found = measured(models / "sparse.onnx", photos, models / "sparse.dsr")
    assert found["agreement_fraction"] == 1


def test_another_architecture_or_number_of_classes_is_refused(models, photos, tmp_path):
    convert("shufflenet_v2_x0_5", sparsity=0.5, num_classes=CLASSES, input_size=48).save(tmp_path / "other")
    convert("squeezenet1_1", sparsity=0.5, num_classes=5, input_size=48).save(tmp_path / "five")
    torch.save(load(tmp_path / "other").module.state_dict(), tmp_path / "other.pth")
    for name, message in (
        ("other", "is shufflenet_v2_x0_5 with 7 classes"),
        ("five", "squeezenet1_1 with 5 classes"),
        ("other.pth", "--against '.*other.pth' "),
    ):
        with pytest.raises(UsageError, match=message) as error:
            measured(models / "sparse", photos, tmp_path / name)
        assert "--weights" not in str(error.value)


def test_a_segmentation_network_is_refused(photos, tmp_path):
    convert("lraspp_mobilenet_v3_large", sparsity=0.5, num_classes=CLASSES, input_size=48).save(tmp_path / "net")
    with pytest.raises(UsageError, match="needs a classifier"):
        measured(tmp_path / "net", photos)


def test_networks_of_several_outputs_are_refused(tmp_path):
    class Two(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)), x

    refused = "two.* returns 2 outputs of real numbers; --accuracy needs a classifier"
    with pytest.raises(UsageError, match=refused):
        _runner(Two(), tmp_path / "two")(np.zeros((1, 3, 4, 4), np.float32))
    x, pooled, same = (Value(name, (None, 3, n, n)) for name, n in (("x", 4), ("pooled", 1), ("same", 4)))
    nodes = (Node("GlobalAveragePool", ("x",), ("pooled",)), Node("Identity", ("x",), ("same",)))
    graph = Graph((x,), (pooled, same), nodes, {}, (), 20)
    (tmp_path / "two.onnx").write_bytes(to_onnx(graph, {}).SerializeToString())
    with pytest.raises(UsageError, match=refused):
        open_network(tmp_path / "two.onnx", "FILE")


def test_the_command_prints_text_json_and_a_page(run, models, photos, tmp_path):
    arguments = ("report", models / "sparse", "--accuracy", photos, "--against", models / "dense")
    code, out, err = run(*arguments, "--html", tmp_path / "page.html")
    assert code == 0 and not err, err
    assert f"n = {PICTURES}" in out and "95 % interval" in out and "top-5" in out
    page = (tmp_path / "page.html").read_text()
    assert 'id="accuracy"' in page and "95 % interval" in page
    document = json.loads(run(*arguments, "--json")[1])
    accuracy = document["accuracy"]
    assert document["schema"] == "dsr-tool/report/1" and accuracy["against"]["path"] == str(models / "dense")
    assert run("report", models / "sparse", "--against", models / "dense")[0] == 2
    assert run("report", models / "sparse", "--accuracy", tmp_path / "absent")[0] == 1


def test_the_page_shows_every_fraction_with_its_interval(models, photos):
    found = measured(models / "sparse", photos, models / "dense")
    section = accuracy_section(found)
    rows = section.figures[0].table.rows
    assert [row[0] for row in rows] == ["Top-1, this", "Top-1, against", "Top-5, this", "Top-5, against", "Agreement"]
    assert all(row[3] == str(PICTURES) and " to " in row[2] for row in rows)
    assert section.figures[0].chart.bars[0].length == 100 * found["this"]["top1_fraction"]
    assert f"n = {PICTURES}" in accuracy_headline({"accuracy": found})[0].note and accuracy_headline({}) == []


def test_few_classes_have_no_top5_and_ties_go_to_the_first_class():
    scores = Scores()
    scores.add(np.zeros((4, 5), np.float32), None, np.array([0, 1, 0, 4]))
    assert scores.right[0] == [2, 4] and not scores.has_top5
    scores.add(np.zeros((1, 6), np.float32), None, np.array([5]))
    assert scores.right[0] == [2, 4] and scores.has_top5


def test_the_interval_is_wilsons():
    # Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662, and 0 of 20 gives 0 to 0.1611.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    for hits in range(11):
        low, high = wilson(hits, 10)
        assert 0 <= low <= hits / 10 <= high <= 1 and (low, high) == pytest.approx(
            tuple(1 - end for end in reversed(wilson(10 - hits, 10)))
        )
        # Both ends are where the test of a normal approximation just rejects.
        for end in (low, high):
            if 0 < end < 1:
                assert abs(hits / 10 - end) / math.sqrt(end * (1 - end) / 10) == pytest.approx(1.96, abs=1e-3)


def test_each_network_prepares_pictures_in_its_own_way(models, photos, tmp_path):
    dense = load(models / "dense")
    config = replace(dense.config, preprocessing=replace(dense.config.preprocessing, resize=90))
    dense.config = config
    dense.save(tmp_path / "zoomed")
    found = measured(models / "dense", photos, tmp_path / "zoomed")
    assert found["kl_divergence_nats"] > 0
