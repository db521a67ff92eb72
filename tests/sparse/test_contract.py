"""The state of a network is checked before anything is written."""

import pytest
import torch
from torch import nn

from converters.conversion import convert
from converters.loading import load
from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.sparse.contract import DTYPES
from exporters.export import export

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch about quantisation and sparse layouts
SHAPE = (12,)
ENDINGS = ("dsr", "onnx", "npz", "safetensors", "pth")
X = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, **state):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 5)
        for name, tensor in state.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x):
        return self.second(self.first(x).relu())


class WithState(Net):
    """A network with an extra state."""

    def __init__(self, extra=None):
        super().__init__()
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, extra):
        self.extra = extra


def quantised(dynamic):
    if dynamic:
        return torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear}, dtype=torch.qint8)
    module = nn.Sequential(torch.ao.quantization.QuantStub(), nn.Linear(12, 5))
    module.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    torch.ao.quantization.prepare(module.eval(), inplace=True)
    module(X)
    return torch.ao.quantization.convert(module)


def renamed():
    module = Net()
    module.register_state_dict_post_hook(
        lambda _module, state, prefix, _metadata: state.update({f"{prefix}new": state.pop(f"{prefix}first.weight")})
    )
    return module


def integers(values):
    return nn.Parameter(torch.tensor(values), requires_grad=False)


REFUSED = {
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "'0.weight' has no shape yet; run one input"),
    "lazy norm": (lambda: nn.Sequential(nn.Linear(12, 8), nn.LazyBatchNorm1d()), "'1.*' has no shape yet"),
    "dynamically quantised": (lambda: quantised(True), "_packed_params.* before it is quantised"),
    "quantised": (lambda: quantised(False), "before it is quantised"),
    "a dict as extra state": (lambda: WithState({"calls": 3}), "'_extra_state'.* a dict.*get_extra_state.. return a"),
    "None as extra state": (WithState, "a NoneType.*get_extra_state"),
    "bytes as extra state": (lambda: WithState(b"abc"), "a bytes.*get_extra_state"),
    "a sparse buffer": (lambda: Net(links=torch.eye(4).to_sparse()), "'links'.*sparse.*persistent=False"),
    "a CSR buffer": (lambda: Net(links=torch.eye(4).to_sparse_csr()), "'links'.*sparse.*persistent=False"),
    "a nested buffer": (
        lambda: Net(rows=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        "'rows'.*a nested tensor",
    ),
    "complex numbers of 128 bits": (lambda: Net(z=torch.ones(2, dtype=torch.complex128)), "'z'.*complex128"),
    "a renamed parameter": (renamed, "parameter 'first.weight' is not in the state_dict.*without that hook"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("options", [{"input_shape": SHAPE}, {}])
def test_states_that_files_cannot_hold_are_refused_when_a_network_is_converted(kind, options):
    make, words = REFUSED[kind]
    with pytest.raises(UsageError, match=words):
        convert(make(), sparsity=0.5, **options)


@pytest.mark.parametrize("kind", ["lazy", "dynamically quantised", "a dict as extra state"])
@pytest.mark.parametrize("weights", [True, False])
def test_callables_that_return_such_a_network_are_refused(kind, weights, tmp_path, monkeypatch):
    import converters.callables

    monkeypatch.setattr(converters.callables, "_find", lambda *_names: REFUSED[kind][0])
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    given = {"weights": str(tmp_path / "w.pth")} if weights else {}
    with pytest.raises(UsageError, match=REFUSED[kind][1]):
        convert("a:b", sparsity=0.5, input_shape=SHAPE, **given)


@pytest.mark.parametrize("change", ["extra state", "quantised layer", "new buffer", "lost layer", "other dtype"])
def test_a_state_that_changed_since_is_refused_before_anything_is_written(change, tmp_path):
    model = convert(WithState(torch.ones(2)), sparsity=0.5, input_shape=SHAPE)
    if change == "extra state":
        model.module.extra = {"calls": 3}
    elif change == "quantised layer":
        model.module = torch.ao.quantization.quantize_dynamic(model.module, {nn.Linear}, dtype=torch.qint8)
    elif change == "new buffer":
        model.module.register_buffer("late", torch.ones(3))
    elif change == "lost layer":
        del model.module.second
    else:
        model.module.register_buffer("z", torch.ones(2, dtype=torch.complex128))
    for write in (lambda: model.save(tmp_path / "m"), lambda: export(model, tmp_path / "m.dsr")):
        with pytest.raises((UsageError, CheckFailed), match="state_dict"):
            write()
    assert not list(tmp_path.iterdir())


def same(first, second):
    left, right = first.module.state_dict(), second.module.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def outside():
    module = Net()
    module.register_buffer("links", torch.eye(4).to_sparse(), persistent=False)
    return module


def one_memory():
    table = torch.arange(3.0)
    return Net(one=table, rows=table[:2])


TAKEN = {
    "a tensor as extra state": lambda: WithState(torch.arange(3.0)),
    "integers": lambda: Net(index=integers([1, 2])),
    "booleans": lambda: Net(chosen=integers([True, False])),
    "an empty parameter": lambda: Net(nothing=nn.Parameter(torch.empty(0, 3))),
    "an expanded buffer": lambda: Net(ones=torch.ones(1).expand(4)),
    "bytes": lambda: Net(table=torch.arange(9, dtype=torch.uint8)),
    "one memory under two names": one_memory,
    "a sparse buffer outside the state": outside,
}


@pytest.mark.parametrize("kind", TAKEN)
def test_states_that_files_can_hold_come_back_from_folders_and_archives(kind, tmp_path):
    model = convert(TAKEN[kind](), sparsity=0.5, input_shape=SHAPE)
    model.save(tmp_path / "m")
    export(model, tmp_path / "m.dsr")
    for path in ("m", "m.dsr"):
        assert same(load(tmp_path / path, TAKEN[kind]()), model)


@pytest.mark.parametrize("ending", ENDINGS)
def test_integer_parameters_and_extra_states_are_exported_everywhere(ending, tmp_path):
    class Both(WithState):
        def __init__(self):
            super().__init__(torch.arange(3.0))
            self.order = integers([4, 3, 2, 1, 0])

        def forward(self, x):
            return super().forward(x)[:, self.order]

    model = convert(Both(), sparsity=0.5, input_shape=SHAPE)
    assert export(model, tmp_path / f"m.{ending}").passed


def test_an_extra_state_may_grow(tmp_path):
    model = convert(WithState(torch.ones(2)), sparsity=0.5, input_shape=SHAPE)
    model.module.extra = torch.arange(5)
    model.save(tmp_path / "m")
    export(model, tmp_path / "m.dsr")
    for path in ("m", "m.dsr"):
        loaded = load(tmp_path / path, WithState(torch.ones(2)))
        assert torch.equal(loaded.module.extra, torch.arange(5))
        assert loaded.specs["_extra_state"].shape == (5,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_folder_holds_buffers_of_every_type_and_exports_say_which_they_hold(dtype, tmp_path):
    table = torch.ones(3).to(dtype) if dtype != torch.bool else torch.tensor([True, False])
    model = convert(Net(table=table), sparsity=0.5, input_shape=SHAPE)
    model.save(tmp_path / "m")
    assert load(tmp_path / "m", Net(table=table)).module.table.dtype == dtype
    try:
        export(model, tmp_path / "m.npz")
    except UsageError as error:
        remedy = "view_as_real" if dtype.is_complex else "float32" if dtype.is_floating_point else "int64"
        assert f"'table' has type {dtype}" in str(error) and remedy in str(error)
        assert not (tmp_path / "m.npz").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_parameters_in_8_bits_are_looked_at_for_nan(dtype):
    def made(values):
        return Net(scale=nn.Parameter(torch.tensor(values).to(dtype), requires_grad=False))

    assert "scale" in convert(made([1.0, 2.0]), sparsity=0.5, input_shape=SHAPE).specs
    with pytest.raises(UsageError, match="'scale' contains NaN"):
        convert(made([1.0, torch.nan]), sparsity=0.5, input_shape=SHAPE)


def test_the_remedy_of_other_weights_helps(tmp_path):
    model = convert(Net(index=integers([1, 2])).double(), sparsity=0.5, input_shape=SHAPE)
    with pytest.raises(UsageError, match="weights of torch.float64.*model.to.torch.float32"):
        export(model, tmp_path / "m.npz")
    assert export(model.to(torch.float32), tmp_path / "m.npz").passed


def test_networks_of_whole_numbers_get_a_remedy_that_fits():
    module = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(48, 3))
    with pytest.raises(UsageError, match="it takes whole numbers, as an embedding does"):
        convert(module, sparsity=0.5, input_shape=SHAPE)
