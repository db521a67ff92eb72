"""Checkpoints as people have them: what fits is found and told, and nothing else is loaded."""

import argparse
import collections
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from converters.callables import load as load_callable
from converters.checkpoints import Checkpoint
from converters.kept_zeros import keep
from converters.paper_models import load as load_paper
from converters.pickles import read_file
from converters.sources import load_network
from converters.state_dicts import fitting, load_strictly, read_weights
from converters.torch_prune import take_masks
from converters.torchvision_builders import build
from dsr_tool.errors import FileError, FormatError, UsageError


class Net(nn.Module):
    def __init__(self, seed=0, classes=3):
        super().__init__()
        torch.manual_seed(seed)
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 8, 3)))
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


MAIN, OTHER = Net(1).state_dict(), Net(2).state_dict()
BODY = {name: value for name, value in MAIN.items() if name.startswith("features.")}
INNER = {name[9:]: value for name, value in BODY.items()}
HEAD = {name: MAIN[name] for name in ("fc.weight", "fc.bias")}
SHAPES = {name: tuple(value.shape) for name, value in MAIN.items()}


def under(prefix, state=MAIN):
    return {prefix + name: value for name, value in state.items()}


def averaged(updates=1):
    average = AveragedModel(Net(2), use_buffers=True)
    for _ in range(updates):
        average.update_parameters(Net(1))
    return average.state_dict()


def is_main(found, state=MAIN):
    return found.problems == 0 and all(torch.equal(found.state[name], value) for name, value in state.items())


ADAM = torch.optim.Adam(Net().parameters())
Net()(torch.randn(1, 1, 6, 6)).sum().backward()
PLAIN = [
    (MAIN, []),
    (under("module."), ["removed prefix 'module.'"]),
    (under("module._orig_mod."), ["removed prefix 'module.' and '_orig_mod.'"]),
    (under("_fsdp_wrapped_module."), ["removed prefix '_fsdp_wrapped_module.'"]),
    ({**under("features._orig_mod.", INNER), **HEAD}, ["removed prefix '_orig_mod.'"]),
    (under("net.encoder."), ["removed prefix 'net.encoder.'"]),
    ({"state_dict": MAIN, "epoch": 3}, ["read 'state_dict'"]),
    ({"model": under("module."), "optimizer": ADAM.state_dict()}, ["read 'model'", "removed prefix 'module.'"]),
    ({"a": {"b": {"net": MAIN}}}, ["read 'a.b.net'"]),
    ({"features": INNER, "fc": {name[3:]: HEAD[name] for name in HEAD}}, []),
    ({"params": MAIN, "ema": {"decay": 0.9}, "scheduler": {"last": torch.tensor(3)}}, ["read 'params'"]),
    (
        {"state_dict": {**under("model."), "criterion.weight": torch.ones(3)}, "callbacks": {}},
        ["read 'state_dict'", "removed prefix 'model.'", "left out 1 more ('state_dict.criterion.weight')"],
    ),
    (
        {**under("backbone.", BODY), **under("head.", HEAD)},
        ["removed prefix 'backbone.' and 'head.'"],
    ),
    (
        {**MAIN, "total_ops": torch.ones(1), "fc.total_params": torch.ones(1)},
        ["left out 2 more ('total_ops', 'fc.total_params')"],
    ),
    ({name: value for name, value in MAIN.items() if "num_batches" not in name}, []),
]  # fmt: skip


@pytest.mark.parametrize(("content", "notes"), PLAIN)
def test_weights_are_found_by_what_fits_and_told(content, notes):
    found = fitting(content, Net())
    state = {name: value for name, value in MAIN.items() if name in found.state}
    assert is_main(found, state) and len(state) >= 7
    assert list(found.notes) == notes
    module = Net(5)
    load_strictly(module, "Net", found.state, "w.pth")
    assert all(torch.equal(value, MAIN[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("content", "label", "others"),
    [
        ({"model": OTHER, "model_ema": averaged()}, "model_ema", "'model'"),
        ({"state_dict": OTHER, "state_dict_ema": MAIN}, "state_dict_ema", "'state_dict'"),
        ({"model": OTHER, "ema": MAIN, "best": dict(OTHER)}, "ema", "'model' and 'best'"),
        ({"state_dict": {**under("net.", OTHER), **under("ema_net.")}}, "state_dict.ema_net", "'state_dict.net'"),
        ({"swa_model": averaged(), "net": OTHER}, "swa_model", "'net'"),
        ({"model": MAIN, "model_ema": averaged(0)}, "model", "'model_ema'"),  # never updated
        ({"state_dict": MAIN, "ema_state_dict": OTHER, "message_hub": {}}, "state_dict", "'ema_state_dict'"),
        ({"state_dict": OTHER, "ema_state_dict": under("module.")}, "ema_state_dict", "'state_dict'"),
        ({"student": MAIN, "teacher": OTHER}, "student", "'teacher'"),
        ({"model": MAIN, "schema": OTHER}, "model", "'schema'"),
        ({**MAIN, "old": OTHER}, "", "'old'"),
    ],
)  # fmt: skip
def test_of_several_that_fit_the_average_is_read_and_the_others_are_named(content, label, others):
    found = fitting(content, Net())
    assert is_main(found) and found.label == label
    told = found.notes[0]
    assert told.startswith(
        f"read {label!r}, not {others} (add #" if label else f"read what has no key, not {others} (add #"
    )


def test_averages_of_parameters_alone_do_not_fit():
    partial = {name: value for name, value in OTHER.items() if "running" not in name}
    found = fitting({"model": MAIN, "model_ema": partial}, Net())
    assert is_main(found) and found.notes == ("read 'model'",)


def test_a_key_after_the_file_chooses(tmp_path):
    path = tmp_path / "c.pth"
    torch.save({"state_dict": {**under("ema."), **under("model.", OTHER)}, "best": {"model": OTHER}}, path)
    assert is_main(read_weights(str(path), Net()))
    for choice, label in (
        ("state_dict.model", "state_dict.model"),
        ("model", "state_dict.model"),
        ("best", "best.model"),
    ):
        found = read_weights(f"{path}#{choice}", Net())
        assert is_main(found, OTHER) and found.label == label
    with pytest.raises(UsageError, match=r"#modl names no weights.*it has 'state_dict.ema', 'state_dict.model' or"):
        read_weights(f"{path}#modl", Net())
    path.rename(tmp_path / "c#1.pth")
    assert is_main(read_weights(str(tmp_path / "c#1.pth"), Net()))
    with pytest.raises(FileError, match="does not exist"):
        read_weights(f"{path}#model", Net())


def test_weights_of_a_child_alone_are_recognised():
    found = fitting(
        {"backbone": {name[9:]: value for name, value in MAIN.items() if name.startswith("features.")}}, Net()
    )
    assert found.missing == ("fc.weight", "fc.bias") and found.problems == 2
    assert found.notes == ("read 'backbone'", "added prefix 'features.'")
    assert torch.equal(found.state["features.2.0.weight"], MAIN["features.2.0.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("write", [torch.save, save_file])
def test_other_types_of_values_are_converted_and_told(tmp_path, dtype, write):
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in MAIN.items()}
    write(state, tmp_path / "w.bin")
    found = read_weights(str(tmp_path / "w.bin"), Net())
    assert found.notes == (f"converted 10 entries from {str(dtype)[6:]} to float32",)
    module = Net(5)
    load_strictly(module, "Net", found.state, "w")
    assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in module.state_dict().items())


def test_weights_in_a_sparse_layout_and_integers():
    module = Net(5)
    load_strictly(module, "Net", {**MAIN, "fc.weight": MAIN["fc.weight"].to_sparse()}, "w")
    assert torch.equal(module.fc.weight, MAIN["fc.weight"])
    with pytest.raises(UsageError, match=r"'fc.weight' as torch.int8.*not quantised"):
        load_strictly(module, "Net", {**MAIN, "fc.weight": MAIN["fc.weight"].to(torch.int8)}, "w")


def test_pruned_checkpoints_carry_their_masks_to_keep(tmp_path):
    net = build("squeezenet1_1")
    prune.l1_unstructured(net.features[3].squeeze, "weight", 0.5)
    prune.random_unstructured(net.features[0], "weight", 0.25)
    net.features[3].squeeze.weight_orig.data[net.features[3].squeeze.weight_mask.bool()] *= torch.rand(512) < 0.5
    torch.save({"model": {f"module.{name}": value for name, value in net.state_dict().items()}}, tmp_path / "p.pth")
    module, config = load_network("squeezenet1_1", str(tmp_path / "p.pth"))
    assert config.conversion["weights_read"][-1] == "took the masks of 2 pruned weights"
    masks = take_masks(module)
    assert list(module.state_dict()) == list(build("squeezenet1_1").state_dict())
    model = keep(module, config, masks=masks).model
    assert torch.equal(model.masks["features.3.squeeze.weight"], net.features[3].squeeze.weight_mask.bool())
    assert torch.equal(module.features[0].weight, net.features[0].weight_orig * net.features[0].weight_mask)
    assert model.active_weights == 512 + 1296 < model.prunable_weights


def test_heads_of_other_sizes_and_missing_ones_are_fresh_and_recorded(tmp_path):
    net = build("resnet18", 7)
    torch.save({"state_dict": under("module.", net.state_dict())}, tmp_path / "7.pth")
    module, config = load_network("resnet18", str(tmp_path / "7.pth"))
    assert config.num_classes == 7 and torch.equal(module.fc.weight, net.fc.weight) and "fresh" not in config.conversion
    module, config = load_network("resnet18", str(tmp_path / "7.pth"), num_classes=5)
    assert config.conversion["fresh"] == ["fc.bias", "fc.weight"] and module.fc.weight.shape == (5, 512)
    assert torch.equal(module.layer4[1].conv2.weight, net.layer4[1].conv2.weight)
    body = {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}
    torch.save({"model": under("encoder.", body)}, tmp_path / "body.pth")
    with pytest.raises(UsageError, match="without its head 'fc'.*--num-classes"):
        load_network("resnet18", str(tmp_path / "body.pth"))
    for classes in (5, 1000):
        module, config = load_network("resnet18", str(tmp_path / "body.pth"), num_classes=classes)
        assert config.conversion["fresh"] == ["fc.bias", "fc.weight"] and config.num_classes == classes
        assert torch.equal(module.bn1.running_var, net.bn1.running_var)
    again, _ = load_network("resnet18", str(tmp_path / "body.pth"), num_classes=5)
    assert torch.equal(
        again.fc.weight, load_network("resnet18", str(tmp_path / "body.pth"), num_classes=5)[0].fc.weight
    )


def test_auxiliary_heads_may_be_missing(tmp_path):
    state = build("googlenet", 4).state_dict()
    torch.save({name: value for name, value in state.items() if not name.startswith("aux")}, tmp_path / "g.pth")
    module, config = load_network("googlenet", str(tmp_path / "g.pth"))
    assert config.num_classes == 4 and torch.equal(module.fc.weight, state["fc.weight"])
    assert config.conversion["fresh"] and all(name.startswith("aux") for name in config.conversion["fresh"])
    torch.save(state, tmp_path / "g.pth")
    assert "fresh" not in load_network("googlenet", str(tmp_path / "g.pth"))[1].conversion


def test_the_other_sources_tell_what_was_read_too(tmp_path, monkeypatch):
    (tmp_path / "checkpoint_nets_for_test.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(4, 2))"
    )
    monkeypatch.chdir(tmp_path)
    torch.save({"net": {"module.0.weight": torch.ones(2, 4), "module.0.bias": torch.zeros(2)}}, "w.pt")
    module, config = load_callable("checkpoint_nets_for_test:net", "w.pt", input_shape=(4,))
    assert config.conversion == {"weights": "w.pt", "weights_read": ["read 'net'", "removed prefix 'module.'"]}
    assert module[0].weight.sum() == 8
    state = load_paper("lenet-300-100", input_size=4)[0].state_dict()
    torch.save({"ema": state}, "l.ckpt")
    assert load_paper("lenet-300-100", "l.ckpt", input_size=4)[1].conversion["weights_read"] == ["read 'ema'"]


def test_another_network_is_refused_with_names_from_the_file():
    foreign = {
        "conv_stem.weight": torch.ones(4, 1, 3, 3),
        "blocks.0.conv_dw.weight": torch.ones(4, 1, 3, 3),
        "fc.weight": MAIN["fc.weight"],
    }
    found = fitting({"state_dict": under("module.", foreign)}, Net())
    with pytest.raises(
        UsageError,
        match="no state_dict of Net: 9 names missing, 2 unknown.*under 'state_dict'.*'conv_stem.weight' and 'blocks",
    ):
        load_strictly(Net(), "Net", found.state, "w.pth", found.label)
    bigger = {**MAIN, "fc.weight": torch.ones(3, 9)}
    with pytest.raises(UsageError, match="0 names missing, 0 unknown, 1 of another shape .first: 'fc.weight'"):
        load_strictly(Net(), "Net", fitting(bigger, Net()).state, "w.pth")
    for content in ({}, {"a": 1}, [MAIN], torch.ones(2), None):
        with pytest.raises(LookupError):
            fitting(content, Net())


def test_a_block_that_fits_is_not_preferred_to_the_whole_of_another_network():
    deeper = {**MAIN, **{f"more.{i}.fc.bias": HEAD["fc.bias"] for i in range(30)}}
    del deeper["fc.weight"]
    found = fitting({"model": {"module." + name: value for name, value in deeper.items()}}, Net())
    assert found.label == "model" and found.missing == ("fc.weight",) and found.problems == 1 + 30


def test_a_file_of_a_sibling_is_named(tmp_path):
    torch.save({"model": under("module.", build("squeezenet1_0", 4).state_dict())}, tmp_path / "s.pth")
    with pytest.raises(UsageError, match="no state_dict of squeezenet1_1, but of squeezenet1_0; give that as ARCH"):
        load_network("squeezenet1_1", str(tmp_path / "s.pth"))
    with pytest.raises(UsageError, match="no state_dict of lenet-300-100"):
        load_network("lenet-300-100", str(tmp_path / "s.pth"))


def test_published_densenets_have_names_of_older_versions():
    module = build("densenet121")
    state = module.state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", name): value for name, value in state.items()}
    assert old.keys() != state.keys()
    found = fitting(old, module)
    assert found.problems == 0 and found.notes == () and all(found.state[name] is state[name] for name in state)


def test_nested_without_end_or_twice_is_read_once():
    loop = {"model": MAIN}
    loop["self"] = loop
    loop["again"] = loop["model"]
    assert is_main(fitting(loop, Net()))
    wide = {}
    for _ in range(60):
        wide = {"a": wide, "b": wide}
    assert Checkpoint.of(wide, SHAPES).tensors == {}


def test_objects_beside_the_weights_are_read_without_their_content(tmp_path):
    deque, counts = collections.deque([1, 2]), collections.defaultdict(list, a=[1])
    args = argparse.Namespace(lr=0.1, path=Path("x"), device=torch.device("cpu"), best=np.float64(1.5))
    content = {"model": MAIN, "args": args, "rng": np.random.get_state(), "a": np.arange(3), "d": deque, "c": counts}
    allowed = set(torch.serialization.get_safe_globals())
    for zipped in (True, False):
        torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
        assert is_main(read_weights(str(tmp_path / "c.pth"), Net()))
        read = read_file(tmp_path / "c.pth")
        assert not hasattr(read["args"], "lr") and read["c"] == {"a": [1]} and read["d"] == [1, 2]
    assert set(torch.serialization.get_safe_globals()) == allowed


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [(os.system, "touch {}", "system"), (eval, "open('{}', 'w')", "eval"), (os.mkdir, "{}", "mkdir")],
)  # fmt: skip
def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path, function, argument, name, zipped):
    mark, path = tmp_path / "mark", tmp_path / "w.pth"
    hostile = Hostile(function, argument.format(mark))
    torch.save({"model": MAIN, "args": hostile}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match=f"names code, '.*{name}', which is never run.*save its weights alone"):
        read_file(path)
    path.write_bytes(pickle.dumps({"model": hostile}, protocol=2 if zipped else 4))
    with pytest.raises(FormatError, match="names code|cannot be read as a state_dict"):
        read_file(path)
    assert not mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_whole_networks_are_refused_with_the_remedy(tmp_path, zipped, nested):
    path = tmp_path / "w.pth"
    torch.save({"model": Net()} if nested else Net(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        FormatError, match=r"names code|holds a whole network.*torch.save\(model.state_dict\(\), FILE\)"
    ):
        read_file(path)
    torch.save(nn.Sequential(nn.Linear(2, 2)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match=r"holds a whole network.*torch.save\(model.state_dict\(\), FILE\)"):
        read_file(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_archives_are_refused_with_the_remedy(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "w.pt")
    with pytest.raises(FormatError, match=r"TorchScript archive.*torch.jit.load\(FILE\).state_dict\(\)"):
        read_file(tmp_path / "w.pt")


def test_damaged_files_and_files_without_tensors_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(MAIN, path)
    whole = path.read_bytes()
    for part in (whole[:100], whole[:-50], b"", b"hello", whole[:300] + bytes(200) + whole[500:]):
        path.write_bytes(part)
        with pytest.raises(FormatError, match="is damaged, or was written neither" if part else "is empty"):
            read_file(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(FormatError, match="holds no state_dict of tensors"):
        read_weights(str(path), Net())
