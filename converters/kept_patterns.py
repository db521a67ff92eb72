"""The pattern that the zeros of a pruned network follow: in all of its layers, or in which of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction

import torch
from torch import nn

from dsr_tool.errors import UsageError, first_few
from dsr_tool.sparse.discover import Rules, discover
from dsr_tool.sparse.pattern import torn_layer
from dsr_tool.sparsity.granularity import MOST_GROUP, SINGLE, Granularity
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.pattern import found_pattern

__all__ = ["kept_pattern"]


def kept_pattern(
    module: nn.Module, rules: Rules, masks: Mapping[str, torch.Tensor], asked: Granularity | None
) -> tuple[Granularity, tuple[str, ...]]:
    """Returns the granularity to record for a network with given masks, and what to say about it.

    A pattern is recorded if every mask has it exactly. Then exports say so, and a training keeps it.

    Args:
        module: the network.
        rules: which weights stay dense.
        masks: a boolean tensor for each sparse weight by name, True where active.
        asked: the granularity that the user gave; None to look for one.

    Raises:
        UsageError: a mask does not have the pattern that was asked for.
    """
    if asked is not None:
        torn = torn_layer(masks, asked) or _without_axis(module, rules, masks, asked)
        if torn is not None:
            raise UsageError(
                f"--granularity {asked} is not what the zeros of {torn!r} follow; leave it out to record what they "
                f"follow, or give --granularity weight."
            )
        return asked, ()
    for pattern in _candidates(masks):
        if torn_layer(masks, pattern) is None and _without_axis(module, rules, masks, pattern) is None:
            how = "--granularity weight records none, for methods that do not keep it"
            return pattern, (f"the zeros of all {len(masks)} sparse layers follow the pattern {pattern} ({how})",)
    return SINGLE, _in_part(masks)


def _candidates(masks: Mapping[str, torch.Tensor]) -> Iterator[Granularity]:
    """Yields patterns that all masks may have, those that say most first."""
    densities = {Fraction(int(mask.count_nonzero()), mask.numel()) for mask in masks.values()}
    if len(densities) == 1:
        (density,) = densities
        for group in range(density.denominator, MOST_GROUP + 1, density.denominator):
            yield Granularity("N:M", group * density.numerator // density.denominator, group)
    # A kernel of one weight is no kernel, and a single output has a fan-in of its own.
    if any(mask[0, 0].numel() > 1 for mask in masks.values() if mask.ndim > 2):
        yield Granularity("kernel")
    if all(mask.ndim > 1 and mask.shape[0] > 1 and bool(mask.any()) for mask in masks.values()):
        yield Granularity("fan-in")


def _without_axis(
    module: nn.Module, rules: Rules, masks: Mapping[str, torch.Tensor], pattern: Granularity
) -> str | None:
    """Returns the name of the first sparse layer of a kind that cannot have a pattern; None if all can."""
    specs = discover(module, replace(rules, small_layers=False, granularity=pattern))
    return next((name for name in masks if specs[name].role != "sparse"), None)


def _in_part(masks: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Says which of the masks have a pattern of their own, if any has."""
    by_pattern: dict[str, list[str]] = {}
    for name, mask in masks.items():
        pattern = found_pattern(Mask.from_bool(mask.cpu().contiguous().numpy()))
        if pattern is not None:
            by_pattern.setdefault(str(pattern), []).append(name)
    if not by_pattern:
        return ()
    parts = [f"{pattern} in {len(names)} ({first_few(names)})" for pattern, names in by_pattern.items()]
    return (
        f"of {len(masks)} sparse layers, the zeros follow a pattern in a part: {'; '.join(parts)}; none is recorded "
        f"for the model",
    )
