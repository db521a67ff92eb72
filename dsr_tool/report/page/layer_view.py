"""Figures of the layers of a footprint: bytes, density, multiply-adds and masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsr_tool.formats.footprint import LayerFootprint, Sizes
from dsr_tool.report.page import numbers
from dsr_tool.report.page.charts import Series, columns
from dsr_tool.report.page.mask_pictures import mask_picture, picture_budget
from dsr_tool.report.page.parts import Figure, Key, MaskEntry, Masks, Table, kind_of_file
from dsr_tool.report.sources import Source, StoredBytes

__all__ = [
    "Layer",
    "bytes_by_layer",
    "density_by_layer",
    "layers_of",
    "masks_of_layers",
    "largest_layers",
    "sparse_of",
    "work_by_layer",
]

_MAX_LAYERS = 350
"""Number of weights that are shown one by one; torchvision's deepest classifier, EfficientNetV2-L, has 340."""


@dataclass(frozen=True)
class Layer:
    """One weight of the model.

    Attributes:
        footprint: counts and sizes of the weight in each format.
        stored: bytes of its positions and values in the file.
    """

    footprint: LayerFootprint
    stored: StoredBytes

    @property
    def name(self) -> str:
        """Name in the state_dict."""
        return self.footprint.spec.name

    @property
    def sizes(self) -> Sizes:
        """Counts, multiply-adds and sizes in each format."""
        return self.footprint.sizes

    @property
    def sparse(self) -> bool:
        """True if the weight may have inactive entries."""
        return self.footprint.spec.role == "sparse"

    @property
    def raw_bytes(self) -> int:
        """Bytes of the active values without compression."""
        # All values of a weight have one type, so the dense size tells the bytes of one value.
        return self.sizes.active * self.sizes.dense_bytes // max(self.sizes.parameters, 1)


def layers_of(source: Source) -> list[Layer]:
    """Returns the weights of a source, in its order."""
    return [
        # A file that does not tell positions from values counts all bytes as values.
        Layer(layer, source.stored.get(layer.spec.name, StoredBytes(0, layer.stored_bytes or 0)))
        for layer in source.footprint.layers
        if layer.spec.weight
    ]


def largest_layers(every: Sequence[Layer]) -> tuple[list[Layer], str]:
    """Returns the layers to show, the largest if there are too many, and a sentence about the omitted ones."""
    # The order stays that of the model: neighbors share labels below the columns.
    if len(every) <= _MAX_LAYERS:
        return list(every), ""
    largest = {layer.name for layer in sorted(every, key=lambda layer: -layer.sizes.parameters)[:_MAX_LAYERS]}
    note = f"Shown are the {_MAX_LAYERS} largest of {numbers.count(len(every))} weights."
    return [layer for layer in every if layer.name in largest], note


def sparse_of(layers: Iterable[Layer]) -> list[Layer]:
    """Returns the layers that are sparse."""
    return [layer for layer in layers if layer.sparse]


def bytes_by_layer(source: Source, layers: Sequence[Layer]) -> Figure:
    """Returns the figure of the bytes of each weight in the file, beside the entropy bound."""
    names = [layer.name for layer in layers]
    stored = [layer.stored.positions + layer.stored.values for layer in layers]
    titles = [f"{name}: {numbers.byte_size(n)}" for name, n in zip(names, stored, strict=True)]
    # A dense weight has one color for all its bytes: it has no positions, and its values cannot be pruned.
    series = [
        Series("values", "values", [layer.stored.values if layer.sparse else 0 for layer in layers]),
        Series("positions", "positions", [layer.stored.positions if layer.sparse else 0 for layer in layers]),
        Series("kept dense", "rest", [0 if layer.sparse else sum(layer.stored) for layer in layers]),
    ]
    # One unit for the whole axis, that of its largest value: labels in kB and MB would be hard to compare.
    unit = numbers.scaled(max(stored, default=0), ("B", "kB", "MB", "GB", "TB"))
    rows = [
        (
            layer.name,
            layer.footprint.codec,
            *map(numbers.count, (layer.stored.positions, _mask_bound(layer), layer.stored.values, layer.raw_bytes)),
            *map(numbers.count, (sum(layer.stored), layer.sizes.bound_bytes)),
        )
        for layer in layers
    ]
    headers = ("weight", "stored as", "positions", "mask bound", "values", "raw values", "together", "bound")
    return Figure(
        f"By layer, {_order(source)}",
        columns(
            names,
            series,
            lambda value: numbers.in_unit(value, unit),
            titles,
            step=[layer.sizes.bound_bytes for layer in layers],
        ),
        Table(f"Bytes of each weight in this {kind_of_file(source.kind)}", headers, rows, frozenset({0, 1})),
        _largest(names, stored, source.footprint.file_bytes, "of the file"),
        [
            Key("values", "values"),
            Key("positions", "positions"),
            Key("rest", "kept dense"),
            Key("step", "entropy bound of the mask, and raw values"),
        ],
    )


def _order(source: Source) -> str:
    """Names the order of the layers: an ONNX file lists sparse weights first, all others have the model's order."""
    return "in the order of the file" if source.kind == "onnx" else "in the order of the model"


def _mask_bound(layer: Layer) -> int:
    """Returns the fewest bytes that can encode the mask, by its entropy."""
    # The bound of a weight is that of its mask plus its raw values; a dense weight has no mask.
    return max(layer.sizes.bound_bytes - layer.raw_bytes, 0)


def _largest(names: Sequence[str], amounts: Sequence[int], whole: int, of: str) -> str:
    """Returns a sentence about the largest amount; empty if there is none."""
    if not names or not whole:
        return ""
    most = max(range(len(names)), key=lambda i: amounts[i])
    return f"Largest: {names[most]} with {numbers.percent(amounts[most] / whole, 1)} {of}."


def density_by_layer(source: Source, layers: Sequence[Layer]) -> Figure:
    """Returns the figure of the density of each weight."""
    names = [layer.name for layer in layers]
    titles = [f"{layer.name}: {numbers.percent(layer.sizes.density)}" for layer in layers]
    series = [
        Series("sparse", "values", [layer.sizes.density if layer.sparse else 0 for layer in layers]),
        Series("kept dense", "rest", [0 if layer.sparse else layer.sizes.density for layer in layers]),
    ]
    rows = [
        (
            layer.name,
            numbers.dimensions(*layer.footprint.spec.shape),
            numbers.count(layer.sizes.parameters),
            numbers.count(layer.sizes.active),
            numbers.percent(layer.sizes.density, 4),
            layer.footprint.spec.reason,
        )
        for layer in layers
    ]
    headers = ("weight", "shape", "entries", "active", "density", "why")
    shares = sorted(layer.sizes.density for layer in sparse_of(layers))
    lowest, highest = (numbers.percent(share) for share in (shares[0], shares[-1])) if shares else ("", "")
    if not shares:
        finding = "No weight is sparse."
    # As texts: densities that differ in the last bit would be a range from 10.00 % to 10.00 %.
    elif lowest == highest:
        finding = f"Every sparse weight has a density of {lowest}."
    else:
        finding = f"Sparse weights have densities from {lowest} to {highest}."
    return Figure(
        f"Active share of each weight, {_order(source)}",
        columns(names, series, numbers.round_percent, titles),
        Table("Density of each weight", headers, rows, frozenset({0, 1, 5})),
        finding,
        [Key("values", "sparse"), Key("rest", "kept dense")],
    )


def work_by_layer(source: Source, layers: Sequence[Layer]) -> Figure:
    """Returns the figure of the multiply-adds of each weight: those with active entries, and those saved."""
    names = [layer.name for layer in layers]
    active = [layer.sizes.sparse_macs for layer in layers]
    titles = [f"{layer.name}: {numbers.macs(layer.sizes.sparse_macs)}" for layer in layers]
    series = [
        Series("with active weights", "values", active),
        Series("saved", "saved", [layer.sizes.dense_macs - layer.sizes.sparse_macs for layer in layers]),
    ]
    unit = numbers.scaled(max((layer.sizes.dense_macs for layer in layers), default=0), ("", "k", "M", "G", "T"))
    rows = [
        (
            layer.name,
            numbers.count(layer.sizes.sparse_macs),
            numbers.count(layer.sizes.dense_macs),
            numbers.share(layer.sizes.sparse_macs, layer.sizes.dense_macs),
        )
        for layer in layers
    ]
    headers = ("weight", "with active weights", "with every weight", "share")
    return Figure(
        f"Multiply-adds for one input, {_order(source)}",
        columns(names, series, lambda value: numbers.in_unit(value, unit), titles),
        Table("Multiply-adds of each weight for one input", headers, rows),
        _largest(names, active, sum(active), "of the multiply-adds with active weights"),
        [Key("values", "with active weights"), Key("saved", "saved by zeros")],
    )


def masks_of_layers(source: Source, layers: Sequence[Layer]) -> Figure:
    """Returns the figure of all masks, one picture for each sparse layer; the largest layer is shown first."""
    blocks = picture_budget(len(sparse_of(layers)))
    # A mask that is chosen by a click on a column is found by the index among all layers, not among the sparse ones.
    entries = [_mask(source, layer, i, blocks) for i, layer in enumerate(layers) if layer.sparse]
    sizes = [layer.sizes.parameters for layer in sparse_of(layers)]
    finding = (
        "Each mask is drawn as a matrix: rows are its first dimension, columns all others; a shade is the density of a "
        "block."
    )
    return Figure("Active entries", Masks(entries, sizes.index(max(sizes))), None, finding)


def _mask(source: Source, layer: Layer, index: int, blocks: int) -> MaskEntry:
    """Returns the picture of one mask in at most `blocks` blocks, with a sentence about it."""
    picture = mask_picture(source.tensors[layer.name].mask, blocks)
    down, across = picture.block
    size = "one weight" if down == across == 1 else f"up to {numbers.dimensions(down, across)} weights"
    sentence = (
        f"{numbers.dimensions(*layer.footprint.spec.shape)}, drawn as {numbers.count(picture.rows)} rows and "
        f"{numbers.count(picture.columns)} columns; {numbers.count(layer.sizes.active)} of "
        f"{numbers.count(layer.sizes.parameters)} active, density {numbers.percent(layer.sizes.density, 4)}; "
        f"a block is {size}."
    )
    return MaskEntry(layer.name, index, picture, numbers.round_percent(picture.darkest), sentence)
