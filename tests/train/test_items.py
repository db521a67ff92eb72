"""--data module:callable: any pair of torch Datasets, checked as it is read, and the same after a resume."""

import itertools
import json
import random
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from converters.loading import load
from dsr_tool.errors import DsrError, FormatError, UsageError
from dsr_tool.sparsity.config import Preprocessing
from dsr_tool.train import RunFolder, load_data, train, train_in_folder
from dsr_tool.train import ranks as ranks_module
from dsr_tool.train.datasets import data_name, names_code, open_dataset
from dsr_tool.train.items import every_fifth, open_items

COUNTER = itertools.count()

CODE = """
import random
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, random_split

class Own(Dataset):
    def __init__(self, count, start=0, kind=torch.uint8, noise=False):
        self.count, self.start, self.kind, self.noise = count, start, kind, noise
    def __len__(self):
        return self.count
    def __getitem__(self, row):
        if row >= self.count:
            raise IndexError
        made = torch.Generator().manual_seed(self.start + row)
        image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=made)
        label = (self.start + row) % 4
        image = image if self.kind == torch.uint8 else image.to(self.kind) / 128 - 1
        if self.noise:
            image = image + torch.rand(1) + random.random() + np.random.rand()
        return image, label

class Listed(Own):
    classes = ["ant", "bee", "cat", "dog"]
    reads = 0
    @property
    def targets(self):
        return [(self.start + row) % 4 for row in range(self.count)]
    def __getitem__(self, row):
        Listed.reads += 1
        return super().__getitem__(row)

def uint8():
    return Own(40), Own(20, 1000)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Returns a function that writes a module with a function `make`, and returns its name as `--data` has it."""
    monkeypatch.chdir(tmp_path)

    def write(body="return uint8()", more=""):
        name = f"own_data_{next(COUNTER)}"
        text = f"{CODE}\n{textwrap.dedent(more)}\ndef make():\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        Path(f"{name}.py").write_text(text)
        return f"{name}:make"

    return write


def module_of(spec):
    return sys.modules[spec.partition(":")[0]]


def batches(tiny, data, epoch=1, **settings):
    return list(data.train_batches(tiny.settings(batch_size=10, workers=0, **settings), epoch))


def test_pictures_get_the_preprocessing_of_the_model(tiny, own):
    spec = own()
    model = tiny.model()
    data = load_data(spec, model.config)
    assert data.sizes == {"train_images": 40, "test_images": 20, "classes": 4} and data.dataset.augment == "none"
    wanted = model.config.preprocessing
    assert (data.preprocessing.mean, data.preprocessing.std) == (wanted.mean, wanted.std)
    seen = {}
    for images, labels in batches(tiny, data):
        for image, label in zip(images, labels, strict=True):
            seen.setdefault(int(label), []).append(image)
    source, _ = module_of(spec).make()
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (wanted.mean, wanted.std))
    expected = [(source[row][0].float() / 255 - mean) / std for row in range(0, 40, 4)]
    assert sorted(image.sum().item() for image in seen[0]) == pytest.approx(sorted(x.sum().item() for x in expected))


def test_floats_are_inputs_as_they_are(tiny, own):
    spec = own("return Own(40, kind=torch.float64), Own(20, 1000, torch.float64)")
    data = load_data(spec, tiny.model().config)
    assert data.preprocessing == Preprocessing(8, 8, (0.0,) * 3, (1.0,) * 3, "bilinear")
    inputs = torch.cat([images for images, _ in batches(tiny, data)])
    source, _ = module_of(spec).make()
    expected = torch.stack([source[row][0].float() for row in range(40)])
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs.flatten(1).sum(1).sort().values, expected.flatten(1).sum(1).sort().values)


def test_labels_and_names_come_from_targets_without_reading_all_items(own):
    spec = own("return Listed(40), Listed(20, 1000)")
    data = open_dataset(spec, (3, 8, 8))
    assert data.classes == ("ant", "bee", "cat", "dog") and module_of(spec).Listed.reads == 1
    assert data.train.labels.tolist() == [row % 4 for row in range(40)]
    part = open_dataset(own("return Subset(Listed(40), [5, 3, 9]), Subset(Listed(40), [2])"), (3, 8, 8))
    assert part.train.labels.tolist() == [1, 3, 1] and part.classes == data.classes


def test_the_number_of_classes_may_follow(own):
    assert open_dataset(own(), ()).num_classes == 4
    assert open_dataset(own("return *uint8(), 7"), ()).num_classes == 7
    with pytest.raises(
        FormatError, match="training data .* has label 3, which is none of 3 classes; give labels from 0"
    ):
        open_dataset(own("return *uint8(), 3"), ())


def test_one_dataset_is_split_as_digits_are(own):
    data = open_dataset(own("return Own(43)"), ())
    labels = torch.tensor([row % 4 for row in range(43)])
    test = every_fifth(labels)
    assert test.nonzero().flatten().tolist() == [16, 17, 18, 19, 36, 37, 38, 39]
    assert torch.equal(data.test.labels, labels[test]) and torch.equal(data.train.labels, labels[~test])
    assert torch.equal(data.test.read(4), data.test.source[36][0])
    assert open_dataset(own("return Own(43), 9"), ()).num_classes == 9
    digits = open_dataset("digits", ())
    both = torch.nn.functional.one_hot(torch.cat([digits.train.labels, digits.test.labels]))
    assert (both.sum(0) // 5).tolist() == digits.test.labels.bincount().tolist()


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("raise KeyError('x')", UsageError, "failed when it was called without arguments .KeyError: 'x'."),
        ("return 3", UsageError, "returned int; expected a torch Dataset to train on and one to test on"),
        ("return ()", UsageError, "returned nothing; expected"),
        ("return Own(4), [1, 2]", UsageError, "returned Own, list; expected"),
        ("return Own(4), Own(4), Own(4)", UsageError, "returned Own, Own, Own; expected"),
        ("return Own(4), Own(4), True", UsageError, "returned Own, Own, bool; expected"),
        ("return Own(4), Own(4), 0", UsageError, "returned 0 classes; give 1 or more"),
        ("return Own(4), Own(0)", UsageError, "returned Own without items; give some"),
        ("return Own(3)", UsageError, "held-out data .* has no item; give some to train on"),
        (
            "return type('Stream', (IterableDataset,), {'__iter__': iter})(), Own(4)",
            UsageError,
            "returned Stream, a Dataset without a",
        ),
        (
            "return Own(4), changed(0, lambda x, y: x)",
            FormatError,
            "item 0 of the held-out data .* is Tensor, expected a",
        ),
        ("return Own(4), changed(2, lambda x, y: (x, y, 1))", FormatError, "item 2 .* is tuple, expected a pair"),
        ("return Own(4), changed(1, lambda x, y: ('x.png', y))", FormatError, "has str in place of a tensor; give the"),
        ("return changed(1, lambda x, y: (x.int(), y)), Own(4)", FormatError, "has type torch.int32; give uint8"),
        ("return changed(1, lambda x, y: (x, 1.5)), Own(4)", FormatError, "has label 1.5, expected a class number"),
        ("return changed(1, lambda x, y: (x, True)), Own(4)", FormatError, "has label True, expected"),
        ("return changed(1, lambda x, y: (x, -1)), Own(4)", FormatError, "has label -1, which is none of 4 classes"),
        ("return changed(1, lambda x, y: (x, -1))", FormatError, "training data .* has label -1, which is none of 4"),
        ("return changed(1, lambda x, y: (x, 2**40)), 4", FormatError, "has label 1099511627776, which is none of 4"),
        ("return changed(1, lambda x, y: (x, 2**70)), Own(4)", FormatError, "has label 118.*, expected a class number"),
        ("return changed(3, lambda x, y: 1 / 0), Own(4)", FormatError, "item 3 .* failed .ZeroDivisionError: division"),
    ],
)
def test_what_is_no_data_is_one_sentence(own, body, error, message):
    more = """
    class Changed(Own):
        def __getitem__(self, row):
            x, y = super().__getitem__(row)
            return self.change(x, y) if row == self.where else (x, y)
    def changed(where, change):
        made = Changed(4)
        made.where, made.change = where, change
        return made
    """
    with pytest.raises(error, match=message) as caught:
        open_dataset(own(body, more), (3, 8, 8))
    assert "\n" not in str(caught.value)


def test_names_that_are_no_callable_are_refused(own):
    spec = own()
    module = spec.partition(":")[0]
    for name, message in (
        ("no_such_module_here:make", "module 'no_such_module_here' of .* cannot be imported"),
        (f"{module}:mak", "callable of .* is unknown; did you mean make"),
        (f"{module}:CODE", "is unknown"),
        ("math:pi", "'math:pi' is float, expected a function or class that makes torch Datasets"),
        ("cifar:root", "--data 'cifar' is unknown; did you mean cifar10 or cifar100"),
        ("fashon-mnist:root", "--data 'fashon-mnist' is unknown"),
    ):
        with pytest.raises(UsageError, match=message):
            open_dataset(name, (3, 8, 8))
    # A package of the current directory may be named nearly as data are.
    Path("image").mkdir()
    with pytest.raises(UsageError, match="--data 'image' is unknown; did you mean images"):
        open_dataset("image:root", (3, 8, 8))
    Path("image/sets.py").write_text("made = 3")
    with pytest.raises(UsageError, match="'image.sets:made' is int, expected a function"):
        open_dataset("image.sets:made", (3, 8, 8))
    assert names_code(spec) and not names_code("digits") and not names_code("images:root") and not names_code("mnist:x")
    assert data_name(spec) == spec and data_name("images:/a/b") == "images"


class Changing(Dataset):
    """Lists its labels, and gives other items afterwards."""

    def __init__(self):
        self.shape, self.shift, self.targets, self.kind = (3, 8, 8), 0, [0, 1, 2, 3] * 5, torch.uint8

    def __len__(self):
        return 20

    def __getitem__(self, row):
        return torch.zeros(self.shape if row == 7 else (3, 8, 8)).to(self.kind), (row + self.shift) % 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (3, 9, 8)}, r"item 7 of .* has shape \[3, 9, 8\] and type torch.uint8, and others have \[3, 8, 8\]"),
        ({"kind": torch.float32}, r"has shape \[3, 8, 8\] and type torch.float32, and others have .* torch.uint8"),
        ({"shift": 1}, "has label .*, and had .* when the training started or in `targets`; a label must not change"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_items_that_differ_while_they_are_read_end_the_training_in_a_sentence(
    tiny, monkeypatch, change, message, workers
):
    changing = Changing()
    monkeypatch.setattr("dsr_tool.train.items.call", lambda name, makes: (changing, Changing()))
    data = load_data("own:make", tiny.model().config)
    for name, value in change.items():
        setattr(changing, name, value)
    with pytest.raises(FormatError, match=message):
        list(data.train_batches(tiny.settings(batch_size=10, workers=workers), 1))


def test_tensors_of_another_shape_than_the_input_are_refused(tiny, monkeypatch):
    wide = TensorDataset(torch.zeros(8, 3, 8, 9), torch.arange(8) % 2)
    monkeypatch.setattr("dsr_tool.train.items.call", lambda name, makes: (wide, wide))
    with pytest.raises(UsageError, match=r"have shape \[3, 8, 9\], and the model's input has \[3, 8, 8\]; transform"):
        load_data("own:make", tiny.model().config)


NOISE = "return Own(40, kind=torch.float32, noise=True), Own(20, 1000, torch.float32)"


def test_randomness_of_items_follows_from_seed_and_epoch_alone(tiny, own):
    data = load_data(own(NOISE), tiny.model().config)
    sums = []
    for epoch, workers in ((1, 0), (2, 0), (1, 2)):
        random.seed(epoch * workers)
        np.random.seed(epoch * workers)
        torch.manual_seed(epoch * workers)
        before = (random.getstate(), torch.get_rng_state())
        settings = tiny.settings(batch_size=10, workers=workers)
        sums.append(torch.cat([images for images, _ in data.train_batches(settings, epoch)]))
        assert random.getstate() == before[0]
    assert torch.equal(sums[0], sums[2]) and not torch.equal(sums[0], sums[1])


def in_folder(tiny, folder, spec, *, pause=False, **given):
    run = RunFolder(folder, resume=True)
    model = load(folder, tiny.module()) if run.stopped else tiny.model()
    given = {"epochs": 3, "batch_size": 10, "every": 1, "device": "cpu", "workers": 0, **given}
    deadline = 0.0 if pause else float("inf")
    data = load_data(spec, model.config)
    return train_in_folder(run, model, data, given, facts={"data": spec}, quiet=True, deadline=deadline)


def test_a_run_on_own_data_resumes_bit_for_bit(tiny, own, tmp_path):
    spec = own(NOISE)
    in_folder(tiny, tmp_path / "whole", spec, class_weights="balanced")
    for _ in range(3):
        in_folder(tiny, tmp_path / "cut", spec, pause=True, class_weights="balanced")
    for name in ("model.safetensors", "masks.safetensors", "settings.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    facts = json.loads((tmp_path / "whole" / "settings.json").read_text())
    assert facts["data"] == spec and len(facts["data_sha256"]) == 64


def test_another_split_is_noticed_before_a_resume(tiny, own, tmp_path):
    spec = own("return random_split(Own(60), [40, 20])")
    assert open_items(spec).checksum == open_items(spec).checksum  # torch's generator is seeded for the callable
    in_folder(tiny, tmp_path / "run", spec, pause=True)
    module = module_of(spec)
    module.make = lambda: (Subset(module.Own(60), range(40)), Subset(module.Own(60), range(40, 60)))
    with pytest.raises(UsageError, match="was started with other labels or another split of its --data"):
        in_folder(tiny, tmp_path / "run", spec)


def test_processes_with_other_data_are_refused(tiny, own, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks_module.Ranks, "agree", lambda ranks, tensors: False)
    with pytest.raises(DsrError, match="the labels or the split of --data differ between the processes"):
        in_folder(tiny, tmp_path / "run", own())


@pytest.mark.slow
def test_two_processes_share_own_data_with_weights_and_one_writes_the_logs(own, launch):
    more = "uneven = [0] * 37 + [1] * 6 + [2, 3] * 2 + [3]"
    spec = own(
        "return TensorDataset((torch.rand(48, 3, 8, 8) * 255).byte(), torch.tensor(uneven)), Own(20, 1000)", more
    )
    settings = {"epochs": 1, "lr": 0.01, "augment": "none", "workers": 0, "class_weights": "balanced"}
    one, two = (
        launch(count, f"of-{count}", data=spec, settings=settings, log="tensorboard" if count == 2 else None)
        for count in (1, 2)
    )
    assert two.epochs[0]["train_loss"] == pytest.approx(one.epochs[0]["train_loss"], rel=1e-4)
    for name, value in one.states[0].items():
        assert torch.allclose(value.float(), two.states[1][name].float(), atol=1e-4), name
    assert len(list((two.folder / "run" / "tensorboard").iterdir())) == 1
    assert (two.folder / "run" / "log.csv").read_text().count("\n") == 2


def test_every_augmentation_works_on_own_pictures(tiny, own):
    data = load_data(own(), tiny.model().config)
    for augment in ("shift", "crop-flip", "imagenet"):
        result = train(tiny.model(), data, tiny.settings(augment=augment, batch_size=10, workers=0, epochs=1))
        assert result.last.step == 4


def test_the_commands_take_own_data(own, tmp_path, run):
    from converters.conversion import convert

    spec = own("return [TensorDataset(torch.rand(n, 1, 8, 8), torch.arange(n) % 10) for n in (40, 20)]")
    convert("lenet-300-100", sparsity=0.9, input_size=8, seed=3).save(tmp_path / "net")
    code, out, err = run("train", "net", "-o", "run", "--data", spec, "--epochs", 1, "--workers", 0, "--json", "-q")
    assert code == 0 and json.loads(out)["steps"] == 1, err
    code, _, err = run("train", "--config", "run/settings.json", "-o", "again", "-q")
    assert code == 2 and f"has data '{spec}', code that no file may name to be run" in err
    assert run("train", "--config", "run/settings.json", "-o", "again", "-q", "--data", spec)[0] == 0
    assert Path("run/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_the_examples_of_the_page_run(tmp_path, run, monkeypatch):
    from converters.conversion import convert

    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")
    python, toml = (re.search(rf"```{kind}\n(.*?)```", page, re.S)[1] for kind in ("python", "toml"))
    Path("my_data.py").write_text(python)
    Path("c.toml").write_text(toml.replace("images:photos", "digits").replace("epochs = 20", "epochs = 1"))
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    convert("lenet-300-100", sparsity=0.9, input_size=8, seed=3).save(tmp_path / "MODEL")
    code, _, err = run("train", "MODEL", "-o", "RUN", "--data", "my_data:make", "--epochs", 1, "--workers", 0, "-q")
    assert code == 0, err
    assert run("train", "--config", "c.toml", "-o", "OTHER", "-q")[0] == 0 and Path("OTHER/tensorboard").is_dir()
    head = Path("RUN/log.csv").read_text().splitlines()[0].split(",")
    told = re.findall(r"^\| (`[a-z_`, ]+`) \|", page[page.index("The columns of") :], re.M)
    assert [name for cell in told for name in re.findall(r"`(\w+)`", cell)] == head


def test_a_grid_may_not_name_code_alone(own, run):
    spec = own("return [TensorDataset(torch.rand(n, 1, 28, 28), torch.arange(n) % 10) for n in (40, 20)]")
    lines = ['recipe = "lenet-300-100"', 'methods = ["static"]', "sparsity = [0.9]", f'data = "{spec}"']
    Path("grid.toml").write_text("\n".join([*lines, "set = { epochs = 1, workers = 0 }"]))
    code, _, err = run("compare", "grid.toml", "-o", "grid", "-q")
    assert code == 2 and f"code that no file may name to be run; if you trust it, give --data {spec} yourself" in err
    assert not Path("grid").exists()
    code, _, err = run("compare", "grid.toml", "-o", "grid", "-q", "--data", spec)
    assert code == 0, err
    (facts,) = [json.loads(file.read_text()) for file in Path("grid/runs").glob("*/settings.json")]
    assert facts["data"] == spec
    code, _, err = run("compare", "-o", "grid", "-q")
    assert code == 2 and "code that no file may name" in err
    assert run("compare", "-o", "grid", "-q", "--data", spec)[0] == 0
