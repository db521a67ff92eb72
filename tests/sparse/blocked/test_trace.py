"""A trace follows a network's own code; what cannot be followed becomes one node or is refused."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from dsr_tool.sparse.blocked.mutation import redirect_writes
from dsr_tool.sparse.blocked.trace import NotTraceableError, trace
from dsr_tool.sparse.compact.change import compacted


def traced(module, *inputs, sparse=(), **kwargs):
    parameters = dict(module.named_parameters())
    store = compacted(module, {name: parameters[name] != 0 for name in sparse})
    leaves, spec = pytree.tree_flatten((inputs, kwargs))
    graph = trace(module, store, leaves, spec)
    redirect_writes(graph)
    return graph


def network(forward, **modules):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, module in modules.items():
                self.add_module(name, module)

    Net.forward = forward
    return Net()


X = torch.ones(2, 3, 4, 4)


def names(graph):
    return [str(node.target) if isinstance(node.target, str) else node.target.__name__ for node in graph.nodes]


def test_the_layers_of_torch_are_nodes_and_the_networks_own_modules_are_followed():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    graph = traced(network(lambda self, x: self.block(x) * 2, block=block), X, sparse=["block.0.weight"])
    assert names(graph) == ["input_0", "block.0", "block.1", "mul"]
    assert not graph.notes


def test_a_module_that_asks_for_values_becomes_one_node():
    inner = network(lambda self, x: x * 2 if x.sum() > 0 else x)
    graph = traced(network(lambda self, x: self.inner(self.c(x)).relu(), inner=inner, c=nn.Conv2d(3, 4, 1)), X)
    assert names(graph) == ["input_0", "c", "inner", "relu"]
    assert graph.notes == {"inner": "its control flow depends on values"}


def test_a_network_that_asks_for_values_itself_is_refused():
    with pytest.raises(NotTraceableError, match="its control flow depends on values"):
        traced(network(lambda self, x: x * 2 if x.sum() > 0 else x), X)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: x * len(x), "it asks for the length of a tensor"),
        (lambda self, x: torch.stack([image * 2 for image in x]), "it takes a tensor apart in a loop"),
        (lambda self, x: x * float(x.sum()), "it turns a tensor into a Python number"),
        (lambda self, x: x * int(x.sum()), "it turns a tensor into a Python number"),
        (lambda self, x: x * sum(range(x.shape[0])), "it counts by the shape of a tensor"),
    ],
)
def test_the_reason_is_told_in_words_of_the_network(forward, reason):
    with pytest.raises(NotTraceableError, match=f"^{reason}$"):
        traced(network(forward), X)


def test_a_module_that_reads_its_sparse_weight_itself_becomes_one_node():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return functional.conv2d(x, self.weight - self.weight.mean(), self.bias)

    graph = traced(network(lambda self, x: self.c(x), c=Standardised(3, 4, 1)), X, sparse=["c.weight"])
    assert names(graph) == ["input_0", "c"]
    assert graph.notes == {"c": "Standardised reads its sparse weight itself"}


def test_a_network_that_reads_the_sparse_weight_of_a_layer_is_refused():
    with pytest.raises(NotTraceableError, match=r"reads the weight 'c\.weight' outside of its layer"):
        traced(
            network(lambda self, x: functional.conv2d(x, self.c.weight), c=nn.Conv2d(3, 4, 1)), X, sparse=["c.weight"]
        )


@pytest.mark.parametrize("draw", [lambda: torch.rand(()).item(), random.random])
def test_a_module_that_draws_random_numbers_becomes_one_node_and_the_state_stays(draw):
    inner = network(lambda self, x: x * draw())
    torch.manual_seed(0)
    random.seed(0)
    expected = torch.get_rng_state(), random.getstate()
    graph = traced(network(lambda self, x: self.inner(x), inner=inner), X)
    assert "draws random numbers" in graph.notes["inner"]
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]


def test_a_module_that_sets_its_attributes_becomes_one_node_and_keeps_them():
    def forward(self, x):
        self.last = x
        self.calls = self.calls + 1
        return x * 2

    inner = network(forward)
    inner.calls = 0
    graph = traced(network(lambda self, x: self.inner(x), inner=inner), X)
    assert "sets attributes of itself" in graph.notes["inner"]
    assert inner.calls == 0
    assert not hasattr(inner, "last")


def test_an_autograd_function_is_not_followed():
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x.sign()

        @staticmethod
        def backward(_, gradient):
            return gradient

    inner = network(lambda self, x: Straight.apply(x))
    graph = traced(network(lambda self, x: self.inner(x), inner=inner), X)
    assert graph.notes == {"inner": "it uses the autograd function Straight"}
    assert Straight.apply(torch.ones(2)).tolist() == [1, 1]


def test_a_module_with_hooks_becomes_one_node():
    inner = nn.Sequential(nn.Conv2d(3, 4, 1))
    inner.register_forward_hook(lambda *_: None)
    graph = traced(network(lambda self, x: self.inner(x), inner=inner), X)
    assert graph.notes == {"inner": "it has hooks"}


def test_a_constant_of_the_network_does_not_become_an_attribute_of_it():
    net = network(lambda self, x: x * torch.tensor(2.0))
    before = set(net.__dict__)
    graph = traced(net, X)
    assert [tensor.item() for tensor in graph.tensors.values()] == [2.0]
    assert set(net.__dict__) - before <= {"_compact_store", "_compact_layers", "_compact_order"}


def test_buffers_are_read_when_the_network_runs():
    net = network(lambda self, x: x * self.scale)
    net.register_buffer("scale", torch.ones(1))
    assert [node.op for node in traced(net, X).nodes] == ["placeholder", "get_attr", "call_function"]


def test_a_network_that_asks_whether_its_input_is_a_tensor_is_told_so():
    graph = traced(network(lambda self, x: x * 2 if isinstance(x, torch.Tensor) else x * 3), X)
    assert graph.nodes[-1].args[1] == 2


def test_what_is_read_after_a_write_is_what_was_written():
    def forward(_, x):
        y = x * 2
        z = y + 1
        functional.relu_(y)
        return y, z

    graph = traced(network(forward), X)
    assert [node.target.__name__ for node in graph.outputs] == ["relu_", "add"]
    assert graph.outputs[1].args[0].target.__name__ == "mul"


def test_a_write_that_another_view_would_show_is_refused():
    def forward(_, x):
        y = x * 2
        z = y.view(2, -1)
        y.relu_()
        return z

    with pytest.raises(NotTraceableError, match="view shares its memory"):
        traced(network(forward), X)


def test_arguments_that_are_no_tensors_are_constants():
    graph = traced(network(lambda self, x, scale=1, *, twice=False: x * scale * (2 if twice else 1)), X, 3, twice=True)
    assert [node.args[1] for node in graph.nodes[1:]] == [3, 2]


def test_a_result_that_torch_does_not_know_is_refused():
    class Result:
        pass

    with pytest.raises(NotTraceableError, match="it returns a Result"):
        traced(network(lambda self, x: Result()), X)
