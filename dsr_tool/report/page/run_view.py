"""Sections of a run: accuracy, loss, reallocations, and density by layer over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from dsr_tool.report.page import numbers
from dsr_tool.report.page.axes import Tick, prefixes
from dsr_tool.report.page.charts import Series, columns
from dsr_tool.report.page.lines import lines
from dsr_tool.report.page.mask_pictures import heat_map
from dsr_tool.report.page.parts import Figure, Heat, Key, Number, Section, Table
from dsr_tool.report.runlog import Epoch, RunLog

__all__ = ["density_figure", "run_headline", "run_section"]

_MAX_ROWS, _MAX_COLUMNS = 200, 6
"""Most epochs or reallocations in a chart or table, and most epochs in the columns of the density table."""
_MAX_LAYERS = 350
"""Most layers in the picture of densities."""
_HEAT_LINES = 20
"""Lines of text that fit beside the picture of densities."""
_MIN_DENSITY = 1e-4
"""Smallest density on the color scale, which is logarithmic."""
_MIN_THRESHOLD = 1e-30
"""Smallest threshold that a logarithmic chart shows."""

T = TypeVar("T")


def run_headline(log: RunLog) -> list[Number]:
    """Returns the headline numbers of a run: status, test accuracy and reallocated weights."""
    # Headlines come from the summary, which is also in the JSON, so both agree.
    facts = log.summary()
    note = f"{facts['method']} on {facts['data']}"
    last, best = facts["last_test_accuracy"], facts["best_test_accuracy"]
    if last is None or best is None:
        return [Number("Training", facts["status"], f"{note}; no epoch was completed")]
    start = facts["start_test_accuracy"]
    before = "" if start is None else f", {numbers.percent(start)} before the training"
    grown = sum(reallocation.grown for reallocation in log.reallocations)
    return [
        Number("Training", facts["status"], f"{note}, {facts['epochs']} of {log.settings.get('epochs', '?')} epochs"),
        Number(
            "Test accuracy",
            numbers.percent(last),
            f"best {numbers.percent(best)} in epoch {facts['best_epoch']}{before}",
        ),
        Number(
            "Weights dropped",
            numbers.short_count(facts["weights_moved"]),
            f"{numbers.short_count(grown)} grown, in {numbers.count(facts['reallocations'])} reallocations",
        ),
    ]


def run_section(log: RunLog) -> list[Section]:
    """Returns the section of a run; none if no epoch was completed."""
    if not log.epochs:
        return []
    figures = [_accuracy(log.epochs), _loss(log.epochs)]
    # Methods with fixed masks reallocate nothing.
    if log.reallocations:
        figures += [_reallocated(log.epochs), *_threshold(log)]
    if log.epochs[-1].density:
        figures.append(density_figure(log.epochs))
    return [Section("training", "Training", figures, layout="pairs")]


def _thinned(items: Sequence[T], most: int) -> list[T]:
    """Returns at most `most` of the items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    # 200 points are as clear as thousands on a screen, and keep the page below a megabyte.
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _caption(caption: str, kept: Sequence[object], every: Sequence[object]) -> str:
    """Returns the caption of a table, which says so if rows are omitted."""
    return caption if len(kept) == len(every) else f"{caption}: {len(kept)} of {len(every)}, evenly spread"


def _omission(noun: str, kept: Sequence[object], every: Sequence[object]) -> str:
    """Returns a sentence about omitted items; empty if there are none."""
    return f"Shown are {len(kept)} of {len(every):,} {noun}, evenly spread. " if len(kept) < len(every) else ""


_TRAIN_TEST = "Training: mean over the epoch, while the weights change. Test: at the end of the epoch."


def _accuracy(epochs: Sequence[Epoch]) -> Figure:
    """Returns the figure of training and test accuracy by epoch."""
    kept = _thinned(epochs, _MAX_ROWS)
    train, test = ([getattr(epoch, name) for epoch in kept] for name in ("train_accuracy", "test_accuracy"))
    series = [Series("train", "train", train), Series("test", "test", test)]
    chart = lines([epoch.number for epoch in kept], series, numbers.round_percent, span=_span(epochs))
    rows = [(str(e.number), *map(numbers.percent, (a, b))) for e, a, b in zip(kept, train, test, strict=True)]
    table = Table(_caption("Accuracy by epoch", kept, epochs), ("epoch", "train", "test"), rows)
    return Figure("Accuracy by epoch", chart, table, _TRAIN_TEST)


def _loss(epochs: Sequence[Epoch]) -> Figure:
    """Returns the figure of training and test loss by epoch."""
    kept = _thinned(epochs, _MAX_ROWS)
    train, test = ([getattr(epoch, name) for epoch in kept] for name in ("train_loss", "test_loss"))
    series = [Series("train", "train", train), Series("test", "test", test)]
    chart = lines([epoch.number for epoch in kept], series, lambda value: f"{value:.3g}", span=_span(epochs))
    rows = [
        (str(epoch.number), f"{a:.4f}", f"{b:.4f}", f"{epoch.lr:.4g}", f"{epoch.time_s:.1f}")
        for epoch, a, b in zip(kept, train, test, strict=True)
    ]
    headers = ("epoch", "train", "test", "learning rate", "seconds")
    return Figure("Loss by epoch", chart, Table(_caption("Loss by epoch", kept, epochs), headers, rows), _TRAIN_TEST)


def _span(epochs: Sequence[Epoch]) -> tuple[float, float]:
    """Returns the ends of the x-axis."""
    return epochs[0].number, epochs[-1].number


def _reallocated(epochs: Sequence[Epoch]) -> Figure:
    """Returns the figure of the weights dropped and grown by epoch."""
    kept = _thinned(epochs, _MAX_ROWS)
    dropped = [sum(epoch.dropped.values()) for epoch in kept]
    grown = [sum(epoch.grown.values()) for epoch in kept]
    numbered = [str(epoch.number) for epoch in kept]
    titles = [f"epoch {n}: {d:,} dropped, {g:,} grown" for n, d, g in zip(numbered, dropped, grown, strict=True)]
    # Columns and line, so that a difference of both is seen: most methods grow what they drop.
    unit = numbers.scaled(max([*dropped, *grown]), ("", "k", "M", "G"))
    chart = columns(
        numbered,
        [Series("dropped", "values", dropped)],
        lambda value: numbers.in_unit(value, unit),
        titles,
        step=grown,
        ticks=_column_ticks(kept),
    )
    rows = [
        (number, numbers.count(d), numbers.count(g), _optional(epoch.threshold))
        for number, d, g, epoch in zip(numbered, dropped, grown, kept, strict=True)
    ]
    caption = _caption("Weights dropped and grown, and the last threshold, by epoch", kept, epochs)
    finding = ""
    if dropped == grown:
        finding = "As many weights are grown as are dropped: the budget holds."
    elif sum(dropped) > sum(grown):
        finding = "More weights are dropped than grown: the number of active weights falls."
    return Figure(
        "Weights dropped and grown by epoch",
        chart,
        Table(caption, ("epoch", "dropped", "grown", "threshold"), rows),
        finding,
        [Key("values", "dropped"), Key("step", "grown")],
    )


def _column_ticks(epochs: Sequence[Epoch]) -> list[Tick]:
    """Returns numbers of epochs as labels below the middles of their columns."""
    # About six labels at most, so that epochs of four digits do not touch on a phone.
    every = max(-(-len(epochs) // 6), 1)
    return [
        Tick(round(100 * (i + 0.5) / len(epochs), 2), str(epoch.number))
        for i, epoch in enumerate(epochs)
        if i % every == 0
    ]


def _optional(value: float | None) -> str:
    """Formats a threshold; a dash if there is none."""
    return numbers.NONE if value is None else f"{value:.4g}"


def _threshold(log: RunLog) -> list[Figure]:
    """Returns the figure of the threshold at each reallocation; none for methods without a threshold."""
    # A logarithmic scale has no place for zero, the threshold of methods without one.
    every = [one for one in log.reallocations if (one.threshold or 0) > _MIN_THRESHOLD]
    # The axis counts epochs, like those of the other charts, and the log counts steps.
    steps = log.epochs[-1].step / max(log.epochs[-1].number, 1)
    if not every or steps <= 0:
        return []
    kept = _thinned(every, _MAX_ROWS)
    values = [one.threshold or math.nan for one in kept]
    chart = lines(
        [one.step / steps for one in kept],
        [Series("", "single", values)],
        lambda value: f"{value:.3g}",
        span=(0, log.epochs[-1].number),
        logarithmic=True,
    )
    rows = [
        (
            numbers.count(one.step),
            _optional(one.threshold),
            numbers.count(one.dropped),
            numbers.count(one.grown),
        )
        for one in kept
    ]
    caption = _caption("Threshold, and weights dropped and grown, by reallocation", kept, every)
    return [
        Figure(
            "Threshold below which weights are dropped, by epoch",
            chart,
            Table(caption, ("step", "threshold", "dropped", "grown"), rows),
            "The scale is logarithmic.",
        )
    ]


def density_figure(epochs: Sequence[Epoch]) -> Figure:
    """Returns the figure of the density by layer and epoch: a picture with a row for each layer."""
    every = list(epochs[-1].density)
    names = _thinned(every, _MAX_LAYERS)
    kept = _thinned(epochs, _MAX_ROWS)
    values = np.array([[epoch.density.get(name, 0.0) for epoch in kept] for name in names])
    positive = values[values > 0]
    # Few layers may be almost empty; without a lower end they would take most of the scale.
    low = max(float(positive.min(initial=1.0)), _MIN_DENSITY)
    high = max(float(positive.max(initial=low)), low)
    scale = (numbers.percent(low), numbers.percent(math.sqrt(low * high)), numbers.percent(high))
    # Columns of the table are words and digits, so fewer epochs fit than in the picture.
    few = _thinned(epochs, _MAX_COLUMNS)
    rows = [(name, *(numbers.percent(epoch.density.get(name, 0.0), 3) for epoch in few)) for name in names]
    return Figure(
        "Density by layer and epoch",
        Heat(
            heat_map(values, low, high),
            prefixes(names, room=_HEAT_LINES, down=True),
            _column_ticks(kept),
            scale,
        ),
        Table(_caption("Density by layer and epoch", few, epochs), ("weight", *(str(e.number) for e in few)), rows),
        f"{_changes(every, epochs)}Each row is a layer in the order of the model; shades are logarithmic. "
        f"{_omission('layers', names, every)}{_omission('epochs', kept, epochs)}".strip(),
        wide=True,
    )


def _changes(names: Sequence[str], epochs: Sequence[Epoch]) -> str:
    """Returns a sentence about the layers whose density rose and fell most since the first epoch."""
    first, last = (np.array([epoch.density.get(name, 0.0) for name in names]) for epoch in (epochs[0], epochs[-1]))
    change = last - first
    most, least = int(change.argmax()), int(change.argmin())
    parts = [f"{names[most]} gained the most density"] if change[most] > 0 else []
    parts += [f"{names[least]} lost the most"] if change[least] < 0 else []
    change_text = " and ".join(parts) or "no layer changed its density"
    return f"From the first epoch to the last, {change_text}. " if len(epochs) > 1 else ""
