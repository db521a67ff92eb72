"""A plan depends on its layer, its planes and its batch, never on the batch that came before."""

import torch

from dsr_tool.sparse.blocked.convolution import Geometry, Plans, convolve


def passes(plans, batches):
    """Returns result and gradients for the last of some batches, all computed with one cache of plans."""
    generator = torch.Generator().manual_seed(0)
    geometry = Geometry(40, 30, (1, 1))
    positions = torch.randperm(1200, generator=generator)[:300].sort().values.to(torch.int32)
    values = torch.randn(300, generator=generator).requires_grad_()
    images = torch.randn(64, 30, 1, 1, 16, generator=generator)
    for blocks in batches:
        x = images[:blocks].clone().requires_grad_()
        values.grad = None
        y = convolve(x, values, positions, geometry, plans, "layer", 0)
        y.square().sum().backward()
    return y.detach(), x.grad, values.grad


def test_bits_do_not_depend_on_earlier_batches():
    for last in (1, 2, 7, 33):
        alone = passes(Plans(), [last])
        for before in ([64], [1], [5, 64, 2]):
            after = passes(Plans(), [*before, last])
            assert all(torch.equal(one, other) for one, other in zip(alone, after, strict=True))
