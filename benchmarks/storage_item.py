"""The model of the storage benchmark: a ResNet-50, sparse by ERK, with weights drawn like trained ones.

All 25.5 million convolution and linear weights are sparse; densities follow Erdős-Rényi-Kernel (Evci et al. 2020), and
positions are uniformly random. The values of a layer with density d depend on `draw`:

- `laplace` (default): the largest fraction d of as many Laplace variables as the layer has weights, with standard
  deviation 1 / sqrt(fan-in), as magnitude pruning of heavy-tailed trained weights leaves them;
- `normal`: likewise with normal variables;
- `whole`: normal variables of which none is removed, as if pruning did not look at magnitudes. Their exponents spread
  most, which makes this the hardest of the three to store.

Norm weights are normal around 1 (deviation 0.2), variances log-normal around 0.05, shifts, means and biases normal
(deviation 0.1). Everything comes from one seed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from storage_formats import CONFIG, Item
from torchvision.models import resnet50

from dsr_tool.sparse.discover import discover
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.distribution import erk
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor

DRAWS = ("laplace", "normal", "whole")


def make(sparsity: float, draw: str, seed: int) -> Item:
    """Draws the model.

    Args:
        sparsity: fraction of zeros among the sparse weights.
        draw: one of `DRAWS`.
        seed: seed of all random numbers.
    """
    module = resnet50().eval()
    graph = trace(module, CONFIG.input_shape)
    specs = {name: replace(s, role="sparse") if s.weight else s for name, s in discover(module).items()}
    weights = [name for name, spec in specs.items() if spec.weight]
    # The count of the whole model is exact, and ERK spreads it over the layers.
    total = round((1 - sparsity) * sum(specs[name].size for name in weights))
    counts = dict(zip(weights, erk(total, [specs[name].shape for name in weights]), strict=True))
    random = np.random.default_rng(seed)
    tensors = {}
    for name, value in module.state_dict().items():
        if name in counts:
            tensors[name] = _draw_weight(specs[name].shape, counts[name], draw, random)
        else:
            tensors[name] = SparseTensor(Mask.full(tuple(value.shape)), _draw_other(name, value.numpy(), random))
    return Item(tensors, specs, graph)


def _draw_weight(shape: tuple[int, ...], active: int, draw: str, random: np.random.Generator) -> SparseTensor:
    size = math.prod(shape)
    # The fan-in of a weight: inputs per output, kernel included.
    deviation = 1 / math.sqrt(size / shape[0])
    positions = np.sort(random.permutation(size)[:active])
    if draw == "whole":
        values = random.normal(scale=deviation, size=active)
    else:
        kinds = {"normal": random.normal, "laplace": random.laplace}
        # A Laplace variable of scale b has the deviation sqrt(2) b.
        values = kinds[draw](scale=deviation / (math.sqrt(2) if draw == "laplace" else 1), size=size)
        values = values[np.argpartition(np.abs(values), size - active)[size - active :]] if active < size else values
        # The partition leaves an order that depends on the values, which a codec could profit from.
        random.shuffle(values)
    mask = Mask(shape, positions) if active < size else Mask.full(shape)
    return SparseTensor(mask, values.astype(np.float32))


def _draw_other(name: str, value: Array, random: np.random.Generator) -> Array:
    # Counters of batches, which have no distribution.
    if value.dtype != np.float32:
        return value.reshape(-1)
    if name.endswith("running_var"):
        drawn = 0.05 * np.exp(random.normal(size=value.size))
    elif name.endswith("weight"):
        drawn = random.normal(1, 0.2, value.size)
    else:
        drawn = random.normal(0, 0.1, value.size)
    return drawn.astype(np.float32)
