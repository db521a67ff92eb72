"""A parameter that two modules share stays one: one mask, one count in the budget, one value, through everything."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from converters.conversion import convert
from converters.loading import load
from converters.plain import make_plain
from converters.state_dicts import fill_from_file
from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.methods import attach
from dsr_tool.sparse.discover import Rules, discover
from dsr_tool.sparsity.granularity import Granularity
from dsr_tool.train.settings import TrainSettings
from dsr_tool.train.storage import apply_storage
from exporters.export import export, verify

SHAPE = (3, 8, 8)
X = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(12).view(3, 4)
STORAGES = ("masked", "compact")


class Convs(nn.Module):
    """Two convolutions with one weight, each behind its own norm and between other layers."""

    def __init__(self, seed=0, *, tied=True):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 3)
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        if tied:
            self.b.weight = self.a.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for conv, norm in zip((self.a, self.b), self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class Words(nn.Module):
    """An embedding and an output head with one weight, as in language models."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.inner = nn.Embedding(12, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 12)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(torch.relu(self.inner(self.words(ids))))


NETWORKS = {"convs": (Convs, SHAPE, X, ("a", "b")), "words": (Words, (), IDS, ("words", "head"))}


def converted(name, **options):
    kind, shape, *_ = NETWORKS[name]
    return convert(kind(), sparsity=0.5, input_shape=shape, **options)


def trained(model, inputs, method="set", steps=6):
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1, momentum=0.9)
    attached = attach(model, optimizer, method, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model.module(inputs).square().mean().backward()
        optimizer.step()
    attached.remove()
    return model


def is_tied(module, first, second):
    one, other = module.get_submodule(first), module.get_submodule(second)
    shared = one._parameters.get("weight") is other._parameters.get("weight")
    return shared and torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_tied_weight_counts_once_and_its_spec_says_so(name, storage):
    *_, (first, second) = NETWORKS[name]
    model = converted(name, storage=storage)
    assert is_tied(model.module, first, second)
    assert f"{second}.weight" not in {**model.specs, **model.masks}
    assert f"tied to {second}.weight" in model.specs[f"{first}.weight"].reason
    sizes = {id(parameter): parameter.numel() for parameter in NETWORKS[name][0]().parameters()}
    assert model.parameters == sum(sizes.values())
    assert model.active_weights == model.prunable_weights // 2


def test_multiply_adds_are_those_of_both_uses():
    specs = converted("convs").specs
    apart = convert(Convs(tied=False), sparsity=0.5, input_shape=SHAPE).specs
    both = apart["a.weight"].macs_per_weight + apart["b.weight"].macs_per_weight
    assert specs["a.weight"].macs_per_weight == both


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", NETWORKS)
def test_folders_archives_and_copies_of_a_trained_one_are_tied(name, storage, tmp_path):
    kind, shape, inputs, pair = NETWORKS[name]
    model = trained(converted(name, storage=storage), inputs)
    model.save(tmp_path / "folder")
    paths = [tmp_path / "folder"]
    if shape:
        paths.append(tmp_path / "m.dsr")
        assert export(model, paths[-1]).passed
    for path in paths:
        loaded = load(path, kind(5), storage=storage)
        assert is_tied(loaded.module, *pair) and loaded.counts == model.counts
        with torch.no_grad():
            assert torch.equal(loaded.module.eval()(inputs), model.module.eval()(inputs))
    copied = copy.deepcopy(model)
    trained(copied, inputs)
    assert is_tied(copied.module, *pair) and copied.active_weights == model.active_weights
    for other in STORAGES:
        assert is_tied(copied.to_storage(other).module, *pair)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_are_those_of_a_dense_network_with_the_same_masks(name, storage):
    kind, _, inputs, (first, _) = NETWORKS[name]
    model = converted(name, storage=storage)
    dense = kind()
    dense.load_state_dict(model.module.state_dict())
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9)
    masks = dict(model.masks)
    for _ in range(4):
        optimizer.zero_grad()
        dense(inputs).square().mean().backward()
        for key, parameter in dense.named_parameters():
            if key in masks:
                parameter.grad.mul_(masks[key])
        optimizer.step()
    trained(model, inputs, "static", 4)
    torch.testing.assert_close(model.module.state_dict()[f"{first}.weight"], dense.state_dict()[f"{first}.weight"])


@pytest.mark.parametrize("method", ["dsr", "rigl", "deepr"])
def test_methods_move_one_mask(method):
    model = trained(converted("convs"), X, method)
    model.check_writable()
    assert is_tied(model.module, "a", "b") and model.active_weights == model.prunable_weights // 2


@pytest.mark.parametrize(("ending", "storage"), [("safetensors", "compact"), ("pth", "masked")])
def test_plain_code_finds_both_names(ending, storage, tmp_path):
    from safetensors.torch import load_file

    model, path = converted("convs", storage=storage), tmp_path / f"m.{ending}"
    assert export(model, path).passed and verify(path, model).passed
    state = load_file(path) if ending == "safetensors" else torch.load(path)
    Convs(5).load_state_dict(state, strict=True)
    assert torch.equal(state["a.weight"], state["b.weight"])
    state["b.weight"] = state["b.weight"] + 1
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    with pytest.raises(CheckFailed, match="b.weight"):
        verify(path, model)


def test_scales_of_rounded_weights_have_both_names(tmp_path):
    from safetensors.torch import load_file

    assert export(converted("convs"), tmp_path / "m.safetensors", values="int8").passed
    state = load_file(tmp_path / "m.safetensors")
    assert torch.equal(state["a.weight_scale"], state["b.weight_scale"])


@pytest.mark.parametrize(("ending", "storage"), [("onnx", "compact"), ("npz", "masked")])
def test_other_exports_hold_it_once(ending, storage, tmp_path):
    assert export(converted("convs", storage=storage), tmp_path / f"m.{ending}").passed


def test_a_compacted_archive_computes_the_same(tmp_path):
    # All channels that one use could lose, the other may still need.
    module = Convs()
    with torch.no_grad():
        module.a.weight[2:6], module.a.weight[:, 5:] = 0, 0
        module.a.bias[2:6] = 0
    model = convert(module, sparsity="keep", input_shape=SHAPE)
    assert export(model, tmp_path / "m.dsr", compact=True).passed


@pytest.mark.parametrize("kept", ["a.weight", "b.weight", "both"])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_of_a_file_stay_tied(kept, ending, tmp_path):
    state = {key: value.clone() for key, value in Convs(1).state_dict().items()}
    state.pop({"a.weight": "b.weight", "b.weight": "a.weight"}.get(kept), None)
    path, module = tmp_path / f"w.{ending}", Convs()
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    fill_from_file(module, "Convs", str(path))
    assert module.a.weight is module.b.weight
    assert torch.equal(module.b.weight, Convs(1).b.weight)


def test_a_file_with_two_values_for_one_weight_is_refused(tmp_path):
    torch.save(Convs(tied=False).state_dict(), tmp_path / "w.pth")
    module = Convs()
    before = module.a.weight.clone()
    with pytest.raises(UsageError, match=r"holds different values for 'a.weight' and 'b.weight'"):
        fill_from_file(module, "Convs", str(tmp_path / "w.pth"))
    assert torch.equal(module.a.weight, before)


def test_auto_storage_is_masked_where_gradients_of_two_uses_must_be_added():
    for method, storage in (("rigl", "masked"), ("set", "compact")):
        assert apply_storage(converted("convs"), TrainSettings(method=method))[0].storage == storage
    settings = TrainSettings(method="rigl", storage="compact")
    with pytest.raises(UsageError, match=r"needs gradients of inactive weights, and 'a.weight' is tied"):
        apply_storage(converted("convs"), settings)


def test_patterns_may_use_either_name():
    for pattern in ("a", "b", "b.weight"):
        specs = discover(Convs(), Rules(keep_dense=[pattern]))
        assert specs["a.weight"].role == "dense" and specs["a.weight"].reason == f"kept dense by pattern {pattern!r}"


def test_it_stays_dense_where_one_module_cannot_have_a_mask():
    module = Convs()
    module.scale = nn.LayerNorm((8, 8, 3, 3))
    module.scale.weight = module.a.weight
    spec = discover(module)["a.weight"]
    assert (spec.role, spec.weight) == ("dense", False)
    assert spec.reason == "normalisation (LayerNorm), tied to b.weight, scale.weight"
    specs = discover(Words(), Rules(granularity=Granularity.parse("2:4")))
    assert specs["words.weight"].role == "dense" and "Embedding has no input channels" in specs["words.weight"].reason


def test_shared_buffers_and_biases_are_entries_of_one_name():
    module = Convs()
    module.b.bias = module.a.bias
    module.norms[1].running_mean = module.norms[0].running_mean
    model = convert(module, sparsity=0.5, input_shape=SHAPE)
    assert not {"b.bias", "norms.1.running_mean"} & set(model.specs)
    assert copy.deepcopy(model).module.norms[1].running_mean.shape == (8,)


def test_two_parameters_in_one_memory_are_refused():
    module = Convs(tied=False)
    module.b.weight = nn.Parameter(module.a.weight.data)
    with pytest.raises(UsageError, match=r"'a.weight' and 'b.weight' lie in the same memory"):
        convert(module, sparsity=0.5, input_shape=SHAPE)
    whole = torch.randn(16, 8, 3, 3)
    module.a.weight, module.b.weight = nn.Parameter(whole[:8]), nn.Parameter(whole[8:])
    assert len(convert(module, sparsity=0.5, input_shape=SHAPE).masks) == 4


def test_a_tie_that_is_cut_later_is_noticed(tmp_path):
    model = converted("convs")
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
    attach(model, optimizer, "static", total_steps=4)
    model.module.b.weight = nn.Parameter(model.module.b.weight.detach().clone())
    model.module(X).sum().backward()
    with pytest.raises(UsageError, match=r"'a.weight' is no longer the parameter that it was"):
        optimizer.step()
    for write in (model.save, lambda path: export(model, path / "m.dsr")):
        with pytest.raises(CheckFailed, match="'b.weight'"):
            write(tmp_path / "folder")


def test_pruning_hooks_must_agree():
    module = Convs()
    mask = torch.ones(8, 8, 3, 3)
    mask[0] = 0
    for layer in (module.a, module.b):
        prune.custom_from_mask(layer, "weight", mask)
    model = convert(module, sparsity="keep", input_shape=SHAPE)
    assert is_tied(model.module, "a", "b") and torch.equal(model.masks["a.weight"], mask.bool())
    for masks in ((mask, None), (mask, mask.flip(0))):
        module = Convs()
        for layer, own in zip((module.a, module.b), masks, strict=True):
            if own is not None:
                prune.custom_from_mask(layer, "weight", own)
        with pytest.raises(UsageError, match=r"'a.weight' and 'b.weight' share one parameter"):
            convert(module, sparsity="keep", input_shape=SHAPE)


@pytest.mark.parametrize("name", ["weight_norm", "parametrized"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_weights_that_are_computed_alike_stay_tied(name):
    def computed(*, scales_too):
        module = Convs(tied=False)
        normed = weight_norm if name == "weight_norm" else parametrizations.weight_norm
        for layer in (module.a, module.b):
            normed(layer)
        one, other = (
            (layer, layer) if name == "weight_norm" else (layer.parametrizations.weight,) * 2
            for layer in (module.a, module.b)
        )
        names = ("weight_v", "weight_g") if name == "weight_norm" else ("original1", "original0")
        for key in names if scales_too else names[:1]:
            setattr(other[0], key, getattr(one[0], key))
        return module

    plain = make_plain(computed(scales_too=True))
    assert is_tied(plain.module, "a", "b") and not any("separate" in note for note in plain.notes)
    module = computed(scales_too=False)
    with torch.no_grad():
        (module.b if name == "weight_norm" else module.b.parametrizations.weight).get_parameter(
            "weight_g" if name == "weight_norm" else "original0"
        ).mul_(2)
        expected = module.eval()(X)
    plain = make_plain(module)
    assert plain.module.a.weight is not plain.module.b.weight
    assert plain.notes[-1] == "weights that were computed from shared parameters are now separate: a.weight, b.weight"
    torch.testing.assert_close(plain.module(X), expected)
