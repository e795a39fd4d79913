"""Softmax attention over chosen key blocks, or over all of them with a soft block mask.

    S = Q K^T / sqrt(D) (+ log M per block),  P = softmax over the kept blocks,  O = P V,  L = log-sum-exp of a row of S
    dV = P^T dO,  dS = P (dO V^T - rowsum(dO O)),  dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D),  dlog M = block sum of dS

Saved for the backward: Q, K, V, O, L and the lookup tables; P is formed again tile by tile. With log M the query
kernel also sums the rows of P and of dS, which should be one and zero, and by these the key kernel corrects its own, whose blocks it sums.

Legend: B batch, H heads, N tokens, D head size, BD the power of two that holds D, BLOCK_Q and BLOCK_K tokens of the mask's blocks,
BM and BN tokens of a tile. A table line ascends, so a ragged last key block comes last and every other step needs no mask.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_kernels import hopper
from sla2_kernels.launch import config
from sla2_kernels.primitives import (
    LOG2E,
    LOWEST,
    blocks_of,
    dot,
    head_offset,
    load_block,
    load_tile,
    of_head,
    on_device,
    power_of_two,
    store_tile,
)


@triton.jit
def tile_start(table, step, BN: tl.constexpr, BLOCK: tl.constexpr, SOFT: tl.constexpr):
    """First token of tile `step` among the blocks that `table` lists, laid end to end; SOFT: among all blocks."""
    return step * BN if SOFT else tl.load(table + step * BN // BLOCK) * BLOCK + step * BN % BLOCK


@triton.jit
def attend(q, acc, top, total, k, v, i_b, i_h, table, bias, begin, end, scale, N, stride_kn, stride_vn,
           D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BLOCK_K: tl.constexpr, SOFT: tl.constexpr,
           TMA: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Online softmax over the key tiles begin .. end of the kept blocks; `top` and `scale` are in units of log2."""
    for step in tl.range(begin, end, num_stages=STAGES):
        start = tile_start(table, step, BN, BLOCK_K, SOFT)
        k_tile = load_block(k, i_b, i_h, start, stride_kn, N, D, BD, BN, TMA, MASKED)  # [BN, BD]
        scores = dot(q, tl.trans(k_tile))  # [BM, BN]
        if MASKED:
            scores = tl.where(start + tl.arange(0, BN)[None, :] < N, scores, float("-inf"))
        shift = tl.load(bias + step * BN // BLOCK_K).to(tl.float32) * LOG2E if SOFT else 0.0
        new_top = tl.maximum(top, tl.max(scores, 1) * scale + shift)  # [BM]
        p = tl.math.exp2(scores * scale - (new_top - shift)[:, None])  # one fused multiply-add a score
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v_tile = load_block(v, i_b, i_h, start, stride_vn, N, D, BD, BN, TMA, MASKED)  # [BN, BD]
        acc = dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None])
        top = new_top
    return acc, top, total


@triton.jit
def clean_blocks(table, count, N, BLOCK_K: tl.constexpr, SOFT: tl.constexpr):
    """How many of the kept blocks come before the ragged last one."""
    last = count - 1 if SOFT else tl.load(table + count - 1, mask=count > 0, other=0)
    return tl.where((last + 1) * BLOCK_K > N, count - 1, count)


@triton.jit
def sparse_rows(q_tile, k, v, i_b, i_h, table, bias, count, scale, N, stride_kn, stride_vn,
                BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BLOCK_K: tl.constexpr,
                SOFT: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Output rows [BM, BD] fp32 of one query tile and their log-sum-exp [BM], base 2."""
    acc = tl.zeros([BM, BD], tl.float32)
    top = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    clean = clean_blocks(table, count, N, BLOCK_K, SOFT) * (BLOCK_K // BN)
    acc, top, total = attend(
        q_tile, acc, top, total, k, v, i_b, i_h, table, bias, 0, clean, scale, N, stride_kn, stride_vn,
        D, BD, BN, BLOCK_K, SOFT, TMA, False, STAGES)  # fmt: skip
    acc, top, total = attend(
        q_tile, acc, top, total, k, v, i_b, i_h, table, bias, clean, count * (BLOCK_K // BN), scale, N, stride_kn,
        stride_vn, D, BD, BN, BLOCK_K, SOFT, TMA, True, 1)  # fmt: skip
    return acc / total[:, None], top + tl.math.log2(total)


@triton.jit
def _forward_kernel(q, k, v, table, count, bias, o, lse,
                    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
                    stride_ob, stride_oh, stride_on, H, NQ, N, entries, scale,
                    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK_Q: tl.constexpr,
                    BLOCK_K: tl.constexpr, SOFT: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    rows = i_m * BM + tl.arange(0, BM)
    line = i_bh.to(tl.int64) * tl.cdiv(NQ, BLOCK_Q) + i_m * BM // BLOCK_Q
    q_tile = load_tile(q + head_offset(i_bh, H, stride_qb, stride_qh), rows, stride_qn, NQ, D, BD, True)  # [BM, BD]
    kept = entries if SOFT else tl.load(count + line)
    out, log_sum = sparse_rows(
        q_tile, of_head(k, i_bh, H, stride_kb, stride_kh, TMA), of_head(v, i_bh, H, stride_vb, stride_vh, TMA),
        i_bh // H, i_bh % H, table + line * entries, bias + line * entries, kept, scale * LOG2E, N,
        stride_kn, stride_vn, BM, D, BD, BN, BLOCK_K, SOFT, TMA, STAGES)  # fmt: skip
    store_tile(o + head_offset(i_bh, H, stride_ob, stride_oh), out, rows, stride_on, NQ, D, BD)
    tl.store(lse + i_bh.to(tl.int64) * NQ + rows, log_sum / LOG2E, mask=rows < NQ)


@triton.jit
def product_over_channels(rows, columns, SOFT: tl.constexpr):
    """rows columns^T, [BM, BN]. SOFT: as the key kernel rounds it, which corrects its own P and dS by sums of these.

    It forms columns rows^T, in which fp32's three TF32 products come in another order; bf16's one is the same either way.
    """
    return tl.trans(dot(columns, tl.trans(rows))) if SOFT and rows.dtype == tl.float32 else dot(rows, tl.trans(columns))


@triton.jit
def query_gradient(q_tile, do_tile, grad, mass, residue, lse2, delta, k, v, i_b, i_h, table, bias, begin, end, scale, N,
                   stride_kn, stride_vn, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BLOCK_K: tl.constexpr,
                   SOFT: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Add dS K over the key tiles begin .. end to `grad` [BM, BD]; SOFT: P's row sums to `mass`, dS's to `residue` [BM]."""
    for step in tl.range(begin, end, num_stages=STAGES):
        start = tile_start(table, step, BN, BLOCK_K, SOFT)
        k_tile = load_block(k, i_b, i_h, start, stride_kn, N, D, BD, BN, TMA, MASKED)  # [BN, BD]
        v_tile = load_block(v, i_b, i_h, start, stride_vn, N, D, BD, BN, TMA, MASKED)  # [BN, BD]
        scores = product_over_channels(q_tile, k_tile, SOFT)  # [BM, BN]
        if MASKED:
            scores = tl.where(start + tl.arange(0, BN)[None, :] < N, scores, float("-inf"))
        shift = tl.load(bias + step * BN // BLOCK_K).to(tl.float32) * LOG2E if SOFT else 0.0
        p = tl.math.exp2(scores * scale - (lse2 - shift)[:, None])
        ds = p * (product_over_channels(do_tile, v_tile, SOFT) - delta[:, None])  # [BM, BN]
        if SOFT:
            mass += tl.sum(p, 1)
            residue += tl.sum(ds, 1)
        grad = dot(ds.to(k_tile.dtype), k_tile, grad)
    return grad, mass, residue


@triton.jit
def _query_backward_kernel(q, k, v, o, do, lse, table, count, bias, alpha, dq, delta, shifted, inverse,
                           stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
                           stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
                           stride_db, stride_dh, stride_dn, stride_gb, stride_gh, stride_gn, H, NQ, N, entries, scale,
                           D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK_Q: tl.constexpr,
                           BLOCK_K: tl.constexpr, SOFT: tl.constexpr, MIXED: tl.constexpr, WEIGHTED: tl.constexpr,
                           TMA: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    rows = i_m * BM + tl.arange(0, BM)
    row_blocks = tl.cdiv(NQ, BLOCK_Q)
    line = i_bh.to(tl.int64) * row_blocks + i_m * BM // BLOCK_Q
    q_tile = load_tile(q + head_offset(i_bh, H, stride_qb, stride_qh), rows, stride_qn, NQ, D, BD, True)  # [BM, BD]
    o_tile = load_tile(o + head_offset(i_bh, H, stride_ob, stride_oh), rows, stride_on, NQ, D, BD, True)
    do_tile = load_tile(do + head_offset(i_bh, H, stride_db, stride_dh), rows, stride_dn, NQ, D, BD, True)
    at = i_bh.to(tl.int64) * NQ + rows
    rows_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)  # [BM]
    if not SOFT:
        tl.store(delta + at, rows_delta, mask=rows < NQ)
    lse2 = tl.load(lse + at, mask=rows < NQ, other=float("inf")) * LOG2E
    if WEIGHTED:  # dO of this branch is alpha dO: P alpha = exp2(S - (L - log2 alpha))
        lse2 -= tl.math.log2(tl.load(alpha + (i_bh % H) * row_blocks + i_m * BM // BLOCK_Q))
    tl.store(shifted + at, lse2, mask=rows < NQ)
    k, v = of_head(k, i_bh, H, stride_kb, stride_kh, TMA), of_head(v, i_bh, H, stride_vb, stride_vh, TMA)
    table, bias = table + line * entries, bias + line * entries
    kept = entries if SOFT else tl.load(count + line)
    clean = clean_blocks(table, kept, N, BLOCK_K, SOFT) * (BLOCK_K // BN)
    grad = tl.zeros([BM, BD], tl.float32)
    mass, residue = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    grad, mass, residue = query_gradient(
        q_tile, do_tile, grad, mass, residue, lse2, rows_delta, k, v, i_bh // H, i_bh % H, table, bias, 0, clean,
        scale * LOG2E, N, stride_kn, stride_vn, D, BD, BN, BLOCK_K, SOFT, TMA, False, STAGES)  # fmt: skip
    grad, mass, residue = query_gradient(
        q_tile, do_tile, grad, mass, residue, lse2, rows_delta, k, v, i_bh // H, i_bh % H, table, bias, clean,
        kept * (BLOCK_K // BN), scale * LOG2E, N, stride_kn, stride_vn,
        D, BD, BN, BLOCK_K, SOFT, TMA, True, 1)  # fmt: skip
    if SOFT:
        # delta and L carry roundings of their own, delta that of O to bf16. They are one number a row, so in a block's sum of dS they
        # add up where the true terms cancel. With these the key kernel's rows of P sum to one, and its rows of dS to zero.
        mass = tl.where(rows < NQ, mass, 1.0)  # rows past the end have P = 0
        tl.store(delta + at, rows_delta + residue / mass, mask=rows < NQ)
        tl.store(inverse + at, 1 / mass, mask=rows < NQ)
    dq += head_offset(i_bh, H, stride_gb, stride_gh)
    grad *= scale
    if MIXED:  # the linear branch has written its part
        grad += load_tile(dq, rows, stride_gn, NQ, D, BD, True)
    store_tile(dq, grad, rows, stride_gn, NQ, D, BD)


@triton.jit
def _key_backward_kernel(q, k, v, do, shifted, delta, inverse, table, count, bias, grad_bias, column_mean, dk, dv,
                         stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
                         stride_vb, stride_vh, stride_vn, stride_db, stride_dh, stride_dn,
                         stride_gb, stride_gh, stride_gn, stride_wb, stride_wh, stride_wn, H, NQ, N, entries, blocks, scale,
                         D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK_Q: tl.constexpr,
                         BLOCK_K: tl.constexpr, SOFT: tl.constexpr, MIXED: tl.constexpr, CENTRED: tl.constexpr,
                         TMA: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    i_bh = tl.program_id(1)
    i_n = tl.program_id(0) * BN // BLOCK_K
    keys = tl.program_id(0) * BN + tl.arange(0, BN)
    k_tile = load_tile(k + head_offset(i_bh, H, stride_kb, stride_kh), keys, stride_kn, N, D, BD, True)  # [BN, BD]
    v_tile = load_tile(v + head_offset(i_bh, H, stride_vb, stride_vh), keys, stride_vn, N, D, BD, True)
    q, do = of_head(q, i_bh, H, stride_qb, stride_qh, TMA), of_head(do, i_bh, H, stride_db, stride_dh, TMA)
    first = i_bh.to(tl.int64) * NQ
    line = i_bh.to(tl.int64) * blocks + i_n
    grad_k = tl.zeros([BN, BD], tl.float32)
    grad_v = tl.zeros([BN, BD], tl.float32)
    block_sum = tl.full([], 0.0, tl.float32)
    seen = entries if SOFT else tl.load(count + line)
    for step in tl.range(0, seen * (BLOCK_Q // BM), num_stages=STAGES):
        start = tile_start(table + line * entries, step, BM, BLOCK_Q, SOFT)
        q_tile = load_block(q, i_bh // H, i_bh % H, start, stride_qn, NQ, D, BD, BM, TMA, True)  # [BM, BD]
        do_tile = load_block(do, i_bh // H, i_bh % H, start, stride_dn, NQ, D, BD, BM, TMA, True)  # [BM, BD]
        # Rows past the end get P = exp2(-inf) = 0. Key rows past the end touch only gradients that are not stored.
        rows = start + tl.arange(0, BM)
        lse2 = tl.load(shifted + first + rows, mask=rows < NQ, other=float("inf"))  # [BM]
        row_delta = tl.load(delta + first + rows, mask=rows < NQ, other=0.0)
        if SOFT:
            block = (i_bh.to(tl.int64) * entries + step * BM // BLOCK_Q) * blocks + i_n
            lse2 -= tl.load(bias + block).to(tl.float32) * LOG2E
        p = tl.math.exp2(dot(k_tile, tl.trans(q_tile)) * (scale * LOG2E) - lse2[None, :])  # [BN, BM]
        if SOFT:
            p *= tl.load(inverse + first + rows, mask=rows < NQ, other=0.0)[None, :]
        grad_v = dot(p.to(do_tile.dtype), do_tile, grad_v)
        ds = p * (dot(v_tile, tl.trans(do_tile)) - row_delta[None, :])
        if SOFT:  # one addition to memory a block, so that two programs' give the same in either order
            block_sum += tl.sum(tl.where(keys[:, None] < N, ds, 0.0))
            whole = (step + 1) * BM % BLOCK_Q == 0
            tl.atomic_add(grad_bias + block, block_sum, mask=whole)
            block_sum = tl.where(whole, 0.0, block_sum)
        grad_k = dot(ds.to(q_tile.dtype), q_tile, grad_k)
    dk += head_offset(i_bh, H, stride_gb, stride_gh)
    dv += head_offset(i_bh, H, stride_wb, stride_wh)
    grad_k *= scale
    if MIXED:  # the linear branch has written its part
        grad_k += load_tile(dk, keys, stride_gn, N, D, BD, True)
        grad_v += load_tile(dv, keys, stride_wn, N, D, BD, True)
    if CENTRED:  # its keys were smoothed; the softmax branch is blind to that, so only this part has a mean to lose
        columns = tl.arange(0, BD)
        grad_k -= tl.load(column_mean + i_bh * D + columns, mask=columns < D, other=0.0)[None, :]
    store_tile(dk, grad_k, keys, stride_gn, N, D, BD)
    store_tile(dv, grad_v, keys, stride_wn, N, D, BD)


def forward(q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor] | None, log_mask: Tensor | None,
            block_q: int, block_k: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """O (B, H, NQ, D) and L (B, H, NQ) over the blocks of a lookup table, or over all blocks with `log_mask` added.

    Args:
        q: (B, H, NQ, D); k, v: (B, H, N, D), last dimension contiguous.
        tables: key blocks of each query block, see `lookup`; None if `log_mask` (B, H, T_m, T_n) is given.
    """
    if tables is not None and hopper.serves(q, k, v, block_q, block_k):
        o, _, lse = hopper.forward(q, k, v, tables, None, None, save=True)
        return o, lse
    B, H, NQ, D = q.shape
    o, lse = torch.empty_like(q), torch.empty(B, H, NQ, dtype=torch.float32, device=q.device)
    soft = tables is None
    table, count = (log_mask, log_mask) if soft else tables
    BD = power_of_two(D)
    c = config("sparse_forward", q, BD, block_q, block_k)
    tma, k_in, v_in = blocks_of(c.BN, BD, k, v)
    with on_device(q):
        _forward_kernel[(triton.cdiv(NQ, c.BM), B * H)](
            q, k_in, v_in, table, count, log_mask if soft else table, o, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], H, NQ, k.shape[2], table.shape[-1],
            D**-0.5, D=D, BD=BD, BM=c.BM, BN=c.BN, BLOCK_Q=block_q, BLOCK_K=block_k, SOFT=soft, TMA=tma,
            STAGES=c.num_stages, num_warps=c.num_warps, num_stages=c.num_stages)  # fmt: skip
    return o, lse


@dataclass
class LinearPart:
    """What the fused backward hands over: alpha (H, T_m) fp32, gradients that the linear branch wrote, its mean dK."""

    alpha: Tensor | None
    gradients: tuple[Tensor, Tensor, Tensor]
    column_mean: Tensor | None


def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, tables: tuple[Tensor, Tensor] | None,
             back: tuple[Tensor, Tensor] | None, log_mask: Tensor | None, block_q: int, block_k: int,
             linear: LinearPart | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and, where it is given, of log_mask.

    Args:
        do: gradient of O, or of alpha O + ... with `linear`.
        tables, back: lookup tables of the mask and of its transpose; None with `log_mask`.
        linear: gradients to which these are added in place.
    """
    B, H, NQ, D = q.shape
    N = k.shape[2]
    rows, blocks = triton.cdiv(NQ, block_q), triton.cdiv(N, block_k)
    soft, mixed = tables is None, linear is not None
    dq, dk, dv = linear.gradients if mixed else (torch.empty_like(x) for x in (q, k, v))
    delta, shifted = torch.empty_like(lse), torch.empty_like(lse)
    inverse = torch.empty_like(lse) if soft else None  # of P's row sums
    (table, count), (table_back, count_back) = ((log_mask, log_mask),) * 2 if soft else (tables, back)
    bias = log_mask if soft else table
    grad_bias = torch.zeros_like(log_mask, dtype=torch.float32) if soft else None
    weighted = mixed and linear.alpha is not None
    centred = mixed and linear.column_mean is not None
    BD = power_of_two(D)
    shared = {"D": D, "BD": BD, "BLOCK_Q": block_q, "BLOCK_K": block_k, "SOFT": soft, "MIXED": mixed}
    with on_device(q):
        c = config("query_backward", q, BD, block_q, block_k)
        tma, k_in, v_in = blocks_of(c.BN, BD, k, v)
        _query_backward_kernel[(triton.cdiv(NQ, c.BM), B * H)](
            q, k_in, v_in, o, do, lse, table, count, bias, linear.alpha if weighted else lse, dq, delta, shifted,
            inverse if soft else lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], *do.stride()[:3],
            *dq.stride()[:3], H, NQ, N, table.shape[-1], D**-0.5, BM=c.BM, BN=c.BN, WEIGHTED=weighted, TMA=tma, **shared,
            STAGES=c.num_stages, num_warps=c.num_warps, num_stages=c.num_stages)  # fmt: skip
        c = config("key_backward", q, BD, block_q, block_k)
        tma, q_in, do_in = blocks_of(c.BM, BD, q, do)
        _key_backward_kernel[(triton.cdiv(N, c.BN), B * H)](
            q_in, k, v, do_in, shifted, delta, inverse, table_back, count_back, bias, grad_bias,
            linear.column_mean if centred else lse, dk, dv, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *do.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], H, NQ, N, rows, blocks, D**-0.5, BM=c.BM, BN=c.BN, CENTRED=centred, TMA=tma, **shared,
            STAGES=c.num_stages, num_warps=c.num_warps, num_stages=c.num_stages)  # fmt: skip
    return dq, dk, dv, grad_bias
