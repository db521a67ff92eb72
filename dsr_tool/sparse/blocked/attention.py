"""Steps of nn.MultiheadAttention over one sequence: projections on the kernels, the rest by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dsr_tool.sparse.blocked.context import Context, Run, torch_step
from dsr_tool.sparse.blocked.layers import product
from dsr_tool.sparse.blocked.plans import Geometry
from dsr_tool.sparse.blocked.trace import sparse_names
from dsr_tool.sparse.blocked.values import Registers, rows_at

__all__ = ["attention_step"]

_WITHOUT = {"key_padding_mask": None, "attn_mask": None, "is_causal": False}
"""Arguments that only the module itself handles, and the values at which it is not needed."""


def attention_step(node: fx.Node, context: Context) -> Run | None:
    """Returns the step of self-attention without masks, or None where the module itself must run.

    The module runs with dense weights, made for the moment, where query, key and value differ, or with a mask.
    """
    module = cast(nn.MultiheadAttention, context.module(node))
    names = (
        "query",
        "key",
        "value",
        "key_padding_mask",
        "need_weights",
        "attn_mask",
        "average_attn_weights",
        "is_causal",
    )
    given = {"need_weights": True, "average_attn_weights": True} | dict(zip(names, node.args, strict=False))
    given |= node.kwargs
    source = given.get("query")
    alone = isinstance(source, fx.Node) and given.get("key") is source and given.get("value") is source
    plain = module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
    masked = any(given.get(key, usual) not in (usual,) for key, usual in _WITHOUT.items())
    dynamic = any(isinstance(given[key], fx.Node) for key in ("need_weights", "average_attn_weights"))
    sparse = sparse_names(module) or sparse_names(module.out_proj)
    if not alone or not plain or masked or dynamic or not sparse:
        return None
    place, out, otherwise = context.places[cast(fx.Node, source)], context.places[node], torch_step(node, context)
    attend = _attend(module, context, weights=bool(given["need_weights"]), average=bool(given["average_attn_weights"]))

    def run(registers: Registers) -> None:
        x = rows_at(registers, place)
        if x is None or x.dim() != 3:
            otherwise(registers)
        else:
            registers[out] = attend(x)

    return run


def _attend(
    module: nn.MultiheadAttention, context: Context, *, weights: bool, average: bool
) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """Returns self-attention of (N, tokens, features), or (tokens, N, features), and its weights where wanted."""
    features, heads = module.embed_dim, module.num_heads
    project = product(module, "in_proj_weight", "in_proj_bias", Geometry(3 * features, features), context)
    join = product(module.out_proj, "weight", "bias", Geometry(features, features), context)

    def attend(x: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = x if module.batch_first else x.transpose(0, 1)
        batch, length = rows.shape[:2]
        heads_first = project(rows).view(batch, length, 3, heads, features // heads).permute(2, 0, 3, 1, 4)
        dropout = module.dropout if module.training else 0.0
        query, key, value = heads_first.unbind(0)
        attended, shares = _weighted(query, key, value, dropout, weights)
        joined = join(attended.transpose(1, 2).reshape(batch, length, features))
        if shares is not None and average:
            shares = shares.mean(1)
        return (joined if module.batch_first else joined.transpose(0, 1)), shares

    return attend


def _weighted(query: Tensor, key: Tensor, value: Tensor, dropout: float, weights: bool) -> tuple[Tensor, Tensor | None]:
    """Returns attention of (N, heads, tokens, features), and its weights where they are wanted."""
    if not weights:
        return functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout), None
    shares = torch.softmax(query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2), -1)
    shares = functional.dropout(shares, dropout) if dropout else shares
    return shares @ value, shares
