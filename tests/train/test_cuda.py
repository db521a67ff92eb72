"""Training on a GPU. What a CPU can do as well runs there too, so that these tests are themselves tested everywhere.

A run that is resumed on a GPU goes on, but not bit for bit: its kernels add up in no fixed order.
"""

import json
import math

import pytest
import torch

import dsr_tool
from converters.loading import load
from dsr_tool.methods import METHODS
from dsr_tool.train import Observer, RunFolder, evaluate, load_data, train

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
# Advice of compilers and drivers is not ours to make errors of.
pytestmark = pytest.mark.filterwarnings("default")

WAYS = [
    pytest.param({"device": "cpu"}, id="cpu"),
    pytest.param({"device": "cuda"}, id="cuda", marks=needs_gpu),
    pytest.param({"device": "cuda", "precision": "bf16", "compile": True}, id="cuda-bf16-compiled", marks=needs_gpu),
]


class Zeros(Observer):
    """Checks after every step, and at every state, that everything outside the masks is zero."""

    def __init__(self, *, states=True):
        self.active, self.states = [], states

    def on_start(self, model, _total):
        self.model = model

    def on_step(self, _step):
        weights = self.model.weights
        assert not any(weights[name].detach()[~mask].count_nonzero() for name, mask in self.model.masks.items())

    def on_state(self, model, state):
        model.check()
        self.active.append(model.active_weights)
        names = [name for name, _ in model.module.named_parameters()]
        for index, values in state["optimizer"]["state"].items():
            mask = model.masks.get(names[index])
            for value in values.values():
                if self.states and mask is not None and isinstance(value, torch.Tensor) and value.shape == mask.shape:
                    assert not value[~mask].count_nonzero()


def make(tiny, method, **changes):
    dense = METHODS[method].starts_dense
    final = {"final_sparsity": 0.7 if dense else 0.9}
    options = final if "final_sparsity" in METHODS[method].option_defaults() else {}
    settings = tiny.settings(**{"method": method, "batch_size": 50, "every": 3, "options": options, **changes})
    return tiny.model(0 if dense else 0.8), settings


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_budget_and_zeros_are_exact(tiny, method, way):
    model, settings = make(tiny, method, epochs=3, augment="crop-flip", **way)
    # Behind its masks, dst trains all weights, with momentum.
    budget, zeros = model.active_weights, Zeros(states=method != "dst")
    result = train(model, tiny.data(), settings, [zeros])
    assert zeros.active == [record.active_weights for record in result.epochs]
    if "final_sparsity" in METHODS[method].option_defaults() and method != "tied":
        assert zeros.active[-1] < budget
    else:
        assert set(zeros.active) == {budget}
    assert math.isfinite(result.last.train_loss) and next(model.module.parameters()).device.type == way["device"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["dsr", "rigl", "static"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_in_pieces_resumes(tiny, tmp_path, method, optimizer, way):
    budget = make(tiny, method)[0].active_weights
    for _ in range(3):
        model, settings = make(tiny, method, epochs=3, optimizer=optimizer, **way)
        run = RunFolder(tmp_path / "run", resume=True)
        run.facts = {"settings": settings.to_dict()}
        model = load(tmp_path / "run", tiny.module()) if run.stopped else model
        model.to(memory_format=torch.channels_last)  # as on a GPU
        with run:
            train(model, tiny.data(), settings, [run], state=run.stopped.state if run.stopped else None, deadline=0.0)
        assert load(tmp_path / "run", tiny.module()).active_weights == budget
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["step"] for line in epochs] == [4, 8, 12]
    assert all(math.isfinite(line["train_loss"]) for line in epochs)


@pytest.mark.parametrize("way", WAYS)
def test_digits_are_learnt(tiny, way):
    model = tiny.model()
    data = load_data("digits", model.config)
    result = train(model, data, tiny.settings(epochs=8, every=20, augment="none", **way))
    assert result.best.test_accuracy > 0.6
    assert result.last.train_loss < result.epochs[0].train_loss / 2


@pytest.mark.parametrize("way", [{"device": "cpu"}, pytest.param({"device": "cuda"}, marks=needs_gpu)])
def test_a_compiled_step_equals_a_plain_one(tiny, way):
    losses = []
    for compiled in (False, True):
        result = train(tiny.model(), tiny.data(), tiny.settings(method="static", compile=compiled, **way))
        losses.append([record.train_loss for record in result.epochs])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("way", [{"device": "cpu"}, pytest.param({"device": "cuda"}, marks=needs_gpu)])
def test_loaded_optimizer_state_gets_the_memory_format_of_its_parameter(tiny, way):
    states = []

    class Keep(Observer):
        def on_state(self, _model, state):
            states.append(state)

    way = {**way, "storage": "masked"}
    settings = tiny.settings(epochs=2, method="static", **way)
    train(tiny.model(), tiny.data(), tiny.settings(epochs=1, method="static", **way), [Keep()])
    flat = {name: value.contiguous() for name, value in states[0]["optimizer"]["state"][0].items()}
    states[0]["optimizer"]["state"] = {**states[0]["optimizer"]["state"], 0: flat}
    model = tiny.model()
    model.to(memory_format=torch.channels_last)
    train(model, tiny.data(), settings, [Keep()], state=states[0])
    momentum = states[1]["optimizer"]["state"][0]["momentum_buffer"]
    assert momentum.stride() == model.module.first.weight.stride()


@needs_gpu
def test_half_precision_scales_its_loss(tiny):
    half, full = (
        train(tiny.model(), tiny.data(), tiny.settings(method="rigl", every=2, device="cuda", precision=precision))
        for precision in ("fp16", "fp32")
    )
    assert half.last.active_weights == full.last.active_weights and half.last.step <= full.last.step
    assert half.last.train_loss == pytest.approx(full.last.train_loss, rel=0.1)


@needs_gpu
def test_evaluation_agrees_with_a_cpu(tiny):
    model = tiny.model()
    data = load_data("digits", model.config)
    train(model, data, tiny.settings(epochs=2, device="cuda"))
    loss, accuracy = evaluate(model, data, tiny.settings(device="cuda"))
    model.to("cpu")
    expected_loss, expected_accuracy = evaluate(model, data, tiny.settings())
    # Convolutions may be in TF32, whose products have 10 bits.
    assert loss == pytest.approx(expected_loss, rel=5e-3) and accuracy == pytest.approx(expected_accuracy, abs=0.01)


@needs_gpu
@pytest.mark.parametrize("augment", ["none", "shift", "crop-flip", "imagenet"])
@pytest.mark.parametrize("room", [True, False])
def test_a_gpu_sees_the_same_images_as_a_cpu(tiny, monkeypatch, augment, room):
    if not room:
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (0, 0))
    monkeypatch.setattr("dsr_tool.train.data._GROUP_VALUES", 2 * 30 * 3 * 64)
    here, there = (
        list(tiny.data().train_batches(tiny.settings(device=device, augment=augment, batch_size=30), 3))
        for device in ("cpu", "cuda")
    )
    assert len(here) == len(there) == 6
    for (inputs, labels), (found, found_labels) in zip(here, there, strict=True):
        assert found.is_contiguous(memory_format=torch.channels_last) and found.is_cuda
        assert torch.equal(found_labels.cpu(), labels)
        torch.testing.assert_close(found.cpu(), inputs, rtol=1e-5, atol=1e-5)


@needs_gpu
def test_gradients_outside_the_masks_vanish_whatever_they_are(tiny):
    model = tiny.model()
    model.to("cuda", memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.module.parameters(), 0.1, fused=True)
    attached = dsr_tool.attach(model, optimizer, "static")
    kept = {}
    for name, weight in model.weights.items():
        weight.grad = torch.randn_like(weight)
        weight.grad[torch.rand_like(weight) < 0.2] = math.inf if weight.ndim == 2 else math.nan
        kept[name] = weight.grad.clone()
    attached.mask_gradients()
    for name, weight in model.weights.items():
        mask = model.masks[name]
        assert not weight.grad[~mask].count_nonzero()
        assert torch.equal(weight.grad[mask].view(torch.int32), kept[name][mask].view(torch.int32))


@needs_gpu
def test_no_step_waits_for_the_gpu(tiny):
    class Watch(Observer):
        def on_step(self, step):
            torch.cuda.set_sync_debug_mode("error" if 6 <= step < 12 else "default")

    try:
        train(tiny.model(), tiny.data("fake:2000"), tiny.settings(epochs=1, method="static", device="cuda"), [Watch()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
