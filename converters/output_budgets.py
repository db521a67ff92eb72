"""Layer budgets by what pruning each layer does to the network's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from converters.prepared import Prepared, trained_part
from converters.request import SelectionOptions
from dsr_tool.calibrate.allocation import Curves
from dsr_tool.calibrate.pictures import Pictures
from dsr_tool.calibrate.sensitivity import measure
from dsr_tool.sparse.discover import discover
from dsr_tool.sparse.macs import with_macs
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["OutputBudgets"]


@dataclass(frozen=True)
class OutputBudgets:
    """Layer budgets by what they do to the outputs.

    Attributes:
        curves: cost curves of the trained sparse layers.
        specs: all specs of the network.
        fresh: names of sparse weights with random values; they get the density of the network.
    """

    curves: Curves
    specs: Mapping[str, LayerSpec]
    fresh: tuple[str, ...]

    @classmethod
    def measured(
        cls,
        prepared: Prepared,
        selection: SelectionOptions,
        pictures: Pictures,
        on_progress: Callable[[int, int], None],
    ) -> OutputBudgets:
        """Measures the curves."""
        specs = with_macs(prepared.module, discover(prepared.module, prepared.rules), prepared.config.input_shape)
        with trained_part(prepared) as network:
            curves = measure(
                network,
                {name: spec for name, spec in specs.items() if name not in prepared.fresh},
                pictures.inputs,
                # Without its head, a classifier returns features.
                classifier=False if prepared.new_head else None,
                seed=selection.seed,
                on_progress=on_progress,
            )
        curves = replace(curves, allow_starved=selection.allow_starved)
        return cls(curves, specs, prepared.fresh)

    def spread(self, total: int) -> list[int]:
        """Returns the counts of all sparse layers that change the outputs least."""
        sparse = self._sparse
        even = {spec.name: max(1, round(total * spec.size / sum(s.size for s in sparse))) for spec in sparse}
        fresh = {name: even[name] for name in self.fresh}
        found = dict(zip(self.curves.layers, self.curves.spread(total - sum(fresh.values())), strict=True))
        return [{**found, **fresh}[spec.name] for spec in sparse]

    def within(self, macs: int) -> list[int]:
        """Returns the counts of all sparse layers that change the outputs least within a number of multiply-adds."""
        work = {name: spec.macs_per_weight for name, spec in self.specs.items()}
        whole = sum(spec.size * work[spec.name] for spec in self.specs.values())
        fresh = {name: max(1, round(self.specs[name].size * min(macs / whole, 1))) for name in self.fresh}
        dense = sum(spec.size * work[spec.name] for spec in self.specs.values() if spec.role != "sparse")
        left = macs - dense - sum(count * work[name] for name, count in fresh.items())
        found = self.curves.spread_for([work[name] for name in self.curves.layers], left)
        counts = {**dict(zip(self.curves.layers, found, strict=True)), **fresh}
        return [counts[spec.name] for spec in self._sparse]

    @property
    def _sparse(self) -> list[LayerSpec]:
        return [spec for spec in self.specs.values() if spec.role == "sparse"]
