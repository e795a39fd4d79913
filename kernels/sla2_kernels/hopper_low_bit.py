"""One group's 64 rows over the kept key blocks, P V in e4m3: two key blocks a step.

Q K^T of the next pair of key blocks is followed by P V of this pair, beside which the softmax of the next is computed. Products of
e4m3 add in 14 bits, so each pair's are added in fp32 here; for want of registers P V comes in two halves of the channels, one after
the other. P travels packed. Legend: as in `hopper`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from sla2_kernels.hopper_rows import (
    largest_of_pair,
    scales_after,
    scales_ahead,
    scores_without_partner,
    slot_of,
    times_keys,
)

LOG2_448 = gl.constexpr(8.807354922057604)  # P is cast to e4m3 at 448 of its running maximum


@gluon.jit
def packed(p):
    """P in e4m3, four keys to a number int32 [64, 16]: numbers of 8 bits that a loop carries would take a register each.

    A thread's scores of 16 keys are 8 j + 2 t + e (j, e in 0, 1; t its place among four), an 8-bit operand's are 4 t + 2 j + e.
    """
    p = p.reshape([64, 4, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([64, 16, 2, 2])
    even, odd = gl.split(p)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
        "mov.b32 $0, {low, high}; }",
        "=r,r,r,r,r", [first, second, third, fourth], gl.int32, is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def left_operand(p, OUT: gl.constexpr):
    """What `packed` made of P as the left operand of P V, register by register."""
    p = gl.join(p, p)
    p = gl.convert_layout(gl.join(p, p).reshape([64, 64]), gl.DotOperandLayout(0, OUT, 4), assert_trivial=True)
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [p], gl.float8e4nv, is_pure=True, pack=4)


@gluon.jit
def by_group(p):
    """Packed P of 64 keys as four parts [64, 4], one for each 16 keys."""
    even, odd = gl.split(p.reshape([64, 2, 2, 4]).permute((0, 3, 1, 2)))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return first, second, third, fourth


@gluon.jit
def row_sums(p_a, p_b):
    """Sums [64, 4] of a row's packed P as they are rounded, by thread: a constant V then comes out as it is.

    Added in fp16, 32 numbers of at most 448, which takes no more operations than the same sum of fp32 before the rounding.
    """
    a, b, c, d = by_group(p_a)
    e, f, g, h = by_group(p_b)
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; .reg .b32 s, t, x; .reg .f32 y, z;"
        "mov.b32 {low, high}, $1; cvt.rn.f16x2.e4m3x2 s, low; cvt.rn.f16x2.e4m3x2 t, high;"
        "mov.b32 {low, high}, $2; cvt.rn.f16x2.e4m3x2 x, low; add.rn.f16x2 s, s, x; cvt.rn.f16x2.e4m3x2 x, high; add.rn.f16x2 t, t, x;"
        "mov.b32 {low, high}, $3; cvt.rn.f16x2.e4m3x2 x, low; add.rn.f16x2 s, s, x; cvt.rn.f16x2.e4m3x2 x, high; add.rn.f16x2 t, t, x;"
        "mov.b32 {low, high}, $4; cvt.rn.f16x2.e4m3x2 x, low; add.rn.f16x2 s, s, x; cvt.rn.f16x2.e4m3x2 x, high; add.rn.f16x2 t, t, x;"
        "mov.b32 {low, high}, $5; cvt.rn.f16x2.e4m3x2 x, low; add.rn.f16x2 s, s, x; cvt.rn.f16x2.e4m3x2 x, high; add.rn.f16x2 t, t, x;"
        "mov.b32 {low, high}, $6; cvt.rn.f16x2.e4m3x2 x, low; add.rn.f16x2 s, s, x; cvt.rn.f16x2.e4m3x2 x, high; add.rn.f16x2 t, t, x;"
        "mov.b32 {low, high}, $7; cvt.rn.f16x2.e4m3x2 x, low; add.rn.f16x2 s, s, x; cvt.rn.f16x2.e4m3x2 x, high; add.rn.f16x2 t, t, x;"
        "mov.b32 {low, high}, $8; cvt.rn.f16x2.e4m3x2 x, low; add.rn.f16x2 s, s, x; cvt.rn.f16x2.e4m3x2 x, high; add.rn.f16x2 t, t, x;"
        "add.rn.f16x2 s, s, t; mov.b32 {low, high}, s; cvt.f32.f16 y, low; cvt.f32.f16 z, high; add.f32 $0, y, z; }",
        "=r,r,r,r,r,r,r,r,r", [a, b, c, d, e, f, g, h], gl.float32, is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def half_of(v_tile, CHANNELS: gl.constexpr, BD: gl.constexpr):
    """V8 of one key block, the first or the second half of the channels."""
    return v_tile.slice(CHANNELS * BD // 2, BD // 2, 0).permute((1, 0))


@gluon.jit
def times_half(p, v_tile, CHANNELS: gl.constexpr, HALF_OUT: gl.constexpr, BD: gl.constexpr):
    """Start P V of one key block, for the first or the second half of the channels."""
    nothing = gl.zeros([64, BD // 2], gl.float32, layout=HALF_OUT)
    return warpgroup_mma(p, half_of(v_tile, CHANNELS, BD), nothing, use_acc=False, is_async=True)


@gluon.jit
def shrunk_plus(x, shrink, y):
    """x shrink + y, rows [64, n] by numbers [64]; one operation, so that training and inference round alike."""
    factor = gl.convert_layout(shrink, gl.SliceLayout(1, x.type.layout))
    return gl.fma(x, factor[:, None].broadcast_to(x.shape), y)


@gluon.jit
def times_half_pair(p_a, p_b, v_tiles, at, CHANNELS: gl.constexpr, HALF_OUT: gl.constexpr, BD: gl.constexpr):
    """As `times_half`, of two key blocks."""
    sums = times_half(p_a, v_tiles.index(at), CHANNELS, HALF_OUT, BD)
    return warpgroup_mma(p_b, half_of(v_tiles.index(at + 1), CHANNELS, BD), sums, is_async=True)


@gluon.jit
def attend(q, factor, k_ring, v_ring, k_scales, line, kept, turn, N, BD: gl.constexpr, STAGES: gl.constexpr):
    """All key blocks but the last pair's P V and one without a partner; state for `finish`, and the next turn.

    Args:
        q: rows in 8 bits as the left operand; factor: [64] by which a row's scores are multiplied, but for the keys' scale.
        k_scales: scales of this head's key blocks.
        line: this query block's line of the table; kept: how many entries count.
    """
    k_tiles, k_full, k_empty = k_ring
    v_tiles, v_full, v_empty = v_ring
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 32])
    HALF_OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD // 2, 32])
    SCORE_LINE: gl.constexpr = gl.SliceLayout(1, SCORES)
    SCORE: gl.constexpr = gl.int32 if k_tiles.dtype == gl.int8 else gl.float32
    last, other = gl.load(line + kept - 1), gl.load(line)
    factor_a, factor_b = factor * gl.load(k_scales + last), factor * gl.load(k_scales + other)
    slot, parity = slot_of(turn, STAGES)
    mbarrier.wait(k_full.index(slot), parity)
    pending_a = times_keys(q, k_tiles, slot, 0, SCORES, SCORE)
    pending_b = times_keys(q, k_tiles, slot, 1, SCORES, SCORE)
    scores_a, scores_b = warpgroup_mma_wait(0, deps=[pending_a, pending_b])
    scores_a, scores_b = scores_a.to(gl.float32), scores_b.to(gl.float32)
    mbarrier.arrive(k_empty.index(slot), count=1)
    key = last * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, SCORES))
    scores_a = gl.where(key[None, :] < N, scores_a, float("-inf"))
    scores_b = gl.where(kept > 1, scores_b, float("-inf"))
    top = gl.maximum(gl.max(scores_a, 1) * factor_a, gl.max(scores_b, 1) * factor_b)
    p_a = gl.exp2(scores_a * factor_a[:, None] - (top - LOG2_448)[:, None])
    p_b = gl.exp2(scores_b * factor_b[:, None] - (top - LOG2_448)[:, None])
    left = gl.zeros([64, BD // 2], gl.float32, layout=HALF_OUT)
    right = gl.zeros([64, BD // 2], gl.float32, layout=HALF_OUT)
    shrink = gl.full([64], 1.0, gl.float32, layout=SCORE_LINE)
    p_a, p_b = packed(p_a), packed(p_b)
    norm = gl.zeros_like(row_sums(p_a, p_b))
    pairs = kept // 2
    slot, parity = slot_of(turn + 1, STAGES)
    mbarrier.wait(k_full.index(slot), parity, pred=pairs > 1)
    scale_a, scale_b, block_a, block_b = scales_ahead(k_scales, line, pairs)
    for step in range(1, pairs):
        low_a, low_b = left_operand(p_a, OUT), left_operand(p_b, OUT)
        pending_a = times_keys(q, k_tiles, slot, 0, SCORES, SCORE)
        pending_b = times_keys(q, k_tiles, slot, 1, SCORES, SCORE)
        v_slot, v_parity = slot_of(turn, STAGES)
        mbarrier.wait(v_full.index(v_slot), v_parity)
        sums = times_half_pair(low_a, low_b, v_tiles, 2 * v_slot, 0, HALF_OUT, BD)
        factor_a, factor_b = factor * scale_a, factor * scale_b
        scale_a, scale_b, block_a, block_b = scales_after(k_scales, line, block_a, block_b, step, pairs)
        scores_a, scores_b = warpgroup_mma_wait(2, deps=[pending_a, pending_b])
        scores_a, scores_b = scores_a.to(gl.float32), scores_b.to(gl.float32)
        mbarrier.arrive(k_empty.index(slot), count=1)
        new_top = gl.maximum(top, largest_of_pair(scores_a, scores_b, factor_a, factor_b, SCORE_LINE))
        new_shrink = gl.exp2(top - new_top)
        top = new_top
        next_a = gl.exp2(scores_a * factor_a[:, None] - (top - LOG2_448)[:, None])
        next_b = gl.exp2(scores_b * factor_b[:, None] - (top - LOG2_448)[:, None])
        # A barrier stands between exponents and the wait for P V, or the compiler waits before it takes the exponents.
        slot, parity = slot_of(turn + 2, STAGES)
        sums = warpgroup_mma_wait(0, deps=[sums])
        others = times_half_pair(low_a, low_b, v_tiles, 2 * v_slot, 1, HALF_OUT, BD)
        left, norm = shrunk_plus(left, shrink, sums), shrunk_plus(norm, shrink, row_sums(p_a, p_b))
        mbarrier.wait(k_full.index(slot), parity, pred=step + 1 < pairs)
        others, next_a, next_b = warpgroup_mma_wait(0, deps=[others, next_a, next_b])
        mbarrier.arrive(v_empty.index(v_slot), count=1)
        right = shrunk_plus(right, shrink, others)
        shrink = new_shrink
        p_a, p_b = packed(next_a), packed(next_b)
        turn += 1
    return (p_a, p_b, left, right, norm, shrink, top), turn


@gluon.jit
def finish(state, q, factor, k_ring, v_ring, k_scales, line, kept, turn, BD: gl.constexpr, STAGES: gl.constexpr):
    """What `attend` has left; sum of 448 P V8 [64, BD], row sums of 448 P and running maxima [64], and the next turn."""
    p_a, p_b, left, right, norm, shrink, top = state
    v_tiles, v_full, v_empty = v_ring
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 32])
    HALF_OUT: gl.constexpr = left.type.layout
    slot, parity = slot_of(turn, STAGES)
    mbarrier.wait(v_full.index(slot), parity)
    low_a, low_b = left_operand(p_a, OUT), left_operand(p_b, OUT)
    sums = times_half_pair(low_a, low_b, v_tiles, 2 * slot, 0, HALF_OUT, BD)
    others = times_half_pair(low_a, low_b, v_tiles, 2 * slot, 1, HALF_OUT, BD)
    sums, others = warpgroup_mma_wait(0, deps=[sums, others])
    left, right = shrunk_plus(left, shrink, sums), shrunk_plus(right, shrink, others)
    norm = shrunk_plus(norm, shrink, row_sums(p_a, p_b))
    mbarrier.arrive(v_empty.index(slot), count=1)
    turn += 1
    if (kept % 2 == 1) & (kept > 1):  # the block that found no partner
        slot, parity = slot_of(turn, STAGES)
        factor *= gl.load(k_scales + gl.load(line + kept - 2))
        scores, top, shrink_one = scores_without_partner(q, factor, top, k_ring, slot, parity, SCORES)
        p_one = packed(gl.exp2(scores * factor[:, None] - (top - LOG2_448)[:, None]))
        mbarrier.wait(v_full.index(slot), parity)
        low_one = left_operand(p_one, OUT)
        sums = times_half(low_one, v_tiles.index(2 * slot), 0, HALF_OUT, BD)
        others = times_half(low_one, v_tiles.index(2 * slot), 1, HALF_OUT, BD)
        sums, others = warpgroup_mma_wait(0, deps=[sums, others])
        left, right = shrunk_plus(left, shrink_one, sums), shrunk_plus(right, shrink_one, others)
        norm = shrunk_plus(norm, shrink_one, row_sums(p_one, gl.zeros_like(p_one)))
        mbarrier.arrive(v_empty.index(slot), count=1)
        turn += 1
    acc = gl.convert_layout(gl.join(left, right).permute((0, 2, 1)).reshape([64, BD]), OUT, assert_trivial=True)
    return acc, gl.convert_layout(gl.sum(norm, 1), gl.SliceLayout(1, OUT)), top, turn
