"""Outputs: tensors of real numbers in whatever containers are taken, everything else is one sentence."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from dsr_tool.errors import UsageError
from dsr_tool.graph.ir import Value
from dsr_tool.report.prediction import prediction_text
from dsr_tool.runtime import Session
from dsr_tool.sparse.feeding import named_floats
from dsr_tool.sparse.macs import output_shape
from dsr_tool.sparse.sparsify import sparsify
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from exporters.export import export
from exporters.onnx.session import OnnxSession
from exporters.verify.compare import compare_outputs

SHAPE = (6,)
WITH_GRAPH, WITHOUT = ("dsr", "onnx"), ("npz", "safetensors", "pth")
Pair = namedtuple("Pair", "logits aux")


@dataclass
class Result:
    logits: torch.Tensor
    loss: object = None


class Net(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.wrap = nn.Linear(6, 40), wrap

    def forward(self, x):
        return self.wrap(self.layer(x))


ONE = {
    "a tensor": lambda y: y,
    "a tuple": lambda y: (y,),
    "a list": lambda y: [y],
    "a mapping": lambda y: {"logits": y},
    "an ordered mapping": lambda y: OrderedDict(logits=y, hidden=None),
    "a named tuple": lambda y: Pair(y, None),
    "a dataclass": Result,
    "containers in containers": lambda y: {"a": [({"b": y},)], "name": "x", "count": 3},
    "scores and classes": lambda y: (y, y.argmax(1)),
    "a mask beside": lambda y: {"scores": y, "mask": y > 0},
}
AUXILIARY = {"aux and out": lambda y: {"aux": y, "out": y * 2}, "out in a tuple": lambda y: {"out": (y,), "aux": y}}
SEVERAL = {
    "a pair": (lambda y: (y, y * 2), ["output_0", "output_1"]),
    "two keys": (lambda y: {"boxes": y, "scores": y * 2, "mask": y > 0}, ["boxes", "scores"]),
    "levels": (lambda y: [y, [y[:, :3], y[:, :1]]], ["output_0", "output_1_0", "output_1_1"]),
    "a dataclass of two": (lambda y: Result(y, y.mean(1)), ["logits", "loss"]),
    "a named tuple of two": (lambda y: Pair(y.relu(), y), ["logits", "aux"]),
    "one tensor twice": (lambda y: {"a": y, "b": y}, ["a", "b"]),
    "a scalar beside": (lambda y: (y, y.mean()), ["output_0", "output_1"]),
    "names of the graph itself": (lambda y: {"input": y, "gemm_0": y * 2}, ["input_", "gemm_0"]),
    "names that are equal": (lambda y: {"a": [y], "a_0": y * 2, 3: y * 3}, ["a_0", "a_0_", "output_3"]),
}
NONE = {
    "None": (lambda _y: None, "returns NoneType"),
    "a truth": (lambda y: y > 0, "returns a tensor of torch.bool"),
    "classes": (lambda y: y.argmax(1), "returns a tensor of torch.int64"),
    "complex numbers": (lambda y: torch.complex(y, y), "returns a tensor of torch.complex64"),
    "an empty mapping": (lambda _y: {}, "returns dict"),
    "classes in a tuple": (lambda y: (y.argmax(1), None), "returns tuple"),
    "half precision of bfloat16": (lambda y: y.bfloat16(), "returns a tensor of torch.bfloat16; .*output.float"),
}


def model_of(wrap):
    return sparsify(Net(wrap), ModelConfig("module", "Net", 0, SHAPE), Budget(sparsity=0.5))


@pytest.mark.parametrize("kind", [*ONE, *AUXILIARY])
def test_one_tensor_in_any_container_is_the_output(kind):
    wrap = {**ONE, **AUXILIARY}[kind]
    graph = trace(Net(wrap), SHAPE)
    assert [value.shape for value in graph.outputs] == [(None, 40)]
    assert output_shape(Net(wrap), SHAPE) == (40,)
    y = torch.randn(2, 40)
    named = named_floats(wrap(y))
    assert list(named) == ["output"] and torch.equal(named["output"], y * 2 if kind == "aux and out" else y)


@pytest.mark.parametrize("ending", [*WITH_GRAPH, *WITHOUT])
@pytest.mark.parametrize("kind", ["a tuple", "a mapping", "a dataclass", "scores and classes"])
def test_such_networks_are_exported_to_every_container(kind, ending, tmp_path):
    model = model_of(ONE[kind])
    assert export(model, tmp_path / f"m.{ending}").passed
    if ending == "dsr":
        x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
        expected = model.module.layer(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(Session(tmp_path / "m.dsr").run(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_tensors_have_names_by_where_they_are(kind):
    wrap, names = SEVERAL[kind]
    assert list(named_floats(wrap(torch.ones(2, 40)))) == names
    assert output_shape(Net(wrap), SHAPE) == ()


@pytest.mark.parametrize("kind", ["one tensor twice", "a scalar beside", "names of the graph itself"])
def test_all_of_several_outputs_are_in_the_files_and_computed(kind, tmp_path):
    wrap, names = SEVERAL[kind]
    model = model_of(wrap)
    for ending in (*WITH_GRAPH, *WITHOUT):
        assert export(model, tmp_path / f"m.{ending}").passed
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    expected = named_floats(wrap(model.module.layer(torch.from_numpy(x)).detach()))
    assert list(expected) == names
    sessions = [Session(tmp_path / f"m.{ending}", runtime=run) for ending in WITH_GRAPH for run in ("scipy", "auto")]
    for session in (*sessions, OnnxSession(tmp_path / "m.onnx")):
        found = session.run_all(x)
        assert list(found) == names
        for name, tensor in expected.items():
            np.testing.assert_allclose(found[name], tensor.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(session.run(x), found[names[0]])


@pytest.mark.parametrize("large", [1e5, 1.0])
def test_each_output_has_a_tolerance_of_its_own(large, tmp_path):
    """A small output that is wrong must not hide behind a large one."""
    net = nn.Linear(6, 40)
    ours = {"boxes": np.full((2, 4), large, np.float32), "scores": np.full((2, 3), 1e-3, np.float32)}
    theirs = {**ours, "scores": ours["scores"] + np.float32(1e-4)}

    def verified(found):
        (tmp_path / "f").touch()
        run = {"onnxruntime": lambda _x: found}
        value = Value("input", (None, 6))
        return compare_outputs(
            tmp_path / "f", "onnx", net, runs=run, value=value, samples=2, seed=0, differing=([], []),
            rounded=lambda _x: ours,
        )  # fmt: skip

    assert verified(ours).passed
    wrong = verified(theirs)
    assert "differs" in wrong.problems[0] and "in output 'scores'" in wrong.problems[0]
    assert wrong.scale == pytest.approx(1e-3) and wrong.largest_difference == pytest.approx(1e-4, rel=1e-2)
    assert not verified({"boxes": ours["boxes"]}).passed
    for other in ({**ours, "more": ours["boxes"]}, dict(reversed(ours.items()))):
        assert "returns the outputs" in verified(other).problems[0]


@pytest.mark.parametrize("kind", NONE)
def test_without_real_numbers_nothing_is_written(kind, tmp_path):
    wrap, words = NONE[kind]
    model = model_of(wrap)  # it may be trained all the same
    for ending in (*WITH_GRAPH, *WITHOUT):
        with pytest.raises(UsageError, match=f"Net {words}"):
            export(model, tmp_path / f"m.{ending}")
    with pytest.raises(UsageError, match=f"Net {words}"):
        trace(Net(wrap), SHAPE)
    assert not list(tmp_path.iterdir())


def test_such_a_network_is_refused_before_anything_is_encoded(tmp_path, monkeypatch):
    from exporters import state_dict

    monkeypatch.setattr(state_dict, "_state_of", lambda *_: pytest.fail("encoded"))
    with pytest.raises(UsageError, match="returns NoneType"):
        export(model_of(lambda _y: None), tmp_path / "m.pth")


def test_predictions_tell_the_shape_and_range_of_every_output():
    outputs = [
        {"name": "boxes", "shape": [1, 4], "least": -0.5, "largest": 2.0},
        {"name": "loss", "shape": [], "least": 1.25, "largest": 1.25},
        {"name": "none", "shape": [1, 0], "least": None, "largest": None},
    ]
    text = prediction_text({"predictions": [{"input": "x.npy", "outputs": outputs}]})
    assert text == "x.npy: boxes 1x4 from -0.5 to 2, loss from 1.25 to 1.25, none 1x0"


def test_outputs_that_keep_their_gradient_are_compared(tmp_path):
    class Learning(Net):
        def forward(self, x):
            with torch.enable_grad():
                return super().forward(x)

    model = sparsify(Learning(lambda y: y), ModelConfig("module", "Net", 0, SHAPE), Budget(sparsity=0.5))
    assert export(model, tmp_path / "m.npz").passed
