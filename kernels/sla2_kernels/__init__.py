"""Sparse-linear attention: softmax attention over chosen key blocks, linear attention over the others.

    o_s, lse = sparse_attention(q, k, v, mask, block_q=128, block_k=64)
    o_l = linear_attention(q, k, v, ~mask, block_q=128, block_k=64)

Tensors are (B, H, N, D); masks (B, H, ceil(N / block_q), ceil(N / block_k)), True where a block is kept.
"""

import torch
from torch import Tensor

from sla2_kernels import reference
from sla2_kernels.backend import resolve_backend

__all__ = ["PRECISIONS", "linear_attention", "resolve_backend", "sparse_attention"]

PRECISIONS = ("none", "int8", "fp8", "int8-bf16")


class _LowBitSparse(torch.autograd.Function):
    """Low-bit forward, full-precision backward from the unquantised inputs and the forward's output.

    The backward recomputes the log-sum-exp from unquantised scores. The forward's own belongs to quantised scores: with it,
    P = exp(S - L) would not sum to one per row, and a constant added to a row of S would get a gradient.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, block_q, block_k, precision):
        out, lse = reference.low_bit_sparse_attention(q, k, v, mask, block_q, block_k, precision)
        ctx.save_for_backward(q, k, v, mask, out)
        ctx.blocks = (block_q, block_k)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_o, _grad_lse):
        q, k, v, mask, out = ctx.saved_tensors
        _, lse = reference.sparse_attention(q, k, v, mask, *ctx.blocks)
        return (
            *reference.sparse_attention_backward(q, k, v, out, lse, grad_o, mask, *ctx.blocks),
            None,
            None,
            None,
            None,
        )


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    block_q: int = 128,
    block_k: int = 64,
    precision: str = "none",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the key blocks that `mask` keeps, differentiable in q, k and v.

    Args:
        q, k, v: (B, H, N, D), one floating dtype. For a low-bit precision k should be smoothed (mean over tokens removed).
        mask: (B, H, ceil(N / block_q), ceil(N / block_k)) bool; each row keeps at least one block.
        precision: `none`, or a low-bit forward (`reference.low_bit_sparse_attention`) whose backward is full precision.
        backend: `auto`, `reference` or `triton`.

    Returns:
        Output (B, H, N, D) and log-sum-exp (B, H, N); the latter has a gradient only for precision `none`.

    Raises:
        ValueError: for a shape, dtype, precision or backend that is not served; the message has the actual one.
    """
    _check(q, k, v)
    _check_blocks("mask", mask, q, block_q, block_k)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, must be bool")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, choose one of {', '.join(PRECISIONS)}")
    resolve_backend(backend, q)
    if precision == "none":
        return reference.sparse_attention(q, k, v, mask, block_q, block_k)
    return _LowBitSparse.apply(q, k, v, mask, block_q, block_k, precision)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    *,
    block_q: int = 128,
    block_k: int = 64,
    feature_map: str = "softmax",
    backend: str = "auto",
) -> Tensor:
    """Linear attention phi(q) phi(k)^T v, rows normalised, over the key blocks that `weight` names.

    Args:
        q, k, v: (B, H, N, D), one floating dtype; the feature map is applied here.
        weight: (B, H, ceil(N / block_q), ceil(N / block_k)), bool or in [0, 1]: how often each block counts.
        feature_map: `softmax` over D, `elu` or `relu`.
        backend: `auto`, `reference` or `triton`.

    Returns:
        (B, H, N, D); zero in rows without any block.

    Raises:
        ValueError: for a shape, dtype, feature map or backend that is not served.
    """
    _check(q, k, v)
    _check_blocks("weight", weight, q, block_q, block_k)
    resolve_backend(backend, q)
    q_phi, k_phi = reference.feature_map(q, feature_map), reference.feature_map(k, feature_map)
    return reference.linear_attention(q_phi, k_phi, v, weight, block_q, block_k)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v are {shapes}; all must be (B, H, N, D)")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; all must be one floating dtype")


def _check_blocks(name: str, blocks: Tensor, q: Tensor, block_q: int, block_k: int) -> None:
    length = q.shape[2]
    wanted = (*q.shape[:2], reference.num_blocks(length, block_q), reference.num_blocks(length, block_k))
    if tuple(blocks.shape) != wanted:
        raise ValueError(
            f"{name} is {tuple(blocks.shape)}, must be {wanted} for N = {length}, blocks {block_q} x {block_k}"
        )
