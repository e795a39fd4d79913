"""The whole operator: route, sparse branch, linear branch over what it skips, mixing, and back.

    O = alpha O_s + (1 - alpha) O_l   (or O_s + O_l without alpha)

On sm_90 `hopper` computes both branches and the mixture in one kernel. Elsewhere the linear branch writes (1 - alpha) O_l first and
the sparse branch adds to it as it ends: in plain Triton with phi(Q) H inside the sparse kernel its registers spill, and it took
0.82 ms where the two kernels take 0.13 and 0.42 (NOTES.md). Z_i is the sum of all z_j less those of the kept blocks; H_i comes
from `product`.

Saved for the backward: Q, K, V, O_s, L, the mask, H and Z, and the mean of K. Without a gradient nothing but O is written.

Legend: as in `sparse`; T_m query blocks, T_n key blocks, `kept` entries in a line of the table.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_kernels import hopper, linear, sparse
from sla2_kernels.launch import config
from sla2_kernels.lookup import lookup
from sla2_kernels.low_bit import Operands, empty_operands, flat_blocks, low_bit_rows, quantise_keys_values
from sla2_kernels.primitives import (
    LOG2E,
    blocks_of,
    head_offset,
    load_tile,
    of_head,
    on_device,
    power_of_two,
    store_tile,
)
from sla2_kernels.product import padded, product
from sla2_kernels.routing import Route, empty_route, key_mean, over_blocks, pool, route
from sla2_kernels.sparse import sparse_rows
from sla2_kernels.streams import Beside


@triton.jit
def _remaining_kernel(z, z_sum, table, count, total, entries, blocks, padded_blocks, D: tl.constexpr,
                      BD: tl.constexpr):  # fmt: skip
    line, i_bh = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BD)
    table, z = table + line * entries, z + i_bh * padded_blocks * D
    kept = tl.load(count + line)
    kept_sum = tl.zeros([BD], tl.float32)
    for first in tl.range(0, kept, 16):
        place = first + tl.arange(0, 16)
        block = tl.load(table + place, mask=place < kept, other=0)
        valid = (place[:, None] < kept) & (columns[None, :] < D)
        kept_sum += tl.sum(tl.load(z + block[:, None].to(tl.int64) * D + columns[None, :], mask=valid, other=0.0), 0)
    everything = tl.load(z_sum + i_bh * D + columns, mask=columns < D, other=0.0)
    tl.store(total + line * D + columns, tl.where(kept < blocks, everything - kept_sum, 0.0), mask=columns < D)


@triton.jit
def _mixed_kernel(q, k, v, k_scale, v_largest, table, count, alpha, o, o_sparse, lse,
                  stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
                  stride_ob, stride_oh, stride_on, H, N, entries, blocks, scale,
                  D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK_Q: tl.constexpr,
                  BLOCK_K: tl.constexpr, MIXED: tl.constexpr, WEIGHTED: tl.constexpr, SAVE: tl.constexpr,
                  LOW_BIT: tl.constexpr, FP8_PV: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    rows = i_m * BM + tl.arange(0, BM)
    i_t, row_blocks = i_m * BM // BLOCK_Q, tl.cdiv(N, BLOCK_Q)
    line = i_bh.to(tl.int64) * row_blocks + i_t
    q_tile = load_tile(q + head_offset(i_bh, H, stride_qb, stride_qh), rows, stride_qn, N, D, BD, True)  # [BM, BD]
    table += line * entries
    kept = tl.load(count + line)
    if LOW_BIT:
        v_head = v if FP8_PV else v + head_offset(i_bh, H, stride_vb, stride_vh)
        out, log_sum = low_bit_rows(
            q_tile, k, k_scale, v_head, v_largest + i_bh * D, i_bh * blocks, table, kept, scale, N, stride_vn,
            BM, D, BD, BLOCK_K, FP8_PV, TMA, STAGES)  # fmt: skip
    else:
        out, log_sum = sparse_rows(
            q_tile, of_head(k, i_bh, H, stride_kb, stride_kh, TMA), of_head(v, i_bh, H, stride_vb, stride_vh, TMA),
            i_bh // H, i_bh % H, table, table, kept, scale * LOG2E, N, stride_kn, stride_vn,
            BM, D, BD, BN, BLOCK_K, False, TMA, STAGES)  # fmt: skip
    at = head_offset(i_bh, H, stride_ob, stride_oh)
    if SAVE:
        store_tile(o_sparse + at, out, rows, stride_on, N, D, BD)
        tl.store(lse + i_bh.to(tl.int64) * N + rows, log_sum / LOG2E, mask=rows < N)
    if MIXED:  # the linear branch has written its share
        if WEIGHTED:
            out *= tl.load(alpha + (i_bh % H) * row_blocks + i_t)
        out += load_tile(o + at, rows, stride_on, N, D, BD, True)
        store_tile(o + at, out, rows, stride_on, N, D, BD)


@dataclass
class Settings:
    """Everything about an attention but its tensors; see `sla2_attention`."""

    kept: int
    block_q: int
    block_k: int
    feature_map: str
    smooth_phi: bool
    precision: str


@dataclass
class Saved:
    """What a backward needs beside the inputs: O_s, L, mask (B, H, T_m, T_n), H, Z, mean of K (B * H, D)."""

    sparse: Tensor
    lse: Tensor
    mask: Tensor
    state: Tensor
    total: Tensor
    mean: Tensor


def low_bit_sparse(
    q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor], s: Settings
) -> tuple[Tensor, Tensor]:
    """O_s and L of the sparse branch alone; its keys are smooth already."""
    on_hopper = hopper.serves(q, k, v, s.block_q, s.block_k)
    low = empty_operands(k, v, s.block_k, s.precision)
    if low.low_values:
        largest = low.v_largest.view(v.shape[0], v.shape[1], v.shape[3])
        torch.linalg.vector_norm(v, torch.inf, dim=2, dtype=torch.float32, out=largest)
    quantise_keys_values(k, v, None, low, permuted=on_hopper)
    if on_hopper:
        o, _, lse = hopper.forward(q, k, v, tables, None, low, save=True)
        return o, lse
    return attend(q, k, v, tables, None, None, low, s, save=True)


def attend(q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor], o: Tensor | None, alpha: Tensor | None,
           low: Operands | None, s: Settings, save: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sparse branch; O_s and L, empty unless `save`.

    Args:
        tables: key blocks of each query block.
        o: the linear branch's share, to which alpha O_s, or O_s without alpha, is added in place.
        low: K8 and V8 in place of K and V.
    """
    mixed = o is not None
    B, H, N, D = q.shape
    blocks, BD = triton.cdiv(N, s.block_k), power_of_two(D)
    o_sparse = torch.empty_like(q) if save else q.new_empty(0)
    lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device) if save else o_sparse
    table, count = tables
    c = config("low_bit_forward" if low else "sparse_forward", q, BD, s.block_q, s.block_k)
    if low:
        k_scale, v_largest = low.k_scale, low.v_largest
        tma, k_in, v_in = flat_blocks(low.k8, low.v8)
    else:
        tma, k_in, v_in = blocks_of(c.BN, BD, k, v)
        k_scale = v_largest = count
    out = o if mixed else o_sparse
    with on_device(q):
        _mixed_kernel[(triton.cdiv(N, c.BM), B * H)](
            q, k_in, v_in, k_scale, v_largest, table, count, count if alpha is None else alpha, out, o_sparse, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], H, N, table.shape[-1], blocks, D**-0.5,
            D=D, BD=BD, BM=c.BM, BN=c.BN, BLOCK_Q=s.block_q, BLOCK_K=s.block_k, MIXED=mixed, WEIGHTED=alpha is not None,
            SAVE=save, LOW_BIT=low is not None, FP8_PV=low is not None and low.low_values, TMA=tma, STAGES=c.num_stages,
            num_warps=c.num_warps, num_stages=c.num_stages)  # fmt: skip
    return o_sparse, lse


def both_branches(q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor], state: Tensor, total: Tensor,
                  alpha: Tensor | None, low: Operands | None, s: Settings, save: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """O, and O_s and L with `save`, from a choice of blocks and the linear branch's sums H and Z."""
    if hopper.serves(q, k, v, s.block_q, s.block_k):
        branch = hopper.LinearBranch(state, total, alpha, s.feature_map)
        return hopper.forward(q, k, v, tables, branch, low, save)
    o = linear.rows_output(q, state, total, alpha, s.block_q, s.feature_map)
    return o, *attend(q, k, v, tables, o, alpha, low, s, save)


def remaining(z: Tensor, tables: tuple[Tensor, Tensor], blocks: int, out: Tensor) -> None:
    """Write Z (B * H, T_m, D): the sum of all z (B * H, T, D) less those of each query block's kept blocks; zero if it keeps all."""
    table, count = tables
    heads, rows = count.shape
    with on_device(z):
        _remaining_kernel[(rows, heads)](
            z, over_blocks(z), table, count, out, table.shape[-1], blocks, z.shape[1], D=z.shape[-1],
            BD=power_of_two(z.shape[-1]), num_warps=4)  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None, projections: tuple[Tensor, Tensor] | None,
            mask: Tensor | None, s: Settings, save: bool) -> tuple[Tensor, Saved]:  # fmt: skip
    """O (B, H, N, D) and what a backward needs (O_s and L are empty unless `save`).

    Args:
        q, k, v: (B, H, N, D), last dimension contiguous.
        alpha: (H, T_m) fp32; None adds the branches.
        projections: of the router, (D, D) each; None for the identity.
        mask: (B, H, T_m, T_n) bool in place of routing.
    """
    B, H, N, D = q.shape
    rows, blocks = triton.cdiv(N, s.block_q), triton.cdiv(N, s.block_k)
    on_hopper = hopper.serves(q, k, v, s.block_q, s.block_k)
    low = None if s.precision == "none" else empty_operands(k, v, s.block_k, s.precision)
    pooled = pool(k, s.block_k)
    mean = key_mean(pooled, N, s.block_k)
    # Routing is many small kernels and runs beside the block states; Z and quantisation are traffic and run beside the product,
    # which is arithmetic.
    if mask is None:
        routing = Beside(q)
        chosen = empty_route(B * H, rows, blocks, s.kept, q.dtype, q.device)
        with routing:
            route(pool(q, s.block_q), pooled, mean, projections, s.kept, chosen)
    else:
        chosen = Route(mask.flatten(0, 1), lookup(mask), padded(~mask, k.dtype))
    largest = low.v_largest if low is not None and low.low_values else None
    h, z = linear.block_states(k, v, s.block_k, s.feature_map, mean if s.smooth_phi else None, largest)
    total = torch.empty(B * H, rows, D, dtype=torch.float32, device=q.device)
    if mask is None:
        routing.done()
    summing = Beside(q)
    with summing:
        remaining(z, chosen.tables, blocks, total)
    if low is not None:
        quantising = Beside(q, lane=1)
        with quantising:
            quantise_keys_values(k, v, mean, low, permuted=on_hopper)
    state = product(chosen.weight, h.flatten(2)).view(B * H, -1, D, D)
    summing.done()
    if low is not None:
        quantising.done()
    o, o_sparse, lse = both_branches(q, k, v, chosen.tables, state, total, alpha, low, s, save)
    return o, Saved(o_sparse, lse, chosen.mask.unflatten(0, (B, H)), state, total, mean)


def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None, saved: Saved,
             s: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and of alpha, all in full precision.

    After a low-bit forward L is formed again from unquantised scores: with the forward's own, P = exp(S - L) would not sum to
    one in a row, and a constant added to a row of S, which changes nothing, would get a gradient.
    """
    mask = saved.mask
    tables = lookup(mask)
    lse = saved.lse
    if s.precision != "none":
        _, lse = sparse.forward(q, k, v, tables, None, s.block_q, s.block_k)
    mixture = linear.Mixture(saved.sparse, alpha, saved.mean if s.smooth_phi else None)
    grads = linear.backward(
        do, q, k, v, padded(~mask, k.dtype), saved.state, saved.total, s.block_q, s.block_k, s.feature_map, mixture)  # fmt: skip
    part = sparse.LinearPart(alpha, (grads.q, grads.k, grads.v), grads.column_mean)
    dq, dk, dv, _ = sparse.backward(
        do, q, k, v, saved.sparse, lse, tables, lookup(mask, transposed=True), None, s.block_q, s.block_k,
        part)  # fmt: skip
    return dq, dk, dv, None if alpha is None else grads.alpha.unflatten(0, mask.shape[:2]).sum(0)
