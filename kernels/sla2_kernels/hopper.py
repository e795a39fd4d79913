"""The forward on Hopper (sm_90): sparse branch, linear branch and mixing in one warp-specialised Gluon kernel.

One program a multiprocessor walks over the query blocks. A warp fetches tiles by TMA into rings of shared memory; two groups of
four warps take 64 of a block's 128 rows each. A group issues Q K^T of the next key block, then P V of this one, and computes the
softmax of the next while the tensor cores still work on the latter. The two groups run apart from each other, so one's softmax
also hides behind the other's products. The plain kernels (`sparse`, `fused`, `linear`) compute the same on every GPU.

    O_s = softmax(Q K^T / sqrt(D)) V over the kept blocks,  O_l = phi(Q) H / (phi(Q) Z),  O = alpha O_s + (1 - alpha) O_l

The last kept block comes first: a table line ascends, so it alone can be ragged, and no other step needs a mask. In low bit
(`low_bit`) Q is quantised where it is used, the row sum is of P8 and not of P, and V8's keys lie in the order in which P's
registers are an 8-bit operand.

Legend: HALF which 64 rows; tiles are of 64 rows; BD the power of two that holds D; STAGES key tiles in flight; `turn` counts key
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

from sla2_kernels import launch
from sla2_kernels.primitives import INTERPRETED, on_device, tma_aligned

if TYPE_CHECKING:
    from sla2_kernels.low_bit import Operands

LOG2E = gl.constexpr(1.4426950408889634)
LOG2_448 = gl.constexpr(8.807354922057604)  # P is cast to e4m3 at 448 of its running maximum
TINY = gl.constexpr(1e-12)  # scale of a row of zeros
BLOCK_Q, BLOCK_K = 128, 64
# Registers a thread: two groups of 128 threads with 240 and a warp, counted as a group, with 24 fill a multiprocessor's 65,536.
# At the launch each of the 12 warps has the same share.
GROUP_REGISTERS, FETCH_REGISTERS = gl.constexpr(240), gl.constexpr(24)
LAUNCH_REGISTERS = 168
STAGES = {"none": 2, "int8": 3, "fp8": 3, "int8-bf16": 2}


@gluon.jit
def slot_of(turn, DEPTH: gl.constexpr):
    """Place in a ring, and the parity of the round."""
    return turn % DEPTH, (turn // DEPTH) & 1


@gluon.jit
def fetch_blocks(tensor, i_bh, H, first, second, both, blocks, full, empty, tiles, slot, parity, LOW: gl.constexpr):
    """Ask for the tiles of two key blocks, or of the first, once their place in the ring is free.

    LOW: the tensor's blocks lie end to end.
    """
    mbarrier.wait(empty.index(slot), parity ^ 1)
    mbarrier.expect(full.index(slot), tensor.block_type.nbytes, pred=both == 0)
    mbarrier.expect(full.index(slot), 2 * tensor.block_type.nbytes, pred=both != 0)
    for half in gl.static_range(2):
        block = second if half == 1 else first
        at = [i_bh * blocks + block, 0, 0] if LOW else [i_bh // H, i_bh % H, block * 64, 0]
        wanted = both != 0 if half == 1 else True
        tma.async_copy_global_to_shared(tensor, at, full.index(slot), tiles.index(2 * slot + half), pred=wanted)


@gluon.jit
def produce(q, k, v, h, q_ring, k_ring, v_ring, h_ring, table, count, H, T_m, blocks, query_blocks, entries, LINEAR: gl.constexpr,
            LOW_QK: gl.constexpr, LOW_PV: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    q_tiles, q_full, q_empty = q_ring
    k_tiles, k_full, k_empty = k_ring
    v_tiles, v_full, v_empty = v_ring
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
            fetch_blocks(k, i_bh, H, first, second, both, blocks, k_full, k_empty, k_tiles, slot, parity, LOW_QK)
            fetch_blocks(v, i_bh, H, first, second, both, blocks, v_full, v_empty, v_tiles, slot, parity, LOW_PV)
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
def carried(p, OUT: gl.constexpr, LOW_PV: gl.constexpr):
    """P as it goes from one step to the next: bf16 as the left operand of P V, or e4m3, four keys to a number int32 [64, 16].

    A thread's scores of 16 keys are 8 j + 2 t + e (j, e in 0, 1; t its place among four), an 8-bit operand's are 4 t + 2 j + e.
    Numbers of 8 bits that a loop carries would take a register each.
    """
    if LOW_PV:
        p = p.reshape([64, 4, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([64, 16, 2, 2])
        even, odd = gl.split(p)
        first, third = gl.split(even)
        second, fourth = gl.split(odd)
        p = gl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
            "mov.b32 $0, {low, high}; }",
            "=r,r,r,r,r", [first, second, third, fourth], gl.int32, is_pure=True, pack=1)  # fmt: skip
    else:
        p = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, OUT, 2), assert_trivial=True)
    return p


@gluon.jit
def operand(p, OUT: gl.constexpr, LOW_PV: gl.constexpr):
    """What `carried` made of P as the left operand of P V, register by register."""
    if LOW_PV:
        p = gl.join(p, p)
        p = gl.convert_layout(gl.join(p, p).reshape([64, 64]), gl.DotOperandLayout(0, OUT, 4), assert_trivial=True)
        p = gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [p], gl.float8e4nv, is_pure=True, pack=4)  # fmt: skip
    return p


@gluon.jit
def largest_by_thread(x):
    """Maxima [64, 4] of a row [64, 64] over the keys that one thread holds; the four threads of a row come last."""
    return gl.max(gl.max(x.reshape([64, 8, 4, 2]), 3), 1)


@gluon.jit
def sum_by_thread(x):
    """Sums [64, 4], as `largest_by_thread`."""
    return gl.sum(gl.sum(x.reshape([64, 8, 4, 2]), 3), 1)


@gluon.jit
def times_keys(q, k_tiles, at, SCORES: gl.constexpr, SCORE: gl.constexpr):
    """Start Q K^T of one key block."""
    nothing = gl.zeros([64, 64], SCORE, layout=SCORES)
    return warpgroup_mma(q, k_tiles.index(at).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def times_values(p_a, p_b, v_tiles, at, acc):
    """Start acc + P V of two key blocks."""
    sums = warpgroup_mma(p_a, v_tiles.index(at), acc, is_async=True)
    return warpgroup_mma(p_b, v_tiles.index(at + 1), sums, is_async=True)


@gluon.jit
def times_half(p, v_tile, CHANNELS: gl.constexpr, HALF_OUT: gl.constexpr, BD: gl.constexpr):
    """Start P V of one key block in e4m3, for the first or the second half of the channels."""
    nothing = gl.zeros([64, BD // 2], gl.float32, layout=HALF_OUT)
    values = v_tile.slice(CHANNELS * BD // 2, BD // 2, 0)
    return warpgroup_mma(p, values.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def times_low_values(p_a, p_b, v_tiles, at, CHANNELS: gl.constexpr, HALF_OUT: gl.constexpr, BD: gl.constexpr):
    """As `times_half`, of two key blocks."""
    sums = times_half(p_a, v_tiles.index(at), CHANNELS, HALF_OUT, BD)
    values = v_tiles.index(at + 1).slice(CHANNELS * BD // 2, BD // 2, 0)
    return warpgroup_mma(p_b, values.permute((1, 0)), sums, is_async=True)


@gluon.jit
def row_sum_of(p, ones, COUNTS: gl.constexpr):
    """Start the row sums of one key block's P in e4m3, eight times over: the narrowest product there is."""
    nothing = gl.zeros([64, 8], gl.float32, layout=COUNTS)
    return warpgroup_mma(p, ones.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def times_ones(p_a, p_b, ones, COUNTS: gl.constexpr):
    """As `row_sum_of`, of two key blocks."""
    return warpgroup_mma(p_b, ones.permute((1, 0)), row_sum_of(p_a, ones, COUNTS), is_async=True)


@gluon.jit
def shrunk_plus(x, shrink, y):
    """x shrink + y, rows [64, n] by numbers [64]; one operation, so that training and inference round alike."""
    factor = gl.convert_layout(shrink, gl.SliceLayout(1, x.type.layout))
    return gl.fma(x, factor[:, None].broadcast_to(x.shape), y)


@gluon.jit
def consume(HALF: gl.constexpr, o, o_sparse, q_ring, k_ring, v_ring, h_ring, ones, table, count, k_scale, v_largest,
            alpha, total, lse, H, NQ, N, T_m, blocks, query_blocks, entries, scale,
            D: gl.constexpr, BD: gl.constexpr, LINEAR: gl.constexpr, WEIGHTED: gl.constexpr, SAVE: gl.constexpr,
            LOW_QK: gl.constexpr, LOW_PV: gl.constexpr, FEATURE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    q_tiles, q_full, q_empty = q_ring
    k_tiles, k_full, k_empty = k_ring
    v_tiles, v_full, v_empty = v_ring
    h_tile, h_full, h_empty = h_ring
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32 if LOW_QK else 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 32 if LOW_PV else 16])
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    HALF_OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD // 2, 32])
    COUNTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    Q_ROWS: gl.constexpr = gl.DotOperandLayout(0, WIDE, 2)
    LINE: gl.constexpr = gl.SliceLayout(1, OUT)  # one number a row
    SCORE_LINE: gl.constexpr = gl.SliceLayout(1, SCORES)
    INT8: gl.constexpr = k_tiles.dtype == gl.int8
    SCORE: gl.constexpr = gl.int32 if INT8 else gl.float32
    SHIFT: gl.constexpr = LOG2_448 if LOW_PV else 0.0
    columns = gl.arange(0, BD, layout=gl.SliceLayout(0, OUT))
    turn, number = 0, 0
    for i in range(gl.program_id(0), query_blocks, gl.num_programs(0)):
        i_bh, i_m = i // T_m, i % T_m
        kept = gl.load(count + i)
        line = table + i.to(gl.int64) * entries
        last, other = gl.load(line + kept - 1), gl.load(line)
        factor = gl.full([64], scale, gl.float32, layout=SCORE_LINE)
        q_slot, q_parity = slot_of(number, 2)
        mbarrier.wait(q_full.index(q_slot), q_parity)
        q_rows = q_tiles.index(2 * q_slot + HALF)
        if LOW_QK:
            low, q_scale = quantise_rows(q_rows.load(OUT).to(gl.float32), INT8)
            q = gl.convert_layout(low, gl.DotOperandLayout(0, SCORES, 4))
            factor *= gl.convert_layout(q_scale, SCORE_LINE)
            k_scales = k_scale + i_bh * blocks
        else:
            q = q_rows.load(gl.DotOperandLayout(0, SCORES, 2))
        factor_a, factor_b = factor, factor

        slot, parity = slot_of(turn, STAGES)
        if LOW_QK:
            factor_a, factor_b = factor * gl.load(k_scales + last), factor * gl.load(k_scales + other)
        mbarrier.wait(k_full.index(slot), parity)
        pending_a = times_keys(q, k_tiles, 2 * slot, SCORES, SCORE)
        pending_b = times_keys(q, k_tiles, 2 * slot + 1, SCORES, SCORE)
        scores_a, scores_b = warpgroup_mma_wait(0, deps=[pending_a, pending_b])
        mbarrier.arrive(k_empty.index(slot), count=1)
        key = last * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, SCORES))
        scores_a = gl.where(key[None, :] < N, scores_a.to(gl.float32), float("-inf"))
        scores_b = gl.where(kept > 1, scores_b.to(gl.float32), float("-inf"))
        top = gl.maximum(gl.max(scores_a, 1) * factor_a, gl.max(scores_b, 1) * factor_b)
        p_a = gl.exp2(scores_a * factor_a[:, None] - (top - SHIFT)[:, None])
        p_b = gl.exp2(scores_b * factor_b[:, None] - (top - SHIFT)[:, None])
        BY_THREAD: gl.constexpr = gl.SliceLayout(1, sum_by_thread(scores_a).type.layout)
        if LOW_PV:
            # The row sum is a product with ones, of P as it is rounded: an addition less for each score. Products of e4m3 add in
            # 14 bits, so each step's are added in fp32 here; both halves of the channels at once would not fit the registers.
            norm = gl.zeros([64, 8], gl.float32, layout=COUNTS)
            left = gl.zeros([64, BD // 2], gl.float32, layout=HALF_OUT)
            right = gl.zeros([64, BD // 2], gl.float32, layout=HALF_OUT)
            shrink = gl.full([64], 1.0, gl.float32, layout=SCORE_LINE)
        else:
            norm = sum_by_thread(p_a) + sum_by_thread(p_b)
            acc = gl.zeros([64, BD], gl.float32, layout=OUT)
        p_a, p_b = carried(p_a, OUT, LOW_PV), carried(p_b, OUT, LOW_PV)
        pairs = kept // 2
        slot, parity = slot_of(turn + 1, STAGES)
        mbarrier.wait(k_full.index(slot), parity, pred=pairs > 1)
        if LOW_QK:  # a scale takes longer to come than a step: its block two steps ahead, itself one
            block_a, block_b = gl.load(line + 1, mask=pairs > 1, other=0), gl.load(line + 2, mask=pairs > 1, other=0)
            scale_a, scale_b = gl.load(k_scales + block_a), gl.load(k_scales + block_b)
            block_a, block_b = gl.load(line + 3, mask=pairs > 2, other=0), gl.load(line + 4, mask=pairs > 2, other=0)
        for step in range(1, pairs):
            low_a, low_b = operand(p_a, OUT, LOW_PV), operand(p_b, OUT, LOW_PV)
            pending_a = times_keys(q, k_tiles, 2 * slot, SCORES, SCORE)
            pending_b = times_keys(q, k_tiles, 2 * slot + 1, SCORES, SCORE)
            v_slot, v_parity = slot_of(turn, STAGES)
            mbarrier.wait(v_full.index(v_slot), v_parity)
            if LOW_PV:
                sums = times_low_values(low_a, low_b, v_tiles, 2 * v_slot, 0, HALF_OUT, BD)
                counts = times_ones(low_a, low_b, ones, COUNTS)
            else:
                sums = times_values(low_a, low_b, v_tiles, 2 * v_slot, acc)
            if LOW_QK:
                factor_a, factor_b = factor * scale_a, factor * scale_b
                scale_a, scale_b = gl.load(k_scales + block_a), gl.load(k_scales + block_b)
                block_a = gl.load(line + 2 * step + 3, mask=step + 2 < pairs, other=0)
                block_b = gl.load(line + 2 * step + 4, mask=step + 2 < pairs, other=0)
            scores_a, scores_b = warpgroup_mma_wait(4 if LOW_PV else 2, deps=[pending_a, pending_b])
            mbarrier.arrive(k_empty.index(slot), count=1)
            scores_a, scores_b = scores_a.to(gl.float32), scores_b.to(gl.float32)
            if LOW_QK:
                part_a = largest_by_thread(scores_a) * gl.convert_layout(factor_a, BY_THREAD)[:, None]
                part_b = largest_by_thread(scores_b) * gl.convert_layout(factor_b, BY_THREAD)[:, None]
                largest = gl.convert_layout(gl.max(gl.maximum(part_a, part_b), 1), SCORE_LINE)
            else:
                largest = gl.max(gl.maximum(scores_a, scores_b), 1) * factor
            new_top = gl.maximum(top, largest)
            new_shrink = gl.exp2(top - new_top)
            top = new_top
            next_a = gl.exp2(scores_a * factor_a[:, None] - (top - SHIFT)[:, None])
            next_b = gl.exp2(scores_b * factor_b[:, None] - (top - SHIFT)[:, None])
            # A barrier stands between exponents and the wait for P V, or the compiler waits before it takes the exponents.
            slot, parity = slot_of(turn + 2, STAGES)
            if LOW_PV:
                sums, counts = warpgroup_mma_wait(0, deps=[sums, counts])
                others = times_low_values(low_a, low_b, v_tiles, 2 * v_slot, 1, HALF_OUT, BD)
                left, norm = shrunk_plus(left, shrink, sums), shrunk_plus(norm, shrink, counts)
                mbarrier.wait(k_full.index(slot), parity, pred=step + 1 < pairs)
                others, next_a, next_b = warpgroup_mma_wait(0, deps=[others, next_a, next_b])
                mbarrier.arrive(v_empty.index(v_slot), count=1)
                right = shrunk_plus(right, shrink, others)
                shrink = new_shrink
            else:
                norm = norm * gl.convert_layout(new_shrink, BY_THREAD)[:, None] + (
                    sum_by_thread(next_a) + sum_by_thread(next_b)
                )
                mbarrier.wait(k_full.index(slot), parity, pred=step + 1 < pairs)
                acc, next_a, next_b = warpgroup_mma_wait(0, deps=[sums, next_a, next_b])
                mbarrier.arrive(v_empty.index(v_slot), count=1)
                acc *= gl.convert_layout(new_shrink, LINE)[:, None]
            p_a, p_b = carried(next_a, OUT, LOW_PV), carried(next_b, OUT, LOW_PV)
            turn += 1
        slot, parity = slot_of(turn, STAGES)
        mbarrier.wait(v_full.index(slot), parity)
        low_a, low_b = operand(p_a, OUT, LOW_PV), operand(p_b, OUT, LOW_PV)
        if LINEAR:  # asked for before the last products, so that nobody waits for them
            q_columns = gl.arange(0, BD, layout=gl.SliceLayout(0, Q_ROWS))
            z = gl.load(total + i.to(gl.int64) * D + q_columns, mask=q_columns < D, other=0.0)
            if WEIGHTED:
                weight = gl.load(alpha + i_bh % H * T_m + i_m)
        if LOW_PV:
            sums = times_low_values(low_a, low_b, v_tiles, 2 * slot, 0, HALF_OUT, BD)
            others = times_low_values(low_a, low_b, v_tiles, 2 * slot, 1, HALF_OUT, BD)
            counts = times_ones(low_a, low_b, ones, COUNTS)
            sums, others, counts = warpgroup_mma_wait(0, deps=[sums, others, counts])
            left, right = shrunk_plus(left, shrink, sums), shrunk_plus(right, shrink, others)
            norm = shrunk_plus(norm, shrink, counts)
        else:
            acc = warpgroup_mma_wait(0, deps=[times_values(low_a, low_b, v_tiles, 2 * slot, acc)])
        mbarrier.arrive(v_empty.index(slot), count=1)
        turn += 1
        if (kept % 2 == 1) & (kept > 1):  # the block that found no partner
            slot, parity = slot_of(turn, STAGES)
            factor_last = factor
            if LOW_QK:
                factor_last *= gl.load(k_scales + gl.load(line + kept - 2))
            mbarrier.wait(k_full.index(slot), parity)
            pending_last = times_keys(q, k_tiles, 2 * slot, SCORES, SCORE)
            scores_last = warpgroup_mma_wait(0, deps=[pending_last]).to(gl.float32)
            mbarrier.arrive(k_empty.index(slot), count=1)
            new_top = gl.maximum(top, gl.max(scores_last, 1) * factor_last)
            shrink = gl.exp2(top - new_top)
            top = new_top
            p_last = gl.exp2(scores_last * factor_last[:, None] - (top - SHIFT)[:, None])
            mbarrier.wait(v_full.index(slot), parity)
            low_last = operand(carried(p_last, OUT, LOW_PV), OUT, LOW_PV)
            if LOW_PV:
                sums = times_half(low_last, v_tiles.index(2 * slot), 0, HALF_OUT, BD)
                others = times_half(low_last, v_tiles.index(2 * slot), 1, HALF_OUT, BD)
                counts = row_sum_of(low_last, ones, COUNTS)
                sums, others, counts = warpgroup_mma_wait(0, deps=[sums, others, counts])
                left, right = shrunk_plus(left, shrink, sums), shrunk_plus(right, shrink, others)
                norm = shrunk_plus(norm, shrink, counts)
            else:
                acc *= gl.convert_layout(shrink, LINE)[:, None]
                sums = warpgroup_mma(low_last, v_tiles.index(2 * slot), acc, is_async=True)
                norm = norm * gl.convert_layout(shrink, BY_THREAD)[:, None] + sum_by_thread(p_last)
                acc = warpgroup_mma_wait(0, deps=[sums])
            mbarrier.arrive(v_empty.index(slot), count=1)
            turn += 1
        if LOW_PV:
            acc = gl.join(left, right).permute((0, 2, 1)).reshape([64, BD])
            acc = gl.convert_layout(acc, OUT, assert_trivial=True)
        row_sum = gl.convert_layout(gl.max(norm, 1) if LOW_PV else gl.sum(norm, 1), LINE)
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
def ring(dtype: gl.constexpr, layout: gl.constexpr, DEPTH: gl.constexpr, EACH: gl.constexpr, M: gl.constexpr,
         N: gl.constexpr):  # fmt: skip
    """DEPTH places of EACH tiles [M, N], and their barriers: full when TMA has filled a place, empty when both groups say so."""
    tiles = gl.allocate_shared_memory(dtype, [DEPTH * EACH, M, N], layout)
    full = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(DEPTH):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    return tiles, full, empty


@gluon.jit
def _hopper_kernel(q, k, v, h, o, o_sparse, table, count, k_scale, v_largest, alpha, total, lse, H, NQ, N, T_m, blocks, query_blocks, entries, scale, D: gl.constexpr, BD: gl.constexpr,
                   LINEAR: gl.constexpr, WEIGHTED: gl.constexpr, SAVE: gl.constexpr, LOW_QK: gl.constexpr,
                   LOW_PV: gl.constexpr, FEATURE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BD], gl.bfloat16)
    K_ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BD], k.dtype)
    V_SHAPE: gl.constexpr = [BD, 64] if LOW_PV else [64, BD]
    V_ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for(V_SHAPE, v.dtype)
    q_ring = ring(gl.bfloat16, ROWS, 2, 2, 64, BD)
    k_ring = ring(k.dtype, K_ROWS, STAGES, 2, 64, BD)
    v_ring = ring(v.dtype, V_ROWS, STAGES, 2, V_SHAPE[0], V_SHAPE[1])
    h_ring = ring(gl.bfloat16, ROWS, 1, 1, BD, BD)
    ones = gl.allocate_shared_memory(gl.uint8, [8, 64], gl.NVMMASharedLayout.get_default_for([8, 64], gl.uint8))
    if LOW_PV:
        # In e4m3 by its bits: ptxas 12.8 leaves half of what a cast of a constant gives undefined (NOTES.md).
        ones.store(gl.full([8, 64], 0x38, gl.uint8, layout=gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])))
        fence_async_shared()
    ones = ones._reinterpret(gl.float8e4nv, [8, 64], ones.layout)
    gl.warp_specialize(
        [
            (consume, (0, o, o_sparse, q_ring, k_ring, v_ring, h_ring, ones, table, count, k_scale, v_largest, alpha, total,
                       lse, H, NQ, N, T_m, blocks, query_blocks, entries, scale, D, BD,
                       LINEAR, WEIGHTED, SAVE, LOW_QK, LOW_PV, FEATURE, STAGES)),
            (consume, (1, o, o_sparse, q_ring, k_ring, v_ring, h_ring, ones, table, count, k_scale, v_largest, alpha, total,
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
    keys = tiles(low.k8.flatten(0, 1), 64, BD) if low_qk else tiles(k, 64, BD)
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
