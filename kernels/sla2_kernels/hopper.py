"""The forward on Hopper (sm_90): sparse branch, linear branch and mixing in one warp-specialised Gluon kernel.

One program a multiprocessor walks over the query blocks. A warp fetches tiles by TMA into rings of shared memory; two groups of
four warps take 64 of a block's 128 rows each. A group issues Q K^T of the next key block, then P V of this one, and computes the
softmax of the next while the tensor cores still work on the latter. The two groups run apart from each other, so one's softmax
also hides behind the other's products. The plain kernels (`sparse`, `fused`, `linear`) compute the same on every GPU.

    O_s = softmax(Q K^T / sqrt(D)) V over the kept blocks,  O_l = phi(Q) H / (phi(Q) Z),  O = alpha O_s + (1 - alpha) O_l

The last kept block comes first: a table line ascends, so it alone can be ragged, and no other step needs a mask. In low bit
(`low_bit`) Q is quantised where it is used, and V8's keys lie in the order in which P's registers are an 8-bit operand. The loops over
key blocks are `hopper_bf16` and `hopper_low_bit`, by the type of P and V.

Legend: HALF which 64 rows; tiles are of 64 rows, those of K of two key blocks; BD the power of two that holds D; STAGES key tiles in flight; `turn` counts key
tiles and `number` query blocks since the program began: ring slot and barrier phase follow from them. A ring has a barrier `full`
that TMA completes and a barrier `empty` at which both groups arrive.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sla2_kernels import hopper_bf16, hopper_low_bit, launch
from sla2_kernels.hopper_low_bit import LOG2_448
from sla2_kernels.hopper_rows import ring, slot_of
from sla2_kernels.primitives import INTERPRETED, on_device, tma_aligned

if TYPE_CHECKING:
    from sla2_kernels.low_bit import Operands

LOG2E = gl.constexpr(1.4426950408889634)
TINY = gl.constexpr(1e-12)  # scale of a row of zeros
BLOCK_Q, BLOCK_K = 128, 64
# Registers a thread: two groups of 128 threads with 240 and a warp, counted as a group, with 24 fill a multiprocessor's 65,536.
# At the launch each of the 12 warps has the same share.
GROUP_REGISTERS, FETCH_REGISTERS = gl.constexpr(240), gl.constexpr(24)
LAUNCH_REGISTERS = 168
STAGES = {"none": 2, "int8": 3, "fp8": 3, "int8-bf16": 2}


@gluon.jit
def fetch_keys(k, i_bh, H, first, second, both, blocks, ring, slot, parity, LOW: gl.constexpr):
    """Ask for the tiles of two key blocks, or of the first, once their place in the ring is free.

    A box of TMA is at most 128 bytes wide, so bf16 comes in two parts of the channels. LOW: the blocks lie end to end.
    """
    tiles, full, empty = ring
    WIDTH: gl.constexpr = k.block_type.shape[-1]
    PARTS: gl.constexpr = tiles.shape[2] // WIDTH
    mbarrier.wait(empty.index(slot), parity ^ 1)
    mbarrier.expect(full.index(slot), PARTS * k.block_type.nbytes, pred=both == 0)
    mbarrier.expect(full.index(slot), 2 * PARTS * k.block_type.nbytes, pred=both != 0)
    for half in gl.static_range(2):
        block = second if half == 1 else first
        rows = tiles.index(slot).slice(64 * half, 64, 0)
        wanted = both != 0 if half == 1 else True
        for part in gl.static_range(PARTS):
            at = [i_bh * blocks + block, 0, 0] if LOW else [i_bh // H, i_bh % H, block * 64, 64 * part]
            box = rows.slice(WIDTH * part, WIDTH, 1)
            tma.async_copy_global_to_shared(k, at, full.index(slot), box, pred=wanted)


@gluon.jit
def fetch_values(v, i_bh, H, first, second, both, blocks, ring, slot, parity, LOW: gl.constexpr):
    """As `fetch_keys`; each block has a tile of its own."""
    tiles, full, empty = ring
    mbarrier.wait(empty.index(slot), parity ^ 1)
    mbarrier.expect(full.index(slot), v.block_type.nbytes, pred=both == 0)
    mbarrier.expect(full.index(slot), 2 * v.block_type.nbytes, pred=both != 0)
    for half in gl.static_range(2):
        block = second if half == 1 else first
        at = [i_bh * blocks + block, 0, 0] if LOW else [i_bh // H, i_bh % H, block * 64, 0]
        wanted = both != 0 if half == 1 else True
        tma.async_copy_global_to_shared(v, at, full.index(slot), tiles.index(2 * slot + half), pred=wanted)


@gluon.jit
def produce(q, k, v, h, q_ring, k_ring, v_ring, h_ring, table, count, H, T_m, blocks, query_blocks, entries, LINEAR: gl.constexpr,
            LOW_QK: gl.constexpr, LOW_PV: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    q_tiles, q_full, q_empty = q_ring
    h_tile, h_full, h_empty = h_ring
    turn, number = 0, 0
    for i in range(gl.program_id(0), query_blocks, gl.num_programs(0)):
        i_bh = i // T_m
        row = i % T_m * 128
        slot, parity = slot_of(number, 2)
        mbarrier.wait(q_empty.index(slot), parity ^ 1)
        mbarrier.expect(q_full.index(slot), 2 * q.block_type.nbytes)
        for half in gl.static_range(2):
            tile = q_tiles.index(2 * slot + half)
            tma.async_copy_global_to_shared(q, [i_bh // H, i_bh % H, row + half * 64, 0], q_full.index(slot), tile)
        kept = gl.load(count + i)
        line = table + i.to(gl.int64) * entries
        # The last block and the first, which is the last once more if there is no other: then its scores are masked.
        first, second = gl.load(line + kept - 1), gl.load(line)
        both = 1
        for step in range((kept + 1) // 2):
            slot, parity = slot_of(turn, STAGES)
            fetch_keys(k, i_bh, H, first, second, both, blocks, k_ring, slot, parity, LOW_QK)
            fetch_values(v, i_bh, H, first, second, both, blocks, v_ring, slot, parity, LOW_PV)
            both = (2 * step + 3 < kept).to(gl.int32)
            first = gl.load(line + 2 * step + 1, mask=2 * step + 2 < kept, other=0)
            second = gl.load(line + 2 * step + 2, mask=both != 0, other=0)
            turn += 1
        if LINEAR:
            mbarrier.wait(h_empty.index(0), (number & 1) ^ 1)
            mbarrier.expect(h_full.index(0), h.block_type.nbytes)
            tma.async_copy_global_to_shared(h, [i, 0, 0], h_full.index(0), h_tile.index(0))
        number += 1  # noqa: SIM113 - Gluon has no enumerate


@gluon.jit
def feature(x, valid, FEATURE: gl.constexpr):
    """phi of rows, fp32; zero where not valid."""
    if FEATURE == "softmax":
        x = gl.where(valid, x, float("-inf"))
        e = gl.exp2((x - gl.max(x, 1)[:, None]) * LOG2E)
        phi = e * (1 / gl.sum(e, 1))[:, None]
    elif FEATURE == "elu":
        phi = gl.where(x > 0, x + 1, gl.exp2(gl.minimum(x, 0.0) * LOG2E))
    else:
        phi = gl.maximum(x, 0.0)
    return gl.where(valid, phi, 0.0)


@gluon.jit
def quantise_rows(x, INT8: gl.constexpr):
    """Rows in 8 bits, one scale a row."""
    scale = gl.maximum(gl.max(gl.abs(x), 1) / (127.0 if INT8 else 448.0), TINY)
    steps = x * (1 / scale)[:, None]
    # The cast to e4m3 rounds and saturates by itself.
    low = (steps + gl.where(steps >= 0, 0.5, -0.5)).to(gl.int8) if INT8 else steps.to(gl.float8e4nv)
    return low, scale


@gluon.jit
def consume(HALF: gl.constexpr, o, o_sparse, q_ring, k_ring, v_ring, h_ring, table, count, k_scale, v_largest,
            alpha, total, lse, H, NQ, N, T_m, blocks, query_blocks, entries, scale,
            D: gl.constexpr, BD: gl.constexpr, LINEAR: gl.constexpr, WEIGHTED: gl.constexpr, SAVE: gl.constexpr,
            LOW_QK: gl.constexpr, LOW_PV: gl.constexpr, FEATURE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    q_tiles, q_full, q_empty = q_ring
    h_tile, h_full, h_empty = h_ring
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32 if LOW_QK else 16])
    # Q is the left operand of products with one key block or with two: the same registers.
    KEYS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64 if LOW_PV else 128, 32 if LOW_QK else 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 32 if LOW_PV else 16])
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    Q_ROWS: gl.constexpr = gl.DotOperandLayout(0, WIDE, 2)
    LINE: gl.constexpr = gl.SliceLayout(1, OUT)  # one number a row
    SCORE_LINE: gl.constexpr = gl.SliceLayout(1, SCORES)
    SHIFT: gl.constexpr = LOG2_448 if LOW_PV else 0.0
    columns = gl.arange(0, BD, layout=gl.SliceLayout(0, OUT))
    turn, number = 0, 0
    for i in range(gl.program_id(0), query_blocks, gl.num_programs(0)):
        i_bh, i_m = i // T_m, i % T_m
        kept = gl.load(count + i)
        line = table + i.to(gl.int64) * entries
        k_scales = k_scale + i_bh * blocks
        factor = gl.full([64], scale, gl.float32, layout=SCORE_LINE)
        q_slot, q_parity = slot_of(number, 2)
        mbarrier.wait(q_full.index(q_slot), q_parity)
        q_rows = q_tiles.index(2 * q_slot + HALF)
        if LOW_QK:
            low, q_scale = quantise_rows(q_rows.load(OUT).to(gl.float32), k_ring[0].dtype == gl.int8)
            q = gl.convert_layout(low, gl.DotOperandLayout(0, KEYS, 4))
            factor *= gl.convert_layout(q_scale, SCORE_LINE)
        else:
            q = q_rows.load(gl.DotOperandLayout(0, KEYS, 2))
        if LOW_PV:
            state, turn = hopper_low_bit.attend(q, factor, k_ring, v_ring, k_scales, line, kept, turn, N, BD, STAGES)
        else:
            state, turn = hopper_bf16.attend(
                q, factor, k_ring, v_ring, k_scales, line, kept, turn, N, BD, LOW_QK, STAGES
            )
        if LINEAR:  # asked for before the last products, so that nobody waits for them
            q_columns = gl.arange(0, BD, layout=gl.SliceLayout(0, Q_ROWS))
            z = gl.load(total + i.to(gl.int64) * D + q_columns, mask=q_columns < D, other=0.0)
            if WEIGHTED:
                weight = gl.load(alpha + i_bh % H * T_m + i_m)
        if LOW_PV:
            acc, row_sum, top, turn = hopper_low_bit.finish(
                state, q, factor, k_ring, v_ring, k_scales, line, kept, turn, BD, STAGES)  # fmt: skip
        else:
            acc, row_sum, top, turn = hopper_bf16.finish(
                state, q, factor, k_ring, v_ring, k_scales, line, kept, turn, BD, LOW_QK, STAGES)  # fmt: skip
        out = acc * (1 / row_sum)[:, None]
        if LOW_PV:
            largest = gl.load(v_largest + i_bh * D + columns, mask=columns < D, other=0.0)
            out *= (largest / 448.0)[None, :]

        row = i_m * 128 + HALF * 64
        if SAVE:
            rows = row + gl.arange(0, 64, layout=LINE)
            log_sum = gl.convert_layout(top, LINE) - SHIFT + gl.log2(row_sum)
            gl.store(lse + i_bh.to(gl.int64) * NQ + rows, log_sum / LOG2E, mask=rows < NQ)
        if LINEAR:
            phi = feature(q_rows.load(Q_ROWS).to(gl.float32), q_columns[None, :] < D, FEATURE).to(gl.bfloat16)
            if SAVE:
                q_rows.store(out.to(gl.bfloat16))
                fence_async_shared()
                tma.async_copy_shared_to_global(o_sparse, [i_bh // H, i_bh % H, row, 0], q_rows)
            n = gl.convert_layout(gl.sum(phi.to(gl.float32) * z[None, :], 1), LINE)
            share = gl.where(n > 0, 1 / gl.where(n > 0, n, 1.0), 0.0)  # zero where every block is kept
            if WEIGHTED:
                out *= weight
                share *= 1 - weight
            mbarrier.wait(h_full.index(0), number & 1)
            nothing = gl.zeros([64, BD], gl.float32, layout=WIDE)
            sums = warpgroup_mma(phi, h_tile.index(0), nothing, use_acc=False, is_async=True)
            linear = warpgroup_mma_wait(0, deps=[sums])
            mbarrier.arrive(h_empty.index(0), count=1)
            # Named as one operation: left to the compiler, training and inference would round differently.
            out = gl.fma(
                gl.convert_layout(linear, OUT, assert_trivial=True), share[:, None].broadcast_to([64, BD]), out
            )
            if SAVE:
                tma.store_wait(0)
        # The group's own rows of Q are the stage for O: stores straight from the registers took a tenth longer.
        q_rows.store(out.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(o, [i_bh // H, i_bh % H, row, 0], q_rows)
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(q_slot), count=1)
        number += 1  # noqa: SIM113


@gluon.jit
def _hopper_kernel(q, k, v, h, o, o_sparse, table, count, k_scale, v_largest, alpha, total, lse, H, NQ, N, T_m, blocks, query_blocks, entries, scale, D: gl.constexpr, BD: gl.constexpr,
                   LINEAR: gl.constexpr, WEIGHTED: gl.constexpr, SAVE: gl.constexpr, LOW_QK: gl.constexpr,
                   LOW_PV: gl.constexpr, FEATURE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BD], gl.bfloat16)
    K_ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BD], k.dtype)
    V_SHAPE: gl.constexpr = [BD, 64] if LOW_PV else [64, BD]
    V_ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for(V_SHAPE, v.dtype)
    q_ring = ring(gl.bfloat16, ROWS, 2, 2, 64, BD)
    k_ring = ring(k.dtype, K_ROWS, STAGES, 1, 128, BD)
    v_ring = ring(v.dtype, V_ROWS, STAGES, 2, V_SHAPE[0], V_SHAPE[1])
    h_ring = ring(gl.bfloat16, ROWS, 1, 1, BD, BD)
    gl.warp_specialize(
        [
            (consume, (0, o, o_sparse, q_ring, k_ring, v_ring, h_ring, table, count, k_scale, v_largest, alpha, total,
                       lse, H, NQ, N, T_m, blocks, query_blocks, entries, scale, D, BD,
                       LINEAR, WEIGHTED, SAVE, LOW_QK, LOW_PV, FEATURE, STAGES)),
            (consume, (1, o, o_sparse, q_ring, k_ring, v_ring, h_ring, table, count, k_scale, v_largest, alpha, total,
                       lse, H, NQ, N, T_m, blocks, query_blocks, entries, scale, D, BD,
                       LINEAR, WEIGHTED, SAVE, LOW_QK, LOW_PV, FEATURE, STAGES)),
            (produce, (q, k, v, h, q_ring, k_ring, v_ring, h_ring, table, count, H, T_m, blocks, query_blocks, entries,
                       LINEAR, LOW_QK, LOW_PV, STAGES)),
        ],
        [4, 1], [GROUP_REGISTERS, FETCH_REGISTERS])  # fmt: skip


@dataclass
class LinearBranch:
    """H (B * H, T_m, D, D) bf16, Z (B * H, T_m, D) fp32, alpha (H, T_m) fp32 or none for a sum, and the word of phi."""

    state: Tensor
    total: Tensor
    alpha: Tensor | None
    feature_map: str


def serves(q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int) -> bool:
    """Whether this kernel takes the tensors: sm_90, bf16, the paper's blocks, D in steps of 8 from 40 to 128, TMA's alignment."""
    return (
        not INTERPRETED.value
        and launch.architecture(q.device) == 90
        and q.dtype == torch.bfloat16
        and (block_q, block_k) == (BLOCK_Q, BLOCK_K)
        and q.shape[3] in range(40, 129, 8)
        and tma_aligned(q, k, v)
    )


def tiles(x: Tensor, *block: int) -> TensorDescriptor:
    """Descriptor of a tensor whose last two dimensions come in tiles of that size."""
    element = {torch.bfloat16: gl.bfloat16, torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv}[x.dtype]
    flat = gl.NVMMASharedLayout.get_default_for(list(block), element)
    layout = gl.NVMMASharedLayout(flat.swizzle_byte_width, flat.element_bitwidth, rank=x.ndim)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1] * (x.ndim - 2) + list(block), layout)


def forward(q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor], linear: LinearBranch | None,
            low: "Operands | None", save: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """O (B, H, N, D), and with `save` O_s and L (B, H, N) fp32, else empty; without a linear branch O is O_s.

    Args:
        q, k, v: (B, H, N, D) bf16, see `serves`.
        tables: key blocks of each query block, see `lookup`.
        low: K8, and V8 with its keys permuted, in place of K and V.
    """
    B, H, NQ, D = q.shape
    N, T_m = k.shape[2], triton.cdiv(NQ, BLOCK_Q)
    BD = 64 if D <= 64 else 128
    table, count = tables
    o = torch.empty_like(q)
    o_sparse = torch.empty_like(q) if save and linear else o
    lse = torch.empty(B, H, NQ, dtype=torch.float32, device=q.device) if save else q.new_empty(0, dtype=torch.float32)
    low_qk, low_pv = low is not None, low is not None and low.low_values
    rows = tiles(q, 64, BD)
    keys = tiles(low.k8.flatten(0, 1), 64, BD) if low_qk else tiles(k, 64, 64)
    values = tiles(low.v8.flatten(0, 1), BD, 64) if low_pv else tiles(v, 64, BD)
    weighted = linear is not None and linear.alpha is not None
    with on_device(q):
        _hopper_kernel[(min(launch.multiprocessors(q.device), B * H * T_m),)](
            rows, keys, values, tiles(linear.state.flatten(0, 1), BD, BD) if linear else rows, tiles(o, 64, BD),
            tiles(o_sparse, 64, BD), table, count, low.k_scale if low_qk else count, low.v_largest if low_pv else count,
            linear.alpha if weighted else count, linear.total if linear else count, lse, H, NQ, N, T_m,
            triton.cdiv(N, BLOCK_K), B * H * T_m, table.shape[-1], D**-0.5 * LOG2E.value, D=D, BD=BD,
            LINEAR=linear is not None, WEIGHTED=weighted, SAVE=save, LOW_QK=low_qk, LOW_PV=low_pv,
            FEATURE=linear.feature_map if linear else "none", STAGES=STAGES[low.precision if low else "none"],
            num_warps=4, maxnreg=LAUNCH_REGISTERS)  # fmt: skip
    return o, o_sparse, lse
