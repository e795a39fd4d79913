"""What the loops of the Hopper kernel share: rings of tiles, numbers of a row, and how they travel from step to step.

Legend: as in `hopper`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma


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
def sum_by_thread(x):
    """Sums [64, 4], as `largest_by_thread`."""
    return gl.sum(gl.sum(x.reshape([64, 8, 4, 2]), 3), 1)
