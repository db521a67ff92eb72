"""What messages of errors look like, whatever a file says."""

import hypothesis
import pytest
from hypothesis import strategies

from dsr_tool.errors import FormatError, closest, unknown_name


@pytest.mark.parametrize("cited", ["x" * 10**6, "two\nlines", "\u2028", "\x1b[2J", "\ud800", "\u202e"])
def test_a_format_error_is_one_printable_line(cited):
    message = str(FormatError(f"'net.dsr' is damaged: {cited}; fetch a whole copy."))
    assert message.startswith("'net.dsr' is damaged: ")
    assert message.endswith("; fetch a whole copy.")
    assert len(message) < 500
    assert message.isprintable()


def test_an_unknown_name_may_be_long():
    assert len(str(unknown_name("mode", "x" * 10**7, ("linear", "nearest")))) < 200


METHODS = ("dsr", "static", "dense", "set", "deepr", "rigl", "gmp", "dst", "tied", "neuron-set")
NETWORKS = ("alexnet", "googlenet", "densenet121", "lenet-300-100", "mobilenet_v2", "mobilenet_v3_large", "mnasnet1_0")
NETWORKS += ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "inception_v3", "vgg16", "vgg19")
OTHERS = ("input_size", "batch_size", "temperature", "epochs", "warmup_epochs", "lr", "l1", "drop_fraction", "stop")
DEVICES, FILES = ("auto", "cpu", "cuda"), ("archive", "onnx", "csr", "safetensors", "state-dict")
TEXTS = strategies.text("abcABC1-_. é\n", max_size=12)


@pytest.mark.parametrize(
    ("typed", "known", "meant"),
    [
        ("drs", METHODS, ["dsr"]),  # letters swapped
        ("rgil", METHODS, ["rigl"]),
        ("resent50", NETWORKS, ["resnet50"]),
        ("rigel", METHODS, ["rigl"]),  # one too many
        ("dens", METHODS, ["dense"]),  # some missing
        ("resnt50", NETWORKS, ["resnet50"]),
        ("mobilnet", NETWORKS, ["mobilenet_v2", "mobilenet_v3_large"]),
        ("xception", NETWORKS, ["inception_v3"]),
        ("vgg18", NETWORKS, ["vgg16", "vgg19"]),  # one wrong
        ("onix", FILES, ["onnx"]),
        ("cpi", DEVICES, ["cpu"]),
        ("DSR", METHODS, ["dsr"]),  # written otherwise
        ("neuron_set", METHODS, ["neuron-set"]),
        ("ResNet-50", NETWORKS, ["resnet50"]),
        ("statedict", FILES, ["state-dict"]),
        ("resnet", NETWORKS, ["resnet18", "resnet34", "resnet50"]),  # begins like it
        ("lenet", NETWORKS, ["lenet-300-100"]),
        ("lenet5", NETWORKS, ["lenet-300-100"]),
        ("size", OTHERS, ["batch_size", "input_size"]),  # is in it
        ("train.batch-size", [f"train.{name}" for name in OTHERS], ["train.batch_size"]),
    ],
)
def test_what_was_meant_is_offered(typed, known, meant):
    assert closest(typed, known) == meant
    assert str(unknown_name("it", typed, known)) == f"it {typed!r} is unknown; did you mean {' or '.join(meant)}?"


@pytest.mark.parametrize(
    ("typed", "known"),
    [
        ("tree", METHODS),
        ("sgd", METHODS),
        ("re", METHODS),
        ("x", METHODS),
        ("", METHODS),
        ("net", NETWORKS),
        ("unet", NETWORKS),
        ("test", NETWORKS),
        ("gpu", DEVICES),
        ("dsr", FILES),
        ("rate", OTHERS),
        ("nesterov", OTHERS),
        ("l2", OTHERS),
        ("train.foo", [f"train.{name}" for name in OTHERS]),
        ("linear", ("cosine", "step")),
    ],
)
def test_strangers_are_not(typed, known):
    assert closest(typed, known) == []
    assert str(unknown_name("it", typed, known)).startswith(f"it {typed!r} is unknown; known names: ")


@hypothesis.given(TEXTS, strategies.lists(TEXTS, max_size=8))
def test_any_text_may_be_typed(typed, known):
    offered = closest(typed, known)
    assert set(offered) <= set(known) and len(offered) <= 3
