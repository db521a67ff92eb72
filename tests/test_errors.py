"""Messages of errors: one printable line whatever a file holds, and close names for an unknown one."""

import hypothesis
import pytest
from hypothesis import strategies

from dsr_tool.errors import FormatError, closest, first_few, unknown_name


@pytest.mark.parametrize("cited", ["x" * 10**6, "two\nlines", "\u2028", "\x1b[2J", "\ud800", "\u202e"])
def test_a_format_error_is_one_printable_line(cited):
    message = str(FormatError(f"'net.dsr' is damaged: {cited}; fetch a whole copy."))
    assert message.startswith("'net.dsr' is damaged: ")
    assert message.endswith("; fetch a whole copy.")
    assert len(message) < 500
    assert message.isprintable()


def test_an_unknown_name_may_be_long():
    assert len(str(unknown_name("mode", "x" * 10**7, ("linear", "nearest")))) < 200


def test_a_list_shows_its_first_words_and_that_there_are_more():
    assert (first_few([]), first_few(["a"]), first_few(list("abc"))) == ("", "a", "a, b, c")
    assert first_few(list("abcd")) == "a, b, c, ..."
    assert first_few(list("abcde"), 2, counted=True) == "a, b and 3 more"
    assert first_few(["a", "b"], 2, counted=True) == "a, b"


METHODS = ("dsr", "static", "dense", "set", "deepr", "rigl", "gmp", "dst", "tied", "neuron-set")
NETWORKS = ("alexnet", "googlenet", "densenet121", "lenet-300-100", "mobilenet_v2", "mobilenet_v3_large", "mnasnet1_0")
NETWORKS += ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "inception_v3", "vgg16", "vgg19")
OPTIONS = ("input_size", "batch_size", "temperature", "epochs", "warmup_epochs", "lr", "l1", "drop_fraction", "stop")
FILES = ("archive", "onnx", "csr", "safetensors", "state-dict")
TEXTS = strategies.text("abcABC1-_. é\n", max_size=12)


@pytest.mark.parametrize(
    ("typed", "known", "first"),
    [
        ("drs", METHODS, "dst"),
        ("rgil", METHODS, "rigl"),
        ("dens", METHODS, "dense"),
        ("resent50", NETWORKS, "resnet50"),
        ("mobilnet", NETWORKS, "mobilenet_v2"),
        ("xception", NETWORKS, "inception_v3"),
        ("onix", FILES, "onnx"),
        ("size", OPTIONS, "input_size"),
    ],
)
def test_close_names_are_suggested(typed, known, first):
    close = closest(typed, known)
    assert close[0] == first and len(close) <= 3
    assert str(unknown_name("it", typed, known)) == f"it {typed!r} is unknown; did you mean {' or '.join(close)}?"


@pytest.mark.parametrize(
    ("typed", "known", "meant"),
    [
        ("DSR", METHODS, "dsr"),
        ("neuron_set", METHODS, "neuron-set"),
        ("resnet_18", NETWORKS, "resnet18"),
        ("ResNet-50", NETWORKS, "resnet50"),
        ("statedict", FILES, "state-dict"),
        ("train.batch-size", [f"train.{name}" for name in OPTIONS], "train.batch_size"),
    ],
)
def test_case_and_separators_do_not_count(typed, known, meant):
    assert closest(typed, known)[0] == meant


@pytest.mark.parametrize(
    ("typed", "known"),
    [("tree", METHODS), ("x", METHODS), ("", METHODS), ("unet", NETWORKS), ("rate", OPTIONS), ("linear", ("step",))],
)
def test_without_a_close_name_all_names_are_listed(typed, known):
    assert closest(typed, known) == []
    names = ", ".join(sorted(known))
    assert str(unknown_name("it", typed, known)) == f"it {typed!r} is unknown; known names: {names}."


def test_too_many_names_to_list_are_counted():
    message = str(unknown_name("it", "zzz", [f"a{i:02}" for i in range(31)]))
    assert message == "it 'zzz' is unknown; there are 31 known names, a00 to a30."


def test_names_that_differ_in_separators_alone_are_both_suggested():
    assert closest("a.b", ["a-b", "a_b"]) == ["a-b", "a_b"]


@hypothesis.given(TEXTS, strategies.lists(TEXTS, max_size=8, unique=True))
def test_any_text_gives_at_most_three_known_names(typed, known):
    close = closest(typed, known)
    assert set(close) <= set(known) and len(close) <= 3
