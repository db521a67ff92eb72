import decimal
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.errors import UsageError
from dsr_tool.sparsity.budget import Budget


@pytest.mark.parametrize(
    ("sparsity", "prunable", "active"),
    [
        (0.9, 1000, 100),
        (0.9, 11_678_912, 1_167_891),
        ("0.9", 25_502_912, 2_550_291),
        (0, 7, 7),
        (0.5, 3, 2),
        (0.1, 10, 9),
    ],
)
def test_a_sparsity_counts_as_the_decimal_fraction_that_was_written(sparsity, prunable, active):
    assert Budget.of_sparsity(sparsity).active_weights(prunable, 99, 1) == active


@pytest.mark.parametrize("sparsity", [1, -0.1, 1.5, "1/0", "many", math.nan, math.inf])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(UsageError, match="fraction of zeros"):
        Budget.of_sparsity(sparsity)


def test_a_sparsity_that_would_empty_layers_names_the_highest_reachable_one():
    with pytest.raises(UsageError, match=r"highest reachable sparsity is 0\.9\."):
        Budget.of_sparsity(0.95).active_weights(100, 0, 10)


@pytest.mark.parametrize(("text", "parameters"), [("5.1Mparams", 5_100_000), ("300kparams", 300_000), ("7params", 7)])
def test_parameter_budgets(text, parameters):
    assert Budget.parse(text).active_weights(10**9, 3, 1) == parameters - 3


NOT_UNDERSTOOD = [
    *(
        "12",
        "1/0",
        "1.5Xparams",
        "params",
        "-3Mparams",
        "1e3params",
        "",
        "12 M B",
        "12MiBs",
        "0.8GMACss",
    ),
    *("0x10MB", "\u0661MB", "1_000kB", "12MB.", ".5MB", "5.MB", "9" * 5000 + "MB", "nanMB", "infMB"),
]


@pytest.mark.parametrize("text", NOT_UNDERSTOOD)
def test_texts_that_are_not_budgets_are_refused_with_examples(text):
    with pytest.raises(UsageError, match="5.1Mparams, 12MB, 12MiB, 300kB or 0.8GMACs"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "meant"), [("12mb", "12MB"), ("12KB", "12kB"), ("12 mIb", "12MiB"), ("0.5Mparam", "0.5Mparams")]
)
def test_a_unit_in_another_case_is_suggested_and_not_accepted(text, meant):
    with pytest.raises(UsageError, match=f"did you mean {meant}\\?"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0MB", "0.0params", "0.9B", "0.0001kMACs"])
def test_a_budget_of_nothing_is_refused_before_anything_is_computed(text):
    with pytest.raises(UsageError, match="allows nothing"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("12MB", "bytes", 12_000_000),
        ("12MiB", "bytes", 12 * 2**20),
        ("12 MB", "bytes", 12_000_000),
        ("300kB", "bytes", 300_000),
        ("1.5GiB", "bytes", 3 * 2**29),
        ("1234B", "bytes", 1234),
        ("0.8GMACs", "macs", 800_000_000),
        ("0.8GMAC", "macs", 800_000_000),
        ("5.1Mparams", "parameters", 5_100_000),
        # In binary floating point, 1.001 * 10^6 and 4.35 * 100 fall short.
        ("1.001MB", "bytes", 1_001_000),
        ("0.00435kB", "bytes", 4),
        ("1.1KiB", "bytes", 1126),
    ],
)
def test_every_unit_is_exact(text, kind, amount):
    budget = Budget.parse(text)
    assert (budget.kind, budget.amount, getattr(budget, kind)) == (kind, amount, amount)


@given(st.integers(0, 10**12), st.sampled_from(["kB", "MB", "GB", "KiB", "MiB", "GiB"]))
def test_a_shown_amount_is_close_and_its_rounded_bounds_enclose_it(amount, unit):
    budget = Budget(bytes=1, unit=unit)
    factor = {"k": 1000, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[unit[:-1]]
    shown, low, high = (
        float(budget.show(amount, rounding).removesuffix(f" {unit}").replace(",", "")) * factor
        for rounding in (decimal.ROUND_HALF_EVEN, decimal.ROUND_FLOOR, decimal.ROUND_CEILING)
    )
    assert low <= amount * (1 + 1e-12)
    assert high >= amount * (1 - 1e-12)
    assert shown == pytest.approx(amount, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "amount", "shown"),
    [
        ("12MB", 11_840_123, "11.84 MB"),
        ("12MB", 12_000_000, "12.00 MB"),
        ("12MB", 43_112, "0.04311 MB"),
        ("12MB", 0, "0.000 MB"),
        ("300kB", 1_234_567_890, "1,234,568 kB"),
        ("9B", 1_234, "1,234 B"),
    ],
)
def test_amounts_are_shown_in_the_unit_of_the_budget(text, amount, shown):
    assert Budget.parse(text).show(amount) == shown


@pytest.mark.parametrize("text", ["12MB", "12MiB", "7B"])
def test_a_budget_in_bytes_comes_back_from_the_record(text):
    assert Budget.of_record(Budget.parse(text).to_record()) == Budget.parse(text)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"sparsity": 0.9},
        {"budget_parameters": 7, "budget_unit": "params"},
        {"budget_bytes": "12", "budget_unit": "MB"},
        {"budget_bytes": True, "budget_unit": "MB"},
        {"budget_bytes": -1, "budget_unit": "MB"},
        {"budget_bytes": 12, "budget_unit": "Mparams"},
        {"budget_bytes": 12, "budget_unit": ["MB"]},
        {"budget_bytes": 12},
    ],
)
def test_records_without_a_valid_budget_in_bytes_return_none(record):
    assert Budget.of_record(record) is None


def test_active_weights_of_a_budget_in_bytes_need_the_model():
    with pytest.raises(UsageError, match="depends on the model"):
        Budget.parse("12MB").active_weights(100, 50, 2)


def test_a_parameter_budget_out_of_range_names_the_range():
    with pytest.raises(UsageError, match="from 52 .* to 150"):
        Budget.parse("1kparams").active_weights(100, 50, 2)
