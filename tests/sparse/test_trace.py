"""Tracing of modules. ONNX Runtime runs each graph, and the outputs are compared with the module's."""

from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import checker, helper, numpy_helper
from torch import nn
from torchvision import models

from dsr_tool.errors import UsageError
from dsr_tool.graph.ir import Graph
from dsr_tool.sparse.trace import trace


def run(graph, module, x):
    """Runs the graph with the module's weights in ONNX Runtime, without any code of the exporters."""
    state = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    arrays = {**graph.constants, **{name: state[name] for name in graph.parameters}}
    nodes = [helper.make_node(n.op, n.inputs, n.outputs, **n.attributes) for n in graph]
    values = [
        [helper.make_tensor_value_info(v.name, 1, ["batch", *v.shape[1:]]) for v in side]
        for side in (graph.inputs, graph.outputs)
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    opsets = [helper.make_opsetid("", graph.opset)]
    model = helper.make_model(helper.make_graph(nodes, "g", *values, initializers), opset_imports=opsets, ir_version=10)
    checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x})[0]


def check(module, input_shape, batches=(1, 3)):
    graph = trace(module, input_shape)
    graph.check()
    for batch in batches:
        x = np.random.default_rng(batch).standard_normal((batch, *input_shape)).astype(np.float32)
        with torch.no_grad():
            expected = module.eval()(torch.from_numpy(x))
        expected = expected["out"] if isinstance(expected, dict) else expected
        np.testing.assert_allclose(run(graph, module, x), expected.numpy(), rtol=1e-4, atol=1e-5)
    return graph


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x):
        return self.second(self.first(x)) + self.table


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        return self.layer(x)


class Full(nn.Module):
    def forward(self, x):
        return torch.full((x.shape[0], 3), 2.5) * x.sum(1, keepdim=True)


class Heads(nn.Module):
    def __init__(self, keys):
        super().__init__()
        self.keys, self.main, self.aux = keys, nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        return dict(zip(self.keys, (self.aux(x), self.main(x)), strict=True))


class Data(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else x * 2


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def test_the_parameters_of_resnet18_have_their_state_dict_names():
    module = models.resnet18(num_classes=10)
    graph = check(module, (3, 64, 64))
    counters = [name for name in module.state_dict() if name.endswith("num_batches_tracked")]
    assert set(graph.parameters) == set(module.state_dict()) - set(counters)
    assert graph.parameters[0] == "conv1.weight"
    operators = Counter(node.op for node in graph)
    assert operators["Conv"] == 20
    assert operators["Identity"] == operators["Dropout"] == operators["Constant"] == 0
    assert graph.inputs[0].name == "input" and graph.inputs[0].shape == (None, 3, 64, 64)
    assert graph.outputs[0].name == "output" and graph.outputs[0].shape == (None, 10)
    assert sum(array.nbytes for array in graph.constants.values()) < 1000


def test_mobilenet_v3_small():
    check(models.mobilenet_v3_small(num_classes=7), (3, 64, 64), batches=(2,))


def test_attention_is_captured_as_plain_operators_with_its_packed_weight():
    graph = check(Attention(), (3, 8))
    assert "layer.self_attn.in_proj_weight" in graph.parameters
    assert {"MatMul", "Softmax"} <= {node.op for node in graph}


def test_tied_weights_have_the_first_name_and_unused_ones_do_not_appear():
    graph = check(Tied(), (4,))
    assert graph.parameters == ("first.weight", "first.bias", "second.bias")
    assert [array.tolist() for array in graph.constants.values()] == [[0.0, 1.0, 2.0, 3.0]]


def test_constant_of_shape_becomes_an_expand():
    assert "Expand" in {node.op for node in check(Full(), (4,))}


def test_a_module_that_returns_its_input_has_an_identity_node():
    assert [node.op for node in check(nn.Identity(), (4,))] == ["Identity"]


def test_of_a_mapping_the_entry_out_is_the_output():
    graph = check(Heads(("aux", "out")), (4,))
    assert graph.parameters == ("main.weight", "main.bias")


def test_of_another_mapping_every_entry_is_an_output():
    graph = trace(Heads(("one", "two")), (4,))
    assert [value.name for value in graph.outputs] == ["one", "two"]


def test_capture_does_not_change_the_module_or_the_random_state():
    module = small()
    module[1].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    flags, random = [child.training for child in module.modules()], torch.get_rng_state()
    trace(module, (3, 8, 8))
    assert [child.training for child in module.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_capture_is_deterministic_quiet_and_survives_json(capfd):
    module = small()
    graph = trace(module, (3, 8, 8))
    assert trace(module, (3, 8, 8)).to_json() == graph.to_json()
    assert Graph.from_json(graph.to_json()).to_json() == graph.to_json()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("module", "shape", "words"),
    [
        (nn.Linear(3, 3), (), "input shape"),
        (nn.Linear(3, 3), (0,), "positive"),
        (nn.Linear(3, 3), (4,), "Linear.*captured with input shape \\(4,\\).*reduction dim"),
        (Data(), (4,), "data-dependent"),
    ],
)
def test_modules_that_cannot_be_captured_are_usage_errors(module, shape, words, capfd):
    with pytest.raises(UsageError, match=words):
        trace(module, shape)
    assert capfd.readouterr() == ("", "")


def test_a_parameter_with_the_name_of_the_input_is_refused():
    module = nn.Module()
    module.input = nn.Parameter(torch.zeros(3))
    with pytest.raises(UsageError, match="'input'"):
        trace(module, (3,))


def test_a_parameter_with_the_name_of_an_output_is_refused():
    module = nn.Linear(3, 3)
    module.output = nn.Parameter(torch.zeros(3))
    with pytest.raises(UsageError, match="'output'"):
        trace(module, (3,))


class AlwaysDrops(nn.Module):
    def __init__(self, training):
        super().__init__()
        self.linear, self.always = nn.Linear(4, 4), training

    def forward(self, x):
        return nn.functional.dropout(self.linear(x), 0.5, training=self.always or self.training)


def test_dropout_in_eval_mode_is_refused():
    """Its node would become an identity, which the network is not."""
    check(AlwaysDrops(False), (4,))
    with pytest.raises(UsageError, match="AlwaysDrops applies dropout in eval mode too.*training=self.training"):
        trace(AlwaysDrops(True), (4,))
