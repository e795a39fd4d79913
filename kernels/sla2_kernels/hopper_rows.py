"""What the loops of the Hopper kernel share: rings of tiles, scores, their maxima and scales.

Legend: as in `hopper`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def slot_of(turn, DEPTH: gl.constexpr):
    """Place in a ring, and the parity of the round."""
    return turn % DEPTH, (turn // DEPTH) & 1


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
def times_keys(q, k_tiles, slot, HALF: gl.constexpr, SCORES: gl.constexpr, SCORE: gl.constexpr):
    """Start Q K^T of one key block of a pair."""
    nothing = gl.zeros([64, 64], SCORE, layout=SCORES)
    keys = k_tiles.index(slot).slice(64 * HALF, 64, 0)
    return warpgroup_mma(q, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def largest_by_thread(x):
    """Maxima [64, 4] of a row [64, 64] over the keys that one thread holds; the four threads of a row come last."""
    return gl.max(gl.max(x.reshape([64, 8, 4, 2]), 3), 1)


@gluon.jit
def largest_of_pair(scores_a, scores_b, factor_a, factor_b, SCORE_LINE: gl.constexpr):
    """Row maxima [64] of two key blocks' scores, each times its factor: a row's factor multiplies four maxima, not 64 scores."""
    part_a = largest_by_thread(scores_a)
    BY_THREAD: gl.constexpr = gl.SliceLayout(1, part_a.type.layout)
    part_a *= gl.convert_layout(factor_a, BY_THREAD)[:, None]
    part_b = largest_by_thread(scores_b) * gl.convert_layout(factor_b, BY_THREAD)[:, None]
    return gl.convert_layout(gl.max(gl.maximum(part_a, part_b), 1), SCORE_LINE)


@gluon.jit
def scales_ahead(k_scales, line, pairs):
    """Scales of the second pair of key blocks, and which the third pair is: a scale takes longer to come than a step."""
    block_a, block_b = gl.load(line + 1, mask=pairs > 1, other=0), gl.load(line + 2, mask=pairs > 1, other=0)
    scale_a, scale_b = gl.load(k_scales + block_a), gl.load(k_scales + block_b)
    block_a, block_b = gl.load(line + 3, mask=pairs > 2, other=0), gl.load(line + 4, mask=pairs > 2, other=0)
    return scale_a, scale_b, block_a, block_b


@gluon.jit
def scales_after(k_scales, line, block_a, block_b, step, pairs):
    """As `scales_ahead`, one step on."""
    scale_a, scale_b = gl.load(k_scales + block_a), gl.load(k_scales + block_b)
    block_a = gl.load(line + 2 * step + 3, mask=step + 2 < pairs, other=0)
    block_b = gl.load(line + 2 * step + 4, mask=step + 2 < pairs, other=0)
    return scale_a, scale_b, block_a, block_b


@gluon.jit
def scores_without_partner(q, factor, top, k_ring, slot, parity, SCORES: gl.constexpr):
    """Scores [64, 64] of the last key block of an odd number, the new running maxima and what former sums shrink by."""
    k_tiles, k_full, k_empty = k_ring
    SCORE: gl.constexpr = gl.int32 if k_tiles.dtype == gl.int8 else gl.float32
    mbarrier.wait(k_full.index(slot), parity)
    pending = times_keys(q, k_tiles, slot, 0, SCORES, SCORE)
    scores = warpgroup_mma_wait(0, deps=[pending]).to(gl.float32)
    mbarrier.arrive(k_empty.index(slot), count=1)
    new_top = gl.maximum(top, gl.max(scores, 1) * factor)
    return scores, new_top, gl.exp2(top - new_top)
