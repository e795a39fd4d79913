"""Sparse-linear attention: softmax attention over chosen key blocks, linear attention over the others.

    o = sla2_attention(q, k, v, kept=16, alpha=alpha, projections=(proj_q, proj_k))

or by parts, with a mask of one's own:

    o_s, lse = sparse_attention(q, k, v, mask)
    o_l = linear_attention(q, k, v, ~mask)

Tensors are (B, H, N, D); masks (B, H, ceil(N / block_q), ceil(N / block_k)), True where a block is kept.
"""

import torch
from torch import Tensor

from sla2_kernels import blockwise, ops, reference
from sla2_kernels.backend import resolve_backend
from sla2_kernels.launch import has_fp8

__all__ = [
    "PRECISIONS",
    "linear_attention",
    "resolve_backend",
    "sla2_attention",
    "soft_sparse_attention",
    "sparse_attention",
]

PRECISIONS = ("none", "int8", "fp8", "int8-bf16")
FEATURE_MAPS = ("softmax", "elu", "relu")
PHI_KEYS = ("smoothed", "raw")
BLOCKS = (16, 32, 64, 128)  # tokens of a block that the Triton kernels tile
HEAD_DIMS = 128  # largest head size that they hold


class _LowBitSparse(torch.autograd.Function):
    """Low-bit forward, full-precision backward from the unquantised inputs and the forward's output.

    The backward recomputes the log-sum-exp from unquantised scores. The forward's own belongs to quantised scores: with it,
    P = exp(S - L) would not sum to one per row, and a constant added to a row of S would get a gradient.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, block_q, block_k, precision):
        out, lse = blockwise.low_bit_sparse_attention(q, k, v, mask, block_q, block_k, precision)
        ctx.save_for_backward(q, k, v, mask, out)
        ctx.blocks = (block_q, block_k)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_o, _grad_lse):
        q, k, v, mask, out = ctx.saved_tensors
        return *blockwise.sparse_attention_backward(q, k, v, out, grad_o, mask, *ctx.blocks), None, None, None, None


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
    if _backend(backend, q, block_q, block_k, precision) == "triton":
        if precision == "none":
            return ops.sparse_op(q, k, v, mask, block_q, block_k)
        return ops.low_bit_sparse_op(q, k, v, mask, block_q, block_k, precision)
    if precision == "none":
        out, lse = blockwise.sparse_attention(q, k, v, mask, block_q, block_k)
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


def sla2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kept: int | None = None,
    alpha: Tensor | None = None,
    projections: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    block_q: int = 128,
    block_k: int = 64,
    feature_map: str = "softmax",
    phi_keys: str = "smoothed",
    precision: str = "none",
    backend: str = "auto",
) -> Tensor:
    """SLA2 (arXiv 2602.12675, Algorithm 2): route, attend sparsely and linearly, mix. Differentiable in q, k, v and alpha.

    Args:
        q, k, v: (B, H, N, D), one floating dtype, any strides.
        kept: key blocks that a query block attends to, 1 .. ceil(N / block_k); needed unless `mask` is given.
        alpha: (H, ceil(N / block_q)) in [0, 1], the sparse branch's share; None adds the two branches.
        projections: the router's proj_q and proj_k, (D, D) each, applied as x @ proj^T; None for the identity. Routing is a
            choice and passes no gradient; stage 1 trains them through `soft_sparse_attention`.
        mask: (B, H, ceil(N / block_q), ceil(N / block_k)) bool, at least one block a row, in place of the router.
        feature_map: phi of the linear branch: `softmax` over D, `elu` or `relu`.
        phi_keys: phi of `smoothed` keys (their mean over tokens removed, Algorithm 2) or of `raw` ones (released SLA).
        precision: of the sparse branch's forward: `none`, `int8` (INT8 QK, e4m3 PV), `fp8` (both e4m3) or `int8-bf16`
            (INT8 QK only). The backward is in full precision.
        backend: `auto`, `reference` or `triton`.

    Returns:
        (B, H, N, D), with the strides of q where q is dense.

    Raises:
        ValueError: for a shape, dtype, word or backend that is not served; the message has the actual one.
    """
    _check(q, k, v)
    if q.shape != k.shape:
        raise ValueError(f"q is {tuple(q.shape)} and k {tuple(k.shape)}; both must be (B, H, N, D) of one length")
    H, rows, blocks = q.shape[1], reference.num_blocks(q.shape[2], block_q), reference.num_blocks(q.shape[2], block_k)
    for name, word, words in (
        ("feature_map", feature_map, FEATURE_MAPS),
        ("phi_keys", phi_keys, PHI_KEYS),
        ("precision", precision, PRECISIONS),
    ):
        if word not in words:
            raise ValueError(f"{name} is {word!r}, choose one of {', '.join(words)}")
    if mask is not None:
        _check_blocks("mask", mask, q, k, block_q, block_k)
    elif kept is None or not 1 <= kept <= blocks:
        raise ValueError(f"kept is {kept}, must be 1 to {blocks} key blocks for N = {q.shape[2]}, block_k = {block_k}")
    if alpha is not None and tuple(alpha.shape) != (H, rows):
        raise ValueError(f"alpha is {tuple(alpha.shape)}, must be (H, ceil(N / block_q)) = {(H, rows)}")
    smooth_phi = phi_keys == "smoothed"
    if _backend(backend, q, block_q, block_k, precision) == "triton":
        proj_q, proj_k = projections or (None, None)
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, alpha))
        alpha = None if alpha is None else alpha.float().contiguous()
        settings = kept or 0, block_q, block_k, feature_map, smooth_phi, precision, save
        return ops.attention_op(q, k, v, alpha, proj_q, proj_k, mask, *settings)[0]
    if mask is None:
        with torch.no_grad():
            mask = reference.top_k_mask(reference.router_scores(q, k, projections, block_q, block_k), kept)
    blocks = {"block_q": block_q, "block_k": block_k, "backend": "reference"}
    smooth = reference.smooth_keys(k)
    o_s, _ = sparse_attention(q, smooth, v, mask, precision=precision, **blocks)
    o_l = linear_attention(q, smooth if smooth_phi else k, v, ~mask, feature_map=feature_map, **blocks)
    return reference.mix(o_s, o_l, alpha, block_q)


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


def _backend(backend: str, q: Tensor, block_q: int, block_k: int, precision: str = "none") -> str:
    """`resolve_backend`, and the sizes and precisions that the Triton kernels do not have."""
    backend = resolve_backend(backend, q)
    if backend == "reference":
        return backend
    if block_q not in BLOCKS or block_k not in BLOCKS or q.shape[-1] > HEAD_DIMS:
        raise ValueError(
            f"backend triton serves blocks of {', '.join(map(str, BLOCKS))} tokens and D up to {HEAD_DIMS}, "
            f"not blocks {block_q} x {block_k} and D = {q.shape[-1]}; choose reference"
        )
    if precision != "none" and (q.dtype != torch.bfloat16 or block_k < 32 or q.shape[-1] <= 16):
        raise ValueError(
            f"backend triton serves precision {precision} for bfloat16, block_k from 32 and D from 17 (8-bit matrix units "
            f"take 32 numbers at a time), not {q.dtype}, {block_k} and {q.shape[-1]}; choose reference"
        )
    if precision in ("int8", "fp8") and not torch.compiler.is_compiling() and not has_fp8(q.device):
        raise ValueError(f"precision {precision} needs e4m3, so compute capability 8.9 or later; choose int8-bf16")
    return backend
