import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.sparsity.config import ModelConfig, Preprocessing
from dsr_tool.train import TrainSettings, load_data

# Python warns that a process with torch's threads forks; DataLoader does so by design.
forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def config(channels=3, size=8, classes=10, **more):
    return ModelConfig("torchvision", "resnet18", classes, (channels, size, size), **more)


def cpu(**changes):
    return TrainSettings(**{"batch_size": 16, "device": "cpu", **changes})


def labels_of(data, chosen, epoch):
    return torch.cat([labels for _, labels in data.train_batches(chosen, epoch)]).tolist()


@pytest.fixture(scope="module")
def fifty(tmp_path_factory):
    path = tmp_path_factory.mktemp("fifty") / "n.npz"
    x = np.zeros((50, 8, 8), np.uint8)
    np.savez(path, x_train=x, y_train=np.arange(50), x_test=x[:7], y_test=np.arange(7))
    return load_data(f"arrays:{path}", config(classes=50))


@given(seed=st.integers(0, 2**40), epoch=st.integers(1, 1000), batch=st.integers(2, 80))
@settings(max_examples=40, deadline=None)
def test_an_epoch_shows_each_image_once_in_an_order_of_its_own(fifty, seed, epoch, batch):
    chosen = cpu(seed=seed, batch_size=batch)
    order = labels_of(fifty, chosen, epoch)
    assert len(set(order)) == len(order) == (50 // batch * batch if batch <= 50 else 50)
    assert order == labels_of(fifty, chosen, epoch)
    assert order != labels_of(fifty, chosen, epoch + 1) and order != labels_of(fifty, cpu(seed=seed + 1), epoch)


def test_all_test_images_come_in_their_order(fifty, monkeypatch):
    assert [len(labels) for _, labels in fifty.test_batches(cpu(batch_size=3))] == [7]
    monkeypatch.setattr("dsr_tool.train.data._TEST_VALUES", {"cpu": 0})
    batches = list(fifty.test_batches(cpu(batch_size=3)))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(7))


@forks
@pytest.mark.parametrize("augment", ["none", "shift", "crop-flip", "imagenet"])
def test_workers_change_nothing(augment):
    data = load_data("digits", config())
    alone, helped = (next(iter(data.train_batches(cpu(augment=augment, workers=workers), 3))) for workers in (0, 1))
    assert torch.equal(alone[0], helped[0]) and torch.equal(alone[1], helped[1])


@pytest.mark.parametrize("augment", ["shift", "crop-flip", "imagenet"])
def test_every_image_gets_its_own_augmentation(tmp_path, arrays, augment):
    picture = np.random.default_rng(0).integers(1, 256, (1, 16, 16, 3), dtype=np.uint8).repeat(64, 0)
    path = arrays(tmp_path / "same.npz", x_train=picture, y_train=np.zeros(64, int))
    data = load_data(f"arrays:{path}", config(size=16))
    inputs, _ = next(data.train_batches(cpu(batch_size=64, augment=augment), 1))
    assert inputs.shape == (64, 3, 16, 16) and len(torch.unique(inputs, dim=0)) > 15
    plain, _ = next(data.train_batches(cpu(batch_size=64, augment="none"), 1))
    assert len(torch.unique(plain, dim=0)) == 1


@pytest.mark.parametrize("size", [8, 16, 20])
def test_evaluation_sees_the_pixels_that_pillow_decodes(size):
    data = load_data("digits", config(size=size))
    inputs, _ = next(data.test_batches(cpu()))
    wanted = data.describe(config(size=size)).preprocessing
    for image, found in zip(data.dataset.test.images, inputs, strict=False):
        picture = Image.fromarray(image[0].numpy()).convert("RGB").resize((size, size), Image.BILINEAR)
        expected = (np.asarray(picture) / 255 - wanted.mean) / wanted.std
        # One level of 255 between two implementations of the same filter.
        assert np.abs(expected.transpose(2, 0, 1) - found.numpy()).max() < 1.01 / 255 / wanted.std[0]


def test_splits_too_large_to_resize_at_once_are_resized_by_batch(monkeypatch):
    once, each = load_data("digits", config(size=20)), load_data("digits", config(size=20))
    chosen = cpu(augment="crop-flip")
    first = next(once.train_batches(chosen, 2))
    monkeypatch.setattr("dsr_tool.train.loading._FITTED_BYTES", 0)
    second = next(each.train_batches(chosen, 2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_photographs_are_resized_and_cropped_by_the_models_preprocessing(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        picture = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
        for name in "xy":
            Image.fromarray(picture).save(tmp_path / part / "a" / f"{name}.png")
    own = Preprocessing(20, 16, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "bilinear")
    data = load_data(f"images:{tmp_path}", config(size=16, preprocessing=own))
    assert data.preprocessing == own
    inputs, _ = next(data.test_batches(cpu(workers=0)))
    resized = Image.fromarray(picture).resize((33, 20), Image.BILINEAR).crop((8, 2, 24, 18))
    expected = (np.asarray(resized) / 255 - own.mean) / own.std
    assert np.abs(expected.transpose(2, 0, 1) - inputs[0].numpy()).max() < 1e-5
    other = load_data(f"images:{tmp_path}", config(size=112, preprocessing=own)).preprocessing
    assert (other.resize, other.crop) == (128, 112)


def test_normalisation_is_that_of_the_data(tmp_path, arrays):
    x = np.random.default_rng(0).random((300, 8, 8, 3)) * [1.0, 0.5, 0.1]
    path = arrays(tmp_path / "f.npz", x_train=x, y_train=np.zeros(300, int))
    data = load_data(f"arrays:{path}", config())
    assert data.preprocessing.mean == pytest.approx(x.mean((0, 1, 2)), abs=1e-4)
    assert data.preprocessing.std == pytest.approx(x.std((0, 1, 2)), abs=1e-4)
    flat = arrays(tmp_path / "c.npz", x_train=np.zeros((20, 8, 8, 3)))
    assert load_data(f"arrays:{flat}", config()).preprocessing.std == (1.0, 1.0, 1.0)


def test_class_names_are_those_of_the_data():
    data = load_data("digits", config())
    assert data.describe(config()).labels == tuple("0123456789")
    assert data.describe(config(classes=12, labels=("x",) * 12)).labels == tuple("0123456789")


@pytest.mark.parametrize(
    ("spec", "model", "message"),
    [
        ("digits", config(classes=4), "data has 10 classes, but the model has 4 outputs; .* --num-classes 10"),
        ("digits", ModelConfig("module", "Net"), "is not .channels, height, width."),
        ("digits", ModelConfig("module", "Net", 10, (3, 8, 16)), "only square inputs are resized to"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(spec, model, message):
    with pytest.raises(UsageError, match=message):
        load_data(spec, model)


def test_colour_images_are_refused_by_a_grey_model(tmp_path, arrays):
    with pytest.raises(UsageError, match="data has 3 channels, but the model has 1"):
        load_data(f"arrays:{arrays(tmp_path / 'a.npz')}", config(channels=1))


@forks
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_photograph_is_named_in_one_sentence(tmp_path, workers):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        for name in "xy":
            (tmp_path / part / "a" / f"{name}.png").write_bytes(b"no picture")
    data = load_data(f"images:{tmp_path}", config())
    with pytest.raises(FormatError, match=r"image '.*png' cannot be read") as caught:
        next(data.train_batches(cpu(workers=workers), 1))
    assert "\n" not in str(caught.value)
