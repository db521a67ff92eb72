import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from converters.conversion import convert
from converters.loading import load
from dsr_tool.errors import CheckFailed, FileError, FormatError, UsageError
from dsr_tool.sparse.discover import Rules, count, discover


class Attention(nn.Module):
    """A module with one of every kind of parameter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.position = nn.Parameter(torch.zeros(1, 7, 32))
        self.layer_scale = nn.Parameter(torch.ones(32, 1, 1))
        self.same = nn.MultiheadAttention(32, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(32, 4, kdim=24, vdim=16, bias=False)
        self.conv1 = nn.Conv1d(32, 48, 3)
        self.up = nn.ConvTranspose2d(32, 48, 2)
        self.volume = nn.Conv3d(8, 16, 3)
        self.depthwise = nn.Conv2d(64, 64, 7, groups=64)
        self.norms = nn.Sequential(nn.BatchNorm1d(3), nn.LayerNorm([4, 32]), nn.GroupNorm(2, 4), nn.InstanceNorm2d(3))
        self.head = nn.Linear(32, 100)


def test_layers_are_found_by_type():
    specs = discover(Attention())
    assert [name for name, spec in specs.items() if spec.role == "sparse"] == [
        "embedding.weight",
        "same.in_proj_weight",
        "same.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
        "conv1.weight",
        "up.weight",
        "volume.weight",
        "head.weight",
    ]
    assert "depthwise" in specs["depthwise.weight"].reason
    assert specs["norms.1.weight"].reason == "normalisation (LayerNorm)"
    assert specs["position"].role == "dense"
    assert specs["norms.0.running_mean"].role == "buffer"


def test_small_networks_have_no_tiny_layers():
    specs = discover(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    assert [spec.role for spec in specs.values() if spec.weight] == ["sparse", "sparse"]


def test_patterns_keep_dense_and_sparsify():
    rules = Rules(keep_dense=["head", "same.*"], sparsify=["depthwise", "same.out_proj.weight"])
    specs = discover(Attention(), rules)
    assert specs["head.weight"].role == specs["same.in_proj_weight"].role == "dense"
    assert specs["depthwise.weight"].role == specs["same.out_proj.weight"].role == "sparse"
    assert "'head'" in specs["head.weight"].reason
    with pytest.raises(UsageError, match="did you mean"):
        discover(Attention(), Rules(keep_dense=["heed.weight"]))


def test_lazy_layers_are_refused():
    with pytest.raises(UsageError, match="has no shape yet"):
        discover(nn.Sequential(nn.LazyLinear(8)))


@pytest.mark.parametrize(("sparsity", "whole"), [("0.8", 0.711), ("0.9", 0.800)])
def test_the_papers_resnet50(sparsity, whole):
    """Nominal .8 and .9 of Mostafa & Wang 2019 are 71.1 and 80.0 % of the whole model."""
    with torch.device("meta"):
        specs = discover(models.resnet50(), Rules())
    assert count(specs)["prunable"] == 25_502_912
    model = convert("resnet50", sparsity=sparsity, preset="paper")
    assert model.model_sparsity == pytest.approx(whole, abs=5e-4)
    kept = {name for name, spec in model.specs.items() if spec.weight and spec.role == "dense"}
    assert kept == {"conv1.weight", *(f"layer{i}.0.downsample.0.weight" for i in (1, 2, 3, 4))}


def test_macs_of_resnet18_and_attention():
    model = convert("resnet18", sparsity=0)
    assert sum(s.macs_per_weight * s.size for s in model.specs.values()) == 1_814_073_344
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    specs = convert(layer, sparsity=0.5, input_shape=(10, 32)).specs
    assert {name: spec.macs_per_weight for name, spec in specs.items() if spec.weight} == {
        "self_attn.in_proj_weight": 10,
        "self_attn.out_proj.weight": 10,
        "linear1.weight": 10,
        "linear2.weight": 10,
    }


def test_magnitude_keeps_the_largest_weights_and_random_any():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    before = layer.weight.detach().clone()
    model = convert(nn.Sequential(layer), sparsity=0.75)
    kept = model.masks["0.weight"]
    assert before[kept].abs().min() >= before[~kept].abs().max()
    assert torch.equal(layer.weight[kept], before[kept])
    again = convert(nn.Sequential(nn.Linear(64, 32)), sparsity=0.75, positions="random", seed=1)
    assert again.active_weights == model.active_weights == 512


def small(**options):
    return convert("squeezenet1_1", sparsity=0.9, num_classes=5, input_size=64, **options)


def test_a_saved_folder_loads_bit_for_bit(tmp_path):
    model = small()
    model.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.config == model.config
    assert again.specs == model.specs
    for name, value in model.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], value)
    for name, mask in model.masks.items():
        assert torch.equal(again.masks[name], mask)
    plain = models.squeezenet1_1(num_classes=5)
    plain.load_state_dict(load_file(tmp_path / "m" / "model.safetensors"))


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        small(seed=3).save(tmp_path / name)
    for file in ("config.json", "model.safetensors", "masks.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_dense_weights_loaded_over_a_sparse_model_fail_the_check(tmp_path):
    model = small()
    model.module.load_state_dict(models.squeezenet1_1(num_classes=5).state_dict())
    with pytest.raises(CheckFailed, match="outside its mask"):
        model.save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    model.apply_masks()
    model.save(tmp_path / "m")


def test_an_existing_folder_is_kept_without_force(tmp_path):
    model = small()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("keep")
    with pytest.raises(FileError, match="exists already"):
        model.save(tmp_path / "m")
    with pytest.raises(FileError, match="something else"):
        model.save(tmp_path / "m", force=True)
    assert (tmp_path / "m" / "mine").read_text() == "keep"
    (tmp_path / "m" / "mine").unlink()
    model.save(tmp_path / "m")
    model.save(tmp_path / "m", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def edit(change):
    def apply(path):
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return apply


def type_without_numpy(path):
    masks = load_file(path)
    save_file({name: bits.view(torch.float8_e4m3fn) for name, bits in masks.items()}, path)


def foreign_mask(path):
    masks = load_file(path)
    first = next(iter(masks))
    save_file({**masks, first: masks[first][:-1].contiguous()}, path)


def stray_weight(path):
    weights = load_file(path)
    weights["features.0.weight"][0, 0, 0] = 1.0
    save_file(weights, path)


@pytest.mark.parametrize(
    ("file", "damage", "error"),
    [
        ("config.json", truncate, FormatError),
        ("config.json", edit(lambda d: d.update(schema="dsr-tool/model/9")), FormatError),
        ("config.json", edit(lambda d: d.pop("layers")), FormatError),
        ("config.json", edit(lambda d: d["layers"].pop(0)), FormatError),
        ("config.json", edit(lambda d: d["model"].update(architecture="squeezenet9_9")), UsageError),
        ("config.json", edit(lambda d: d["model"].update(architecture="resnet18")), FormatError),
        ("config.json", edit(lambda d: d["model"].update(num_classes=6)), FormatError),
        ("model.safetensors", truncate, FormatError),
        ("model.safetensors", lambda path: path.unlink(), FileError),
        ("masks.safetensors", truncate, FormatError),
        ("masks.safetensors", foreign_mask, FormatError),
        ("masks.safetensors", type_without_numpy, FormatError),
        ("masks.safetensors", lambda path: save_file({}, path), FormatError),
        ("model.safetensors", stray_weight, CheckFailed),
    ],
)
def test_damaged_folders_are_refused_in_one_sentence(tmp_path, file, damage, error):
    small().save(tmp_path / "m")
    damage(tmp_path / "m" / file)
    with pytest.raises(error) as caught:
        load(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_folders_that_are_not_model_folders_are_refused(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(FileError, match="is not a model folder"):
        load(tmp_path)


def test_a_users_module_is_loaded_into_a_fresh_module(tmp_path):
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)), sparsity=0.5)
    model.save(tmp_path / "m")
    with pytest.raises(UsageError, match="give load"):
        load(tmp_path / "m")
    again = load(tmp_path / "m", nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)))
    x = torch.randn(3, 20)
    assert torch.equal(again(x), model(x))


def test_values_that_are_not_finite_or_not_real_are_refused():
    for bad in (float("nan"), float("inf")):
        layer = nn.Linear(20, 30)
        with torch.no_grad():
            layer.weight[0, 0] = bad
        for distribution in ("uniform", "magnitude"):
            with pytest.raises(UsageError, match="contains NaN or inf"):
                convert(nn.Sequential(layer), sparsity=0.5, distribution=distribution)
    with pytest.raises(UsageError, match="complex64"):
        convert(nn.Sequential(nn.Linear(20, 30, dtype=torch.complex64)), sparsity=0.5)


def test_a_module_used_twice_is_one_layer():
    layer = nn.Linear(20, 20)
    model = convert(nn.Sequential(layer, nn.ReLU(), layer), sparsity=0.5, input_shape=(20,))
    assert list(model.specs) == ["0.weight", "0.bias"] and model.parameters == 420
    assert model.specs["0.weight"].macs_per_weight == 2


def test_macs_of_modules_with_buffers_outside_the_state_and_other_types():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(20, 30).double()
            self.register_buffer("scale", torch.ones(20, dtype=torch.double), persistent=False)

        def forward(self, x):
            return self.fc(x * self.scale)

    assert convert(Scaled(), sparsity=0.5, input_shape=(20,)).specs["fc.weight"].macs_per_weight == 1


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(UsageError, match="seed"):
        convert("squeezenet1_1", sparsity=0.5, seed=seed)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_models_that_normalise_their_input_get_an_equivalent_preprocessing(name, tmp_path):
    """torchvision builds these with transform_input for its own weights; ours must compute the same from a picture."""
    theirs = models.get_model(name, init_weights=False, transform_input=True).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    model = convert(name, weights=str(tmp_path / "w.safetensors"), sparsity=0)
    picture = torch.rand(1, 3, 299, 299)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = theirs((picture - mean[:, None, None]) / std[:, None, None])
        ours = model.config.preprocessing
        found = model.module.eval()((picture - ours.mean[0]) / ours.std[0])
    assert ours.mean == ours.std == (0.5, 0.5, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_force_does_not_replace_a_folder_of_another_program(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileError, match="something else"):
        small().save(tmp_path / "bert", force=True)
    assert (tmp_path / "bert" / "config.json").read_text() == '{"model_type": "bert"}'


def test_a_failed_replacement_restores_the_old_folder(tmp_path, monkeypatch):
    small().save(tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    rename = Path.replace

    def fail(self, target):
        if self.name.endswith(".part"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(FileError, match="Input/output error"):
        small(seed=1).save(tmp_path / "m", force=True)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_deep_copies_are_independent():
    model = small()
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(other.weights.values())).add_(1)
    model.check()
