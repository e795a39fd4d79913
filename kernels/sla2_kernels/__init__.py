"""Sparse-linear attention: softmax attention over chosen key blocks, linear attention over the others.

    o_s, lse = sparse_attention(q, k, v, mask, block_q=128, block_k=64)
    o_l = linear_attention(q, k, v, ~mask, block_q=128, block_k=64)

Tensors are (B, H, N, D); masks (B, H, ceil(N / block_q), ceil(N / block_k)), True where a block is kept.
"""

import torch
from torch import Tensor

from sla2_kernels import ops, reference
from sla2_kernels.backend import resolve_backend

__all__ = ["PRECISIONS", "linear_attention", "resolve_backend", "soft_sparse_attention", "sparse_attention"]

PRECISIONS = ("none", "int8", "fp8", "int8-bf16")
FEATURE_MAPS = ("softmax", "elu", "relu")
BLOCKS = (16, 32, 64, 128)  # tokens of a block that the Triton kernels tile
HEAD_DIMS = 128  # largest head size that they hold


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
        Output (B, H, N, D) and log-sum-exp (B, H, N), natural logarithm, fp32 or wider; the latter carries no gradient.

    Raises:
        ValueError: for a shape, dtype, precision or backend that is not served; the message has the actual one.
    """
    _check(q, k, v)
    _check_blocks("mask", mask, q, k, block_q, block_k)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, must be bool")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, choose one of {', '.join(PRECISIONS)}")
    if _backend(backend, q, block_q, block_k) == "triton":
        if precision != "none":
            raise ValueError(f"backend triton serves precision none, not {precision!r}; choose backend reference")
        return ops.sparse_op(q, k, v, mask, block_q, block_k)
    if precision == "none":
        out, lse = reference.sparse_attention(q, k, v, mask, block_q, block_k)
        return out, lse.detach()
    return _LowBitSparse.apply(q, k, v, mask, block_q, block_k, precision)


def soft_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_mask: Tensor,
    *,
    block_q: int = 128,
    block_k: int = 64,
    backend: str = "auto",
) -> Tensor:
    """Attention over all keys with P proportional to M exp(S): stage 1's sparse branch, differentiable in log M too.

    Args:
        q: (B, H, NQ, D); k, v: (B, H, N, D), one floating dtype.
        log_mask: (B, H, ceil(NQ / block_q), ceil(N / block_k)) floating and finite, log M of each block pair.
        backend: `auto`, `reference` or `triton`; no N x N tensor with `triton`.

    Returns:
        (B, H, NQ, D).

    Raises:
        ValueError: for a shape, dtype or backend that is not served.
    """
    _check(q, k, v)
    _check_blocks("log_mask", log_mask, q, k, block_q, block_k)
    if _backend(backend, q, block_q, block_k) == "triton":
        return ops.soft_sparse_op(q, k, v, log_mask, block_q, block_k)[0]
    return reference.soft_sparse_attention(q, k, v, log_mask, block_q, block_k)


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
    _check_blocks("weight", weight, q, k, block_q, block_k)
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map is {feature_map!r}, choose one of {', '.join(FEATURE_MAPS)}")
    if _backend(backend, q, block_q, block_k) == "triton":
        return ops.linear_op(q, k, v, weight, block_q, block_k, feature_map)[0]
    q_phi, k_phi = reference.feature_map(q, feature_map), reference.feature_map(k, feature_map)
    return reference.linear_attention(q_phi, k_phi, v, weight, block_q, block_k)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3:] != k.shape[3:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v are {shapes}; all must be (B, H, N, D), and only N of q may differ")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; all must be one floating dtype")


def _check_blocks(name: str, blocks: Tensor, q: Tensor, k: Tensor, block_q: int, block_k: int) -> None:
    rows, columns = q.shape[2], k.shape[2]
    wanted = (*q.shape[:2], reference.num_blocks(rows, block_q), reference.num_blocks(columns, block_k))
    if tuple(blocks.shape) != wanted:
        raise ValueError(
            f"{name} is {tuple(blocks.shape)}, must be {wanted} for N = {columns}, blocks {block_q} x {block_k}"
        )


def _backend(backend: str, q: Tensor, block_q: int, block_k: int) -> str:
    """`resolve_backend`, and the sizes that the Triton kernels do not have."""
    backend = resolve_backend(backend, q)
    if backend == "triton" and (block_q not in BLOCKS or block_k not in BLOCKS or q.shape[-1] > HEAD_DIMS):
        raise ValueError(
            f"backend triton serves blocks of {', '.join(map(str, BLOCKS))} tokens and D up to {HEAD_DIMS}, "
            f"not blocks {block_q} x {block_k} and D = {q.shape[-1]}; choose reference"
        )
    return backend
