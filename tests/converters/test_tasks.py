"""Torchvision's models beyond classification: those that convert, and the reasons of the others."""

import pytest
import torch
from torchvision import models

from converters.conversion import convert
from converters.loading import load
from converters.torchvision_builders import TASKS, architectures, structure
from dsr_tool.errors import UsageError

OTHERS = sorted(set(models.list_models()) - set(architectures()))


def test_every_name_of_torchvision_has_a_task_or_a_reason():
    assert {name for task in TASKS for name in architectures(task)} == set(architectures())
    assert {"fcn_resnet50", "r3d_18", "resnet18", "fasterrcnn_resnet50_fpn"} <= set(architectures())
    assert {"raft_small", "quantized_resnet18"} <= set(OTHERS)


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_another_task_is_refused_with_the_reason(name):
    with pytest.raises(UsageError, match=f"{name}' is a.*module:callable"):
        convert(name, sparsity=0.5)


@pytest.mark.parametrize("name", [*architectures("segmentation"), *architectures("video")])
def test_each_has_a_structure_and_an_input(name):
    module = structure(name, 5)
    assert module.state_dict().keys() == structure(name).state_dict().keys()
    assert 5 in {value.shape[0] for value in module.state_dict().values() if value.ndim}


@pytest.mark.parametrize(
    ("name", "given", "shape", "outputs"),
    [
        ("lraspp_mobilenet_v3_large", {"input_shape": (3, 48, 64)}, (3, 48, 64), 21),
        ("mc3_18", {"input_size": 32, "num_classes": 6}, (3, 16, 32, 32), 6),
    ],
)
def test_other_tasks_are_converted_and_loaded(tmp_path, name, given, shape, outputs):
    model = convert(name, sparsity=0.9, **given)
    assert model.config.input_shape == shape
    assert model.config.num_classes == outputs
    assert model.active_weights == round(model.prunable_weights / 10)
    weights = [spec for spec in model.specs.values() if spec.weight]
    assert all(spec.macs_per_weight > 0 for spec in weights)
    model.save(tmp_path / "m")
    again = load(tmp_path / "m").module.state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.module.state_dict().items())


def test_trained_segmentation_models_lose_their_auxiliary_head(tmp_path):
    state = models.get_model(
        "deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None, aux_loss=True
    ).state_dict()
    assert any(key.startswith("aux_classifier.") for key in state)
    torch.save(state, tmp_path / "w.pth")
    model = convert("deeplabv3_mobilenet_v3_large", weights=str(tmp_path / "w.pth"), sparsity=0, input_size=32)
    assert not any(key.startswith("aux_classifier.") for key in model.module.state_dict())


def test_an_input_that_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="input shape \\[3, 32, 32\\] does not fit"):
        convert("mc3_18", sparsity=0.9, input_shape=(3, 32, 32))
    with pytest.raises(UsageError, match="exclude each other"):
        convert("resnet18", sparsity=0.9, input_size=32, input_shape=(3, 32, 32))
