"""One group's 64 rows over the kept key blocks, P V in bf16: two key blocks a step.

Q K^T of the next pair of key blocks is one product m64n128; then comes P V of this pair, beside which the softmax of the next is
computed. Legend: as in `hopper`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from sla2_kernels.hopper_rows import largest_of_pair, scales_after, scales_ahead, scores_without_partner, slot_of


@gluon.jit
def times_pair(q, k_tiles, slot, PAIR: gl.constexpr, SCORE: gl.constexpr):
    """Start Q K^T of two key blocks."""
    nothing = gl.zeros([64, 128], SCORE, layout=PAIR)
    return warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def halves(scores, SCORES: gl.constexpr):
    """Scores of two key blocks as fp32 [64, 64] each; a thread's registers stay where they are."""
    first, second = gl.split(scores.reshape([64, 2, 64]).permute((0, 2, 1)))
    first = gl.convert_layout(first, SCORES, assert_trivial=True).to(gl.float32)
    return first, gl.convert_layout(second, SCORES, assert_trivial=True).to(gl.float32)


@gluon.jit
def sum_by_thread(x):
    """Sums [64, 4], as `largest_by_thread`."""
    return gl.sum(gl.sum(x.reshape([64, 8, 4, 2]), 3), 1)


@gluon.jit
def left_operand(p, OUT: gl.constexpr):
    """P as the left operand of P V."""
    return gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, OUT, 2), assert_trivial=True)


@gluon.jit
def times_values(p_a, p_b, v_tiles, slot, acc):
    """Start acc + P V of two key blocks."""
    sums = warpgroup_mma(p_a, v_tiles.index(2 * slot), acc, is_async=True)
    return warpgroup_mma(p_b, v_tiles.index(2 * slot + 1), sums, is_async=True)


@gluon.jit
def attend(q, factor, k_ring, v_ring, k_scales, line, kept, turn, N, BD: gl.constexpr, LOW_QK: gl.constexpr,
           STAGES: gl.constexpr):  # fmt: skip
    """All key blocks but the last pair's P V and one without a partner; state for `finish`, and the next turn.

    Args:
        q: rows as the left operand, bf16 or, with LOW_QK, 8 bits; factor: [64] by which a row's scores are multiplied.
        k_scales: scales of this head's key blocks, for LOW_QK.
        line: this query block's line of the table; kept: how many entries count.
    """
    k_tiles, k_full, k_empty = k_ring
    v_tiles, v_full, v_empty = v_ring
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32 if LOW_QK else 16])
    PAIR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32 if LOW_QK else 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    SCORE_LINE: gl.constexpr = gl.SliceLayout(1, SCORES)
    SCORE: gl.constexpr = gl.int32 if k_tiles.dtype == gl.int8 else gl.float32
    LINE: gl.constexpr = gl.SliceLayout(1, OUT)
    factor_a, factor_b = factor, factor
    last, other = gl.load(line + kept - 1), gl.load(line)
    if LOW_QK:
        factor_a, factor_b = factor * gl.load(k_scales + last), factor * gl.load(k_scales + other)
    slot, parity = slot_of(turn, STAGES)
    mbarrier.wait(k_full.index(slot), parity)
    pending = times_pair(q, k_tiles, slot, PAIR, SCORE)
    scores_a, scores_b = halves(warpgroup_mma_wait(0, deps=[pending]), SCORES)
    mbarrier.arrive(k_empty.index(slot), count=1)
    key = last * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, SCORES))
    scores_a = gl.where(key[None, :] < N, scores_a, float("-inf"))
    scores_b = gl.where(kept > 1, scores_b, float("-inf"))
    top = gl.maximum(gl.max(scores_a, 1) * factor_a, gl.max(scores_b, 1) * factor_b)
    p_a = gl.exp2(scores_a * factor_a[:, None] - top[:, None])
    p_b = gl.exp2(scores_b * factor_b[:, None] - top[:, None])
    norm = sum_by_thread(p_a) + sum_by_thread(p_b)
    BY_THREAD: gl.constexpr = gl.SliceLayout(1, norm.type.layout)
    acc = gl.zeros([64, BD], gl.float32, layout=OUT)
    p_a, p_b = left_operand(p_a, OUT), left_operand(p_b, OUT)
    pairs = kept // 2
    slot, parity = slot_of(turn + 1, STAGES)
    mbarrier.wait(k_full.index(slot), parity, pred=pairs > 1)
    if LOW_QK:
        scale_a, scale_b, block_a, block_b = scales_ahead(k_scales, line, pairs)
    for step in range(1, pairs):
        pending = times_pair(q, k_tiles, slot, PAIR, SCORE)
        v_slot, v_parity = slot_of(turn, STAGES)
        mbarrier.wait(v_full.index(v_slot), v_parity)
        sums = times_values(p_a, p_b, v_tiles, v_slot, acc)
        if LOW_QK:
            factor_a, factor_b = factor * scale_a, factor * scale_b
            scale_a, scale_b, block_a, block_b = scales_after(k_scales, line, block_a, block_b, step, pairs)
        scores_a, scores_b = halves(warpgroup_mma_wait(2, deps=[pending]), SCORES)
        mbarrier.arrive(k_empty.index(slot), count=1)
        if LOW_QK:
            largest = largest_of_pair(scores_a, scores_b, factor_a, factor_b, SCORE_LINE)
        else:
            largest = gl.max(gl.maximum(scores_a, scores_b), 1) * factor
        new_top = gl.maximum(top, largest)
        shrink = gl.exp2(top - new_top)
        top = new_top
        next_a = gl.exp2(scores_a * factor_a[:, None] - top[:, None])
        next_b = gl.exp2(scores_b * factor_b[:, None] - top[:, None])
        norm = norm * gl.convert_layout(shrink, BY_THREAD)[:, None] + (sum_by_thread(next_a) + sum_by_thread(next_b))
        # A barrier stands between exponents and the wait for P V, or the compiler waits before it takes the exponents.
        slot, parity = slot_of(turn + 2, STAGES)
        mbarrier.wait(k_full.index(slot), parity, pred=step + 1 < pairs)
        acc, next_a, next_b = warpgroup_mma_wait(0, deps=[sums, next_a, next_b])
        mbarrier.arrive(v_empty.index(v_slot), count=1)
        acc *= gl.convert_layout(shrink, LINE)[:, None]
        p_a, p_b = left_operand(next_a, OUT), left_operand(next_b, OUT)
        turn += 1
    return (p_a, p_b, acc, norm, top), turn


@gluon.jit
def finish(state, q, factor, k_ring, v_ring, k_scales, line, kept, turn, BD: gl.constexpr, LOW_QK: gl.constexpr,
           STAGES: gl.constexpr):  # fmt: skip
    """What `attend` has left; sum of P V [64, BD], row sums and running maxima [64], and the next turn."""
    p_a, p_b, acc, norm, top = state
    v_tiles, v_full, v_empty = v_ring
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32 if LOW_QK else 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    BY_THREAD: gl.constexpr = gl.SliceLayout(1, norm.type.layout)
    LINE: gl.constexpr = gl.SliceLayout(1, OUT)
    slot, parity = slot_of(turn, STAGES)
    mbarrier.wait(v_full.index(slot), parity)
    acc = warpgroup_mma_wait(0, deps=[times_values(p_a, p_b, v_tiles, slot, acc)])
    mbarrier.arrive(v_empty.index(slot), count=1)
    turn += 1
    if (kept % 2 == 1) & (kept > 1):  # the block that found no partner
        slot, parity = slot_of(turn, STAGES)
        if LOW_QK:
            factor *= gl.load(k_scales + gl.load(line + kept - 2))
        q_one = gl.convert_layout(q, gl.DotOperandLayout(0, SCORES, 4 if LOW_QK else 2), assert_trivial=True)
        scores, top, shrink = scores_without_partner(q_one, factor, top, k_ring, slot, parity, SCORES)
        p_one = gl.exp2(scores * factor[:, None] - top[:, None])
        acc *= gl.convert_layout(shrink, LINE)[:, None]
        norm = norm * gl.convert_layout(shrink, BY_THREAD)[:, None] + sum_by_thread(p_one)
        mbarrier.wait(v_full.index(slot), parity)
        sums = warpgroup_mma(left_operand(p_one, OUT), v_tiles.index(2 * slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(v_empty.index(slot), count=1)
        turn += 1
    return acc, gl.convert_layout(gl.sum(norm, 1), LINE), top, turn
