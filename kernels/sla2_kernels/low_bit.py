"""Low-bit forward of the sparse branch, with the scheme of SageAttention2++'s block-sparse path (paper section 5).

    Q8 = Q / s_q, K8 = (K - mean K) / s_k: one scale a query, one a block of keys, INT8 (halves away from zero) or e4m3
    V8 = V / s_v: one e4m3 scale a channel and head, so that a channel of outliers costs the others nothing
    P8 = 448 exp(S - running maximum) in e4m3; the row sum is taken before that cast (`hopper`: after it); 448 cancels in O / l

Q is quantised where it is used; K8 and V8 are written once, padded to whole blocks. V8 is transposed within its block, because
the tensor cores want the 8-bit operand of P V contiguous along the keys. A scale a query costs nothing: rows have a factor anyway.

Legend: BM query rows, BN = BLOCK_K keys of a block, D head size, BD the power of two that holds D.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sla2_kernels import launch
from sla2_kernels.primitives import (
    INTERPRETED,
    LOG2E,
    LOWEST,
    dot,
    head_offset,
    load_tile,
    on_device,
    power_of_two,
)
from sla2_kernels.sparse import clean_blocks

FP8_MAX = tl.constexpr(448.0)
INT8_MAX = tl.constexpr(127.0)
TINY = tl.constexpr(1e-12)  # scale of a block of zeros


@triton.jit
def quantise(x, largest, INT8: tl.constexpr):
    """Numbers in 8 bits, and their scale, from their largest magnitude (one, or one a row with a trailing axis)."""
    scale = tl.maximum(largest / (INT8_MAX if INT8 else FP8_MAX), TINY)
    steps = x / scale
    if INT8:
        low = (steps + tl.where(steps >= 0, 0.5, -0.5)).to(tl.int8)
    else:
        low = tl.clamp(steps, -FP8_MAX, FP8_MAX).to(tl.float8e4nv)
    return low, scale


@triton.jit
def load_flat(x, at, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """Block `at` [ROWS, COLUMNS] of blocks that lie end to end."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if TMA:
        tile = x.load([at * ROWS, 0])
    else:
        tile = tl.load(x + at.to(tl.int64) * (ROWS * COLUMNS) + rows[:, None] * COLUMNS + columns[None, :])
    return tile


@triton.jit
def score_dot(q8, k8):
    """Q8 K8^T as fp32 [BM, BN]."""
    if q8.dtype == tl.int8:
        scores = tl.dot(q8, tl.trans(k8), out_dtype=tl.int32).to(tl.float32)
    elif INTERPRETED:
        scores = dot(q8.to(tl.float32), tl.trans(k8.to(tl.float32)))
    else:
        scores = tl.dot(q8, tl.trans(k8))
    return scores


@triton.jit
def value_dot(p8, v8, BN: tl.constexpr):
    """P8 V8 of BN keys as fp32. Tensor cores add products of e4m3 in 14 bits: the sum over blocks has to be taken outside."""
    return dot(p8, v8) if INTERPRETED else tl.dot(p8, v8, max_num_imprecise_acc=BN)


@triton.jit
def attend_low_bit(q8, acc, top, total, k8, k_scale, v, first, table, begin, end, scale, N, stride_vn, D: tl.constexpr,
                   BD: tl.constexpr, BN: tl.constexpr, FP8_PV: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """Online softmax over the kept blocks begin .. end; `scale` [BM] holds the queries' scales and is in units of log2."""
    inside = tl.arange(0, BN)
    for step in tl.range(begin, end, num_stages=STAGES):
        block = tl.load(table + step)
        at = first + block  # among the blocks of all heads
        k_tile = load_flat(k8, at, BN, BD, TMA)  # [BN, BD]
        factor = scale * tl.load(k_scale + at)
        scores = score_dot(q8, k_tile)  # [BM, BN]
        if MASKED:
            scores = tl.where(block * BN + inside[None, :] < N, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)  # [BM]
        shrink = tl.math.exp2(top - new_top)
        if FP8_PV:
            p = tl.math.exp2(scores * factor[:, None] - (new_top - 8.807354922057604)[:, None])  # times 448 = 2^8.807
            v_tile = load_flat(v, at, BD, BN, TMA)  # [BD, BN]
            acc = acc * shrink[:, None] + value_dot(p.to(v_tile.dtype), tl.trans(v_tile), BN)
        else:
            p = tl.math.exp2(scores * factor[:, None] - new_top[:, None])
            v_tile = load_tile(v, block * BN + inside, stride_vn, N, D, BD, MASKED)  # [BN, BD]
            acc = dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None])
        total = total * shrink + tl.sum(p, 1)
        top = new_top
    return acc, top, total


@triton.jit
def low_bit_rows(q_tile, k8, k_scale, v, v_largest, first, table, count, scale, N, stride_vn, BM: tl.constexpr,
                 D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, FP8_PV: tl.constexpr, TMA: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """Output rows [BM, BD] fp32 of one query block and the log-sum-exp [BM], base 2, of its quantised scores."""
    wide = q_tile.to(tl.float32)
    largest = tl.max(tl.abs(wide), 1, keep_dims=True)  # [BM, 1]
    q8, q_scale = quantise(wide, largest, (k8.dtype if TMA else k8.dtype.element_ty) == tl.int8)
    acc = tl.zeros([BM, BD], tl.float32)
    top = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    clean = clean_blocks(table, count, N, BN, False)
    factor = tl.reshape(q_scale, [BM]) * (scale * LOG2E)
    acc, top, total = attend_low_bit(
        q8, acc, top, total, k8, k_scale, v, first, table, 0, clean, factor, N, stride_vn, D, BD, BN, FP8_PV, TMA, False,
        STAGES)  # fmt: skip
    acc, top, total = attend_low_bit(
        q8, acc, top, total, k8, k_scale, v, first, table, clean, count, factor, N, stride_vn, D, BD, BN, FP8_PV, TMA, True,
        1)  # fmt: skip
    acc /= total[:, None]
    lse2 = top + tl.math.log2(total)
    if FP8_PV:
        columns = tl.arange(0, BD)
        acc *= tl.load(v_largest + columns, mask=columns < D, other=0.0)[None, :] / FP8_MAX
        lse2 -= 8.807354922057604
    return acc, lse2


@triton.jit
def _quantise_kernel(k, v, mean, v_largest, k8, k_scale, v8, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
                     stride_vn, H, N, blocks, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr,
                     CENTRE: tl.constexpr, FP8_PV: tl.constexpr, PERMUTED: tl.constexpr):  # fmt: skip
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    inside, columns = tl.arange(0, BLOCK), tl.arange(0, BD)
    rows = i_n * BLOCK + inside
    tile = load_tile(k + head_offset(i_bh, H, stride_kb, stride_kh), rows, stride_kn, N, D, BD, True).to(tl.float32)
    if CENTRE:
        shift = tl.load(mean + i_bh * D + columns, mask=columns < D, other=0.0)
        tile = tl.where(rows[:, None] < N, tile - shift[None, :], 0.0)  # [BLOCK, BD]
    low, scale = quantise(tile, tl.max(tl.max(tl.abs(tile), 1), 0), k8.dtype.element_ty == tl.int8)
    line = i_bh.to(tl.int64) * blocks + i_n
    tl.store(k8 + line * (BLOCK * BD) + inside[:, None] * BD + columns[None, :], low)
    tl.store(k_scale + line, scale)
    if FP8_PV:
        if PERMUTED:  # place 4 t + 2 j + e of 16 holds key 8 j + 2 t + e, see `hopper.carried`
            rows = i_n * BLOCK + ((inside & ~15) | ((inside & 2) << 2) | ((inside & 12) >> 1) | (inside & 1))
        largest = tl.load(v_largest + i_bh * D + columns, mask=columns < D, other=1.0)
        channel = tl.maximum(largest / FP8_MAX, TINY)
        tile = load_tile(v + head_offset(i_bh, H, stride_vb, stride_vh), rows, stride_vn, N, D, BD, True)
        tile = tl.clamp(tile.to(tl.float32) / channel[None, :], -FP8_MAX, FP8_MAX)
        pointers = v8 + line * (BLOCK * BD) + columns[:, None] * BLOCK + inside[None, :]
        tl.store(pointers, tl.trans(tile).to(tl.float8e4nv))


def flat_blocks(k8: Tensor, v8: Tensor) -> tuple[bool, ...]:
    """Whether K8 and V8 come by TMA, and then their descriptors, else themselves. A V that is not in 8 bits is passed by pointer."""
    if launch.architecture(k8.device) < 90:
        return False, k8, v8

    def flat(x: Tensor) -> TensorDescriptor:
        rows, columns = x.shape[-2:]
        return TensorDescriptor(x, [x.numel() // columns, columns], [columns, 1], [rows, columns])

    return True, flat(k8), flat(v8) if v8.dtype == torch.float8_e4m3fn else v8


@dataclass
class Operands:
    """K8 (B * H, T_n, block_k, BD), its scales (B * H, T_n), V8 (B * H, T_n, BD, block_k), 448 times its scales (B * H, D).

    With `int8-bf16` V8 and its scales are placeholders: V stays as it is.
    """

    k8: Tensor
    k_scale: Tensor
    v8: Tensor
    v_largest: Tensor
    precision: str

    @property
    def low_values(self) -> bool:
        return self.precision != "int8-bf16"


def empty_operands(k: Tensor, v: Tensor, block_k: int, precision: str) -> Operands:
    """Memory for K and V (B, H, N, D) in low bit, V's largest magnitudes zero; precision: `int8`, `fp8` or `int8-bf16`."""
    B, H, N, D = k.shape
    blocks, BD = triton.cdiv(N, block_k), power_of_two(D)
    dtype = torch.float8_e4m3fn if precision == "fp8" else torch.int8
    k8 = torch.empty(B * H, blocks, block_k, BD, dtype=dtype, device=k.device)
    k_scale = torch.empty(B * H, blocks, dtype=torch.float32, device=k.device)
    if precision == "int8-bf16":
        return Operands(k8, k_scale, v, k_scale, precision)
    v8 = torch.empty(B * H, blocks, BD, block_k, dtype=torch.float8_e4m3fn, device=k.device)
    return Operands(k8, k_scale, v8, torch.zeros(B * H, D, dtype=torch.float32, device=k.device), precision)


def quantise_keys_values(k: Tensor, v: Tensor, mean: Tensor | None, out: Operands, permuted: bool) -> None:
    """Write K and V in low bit.

    Args:
        k, v: (B, H, N, D), last dimension contiguous.
        mean: (B * H, D) fp32, taken from K first; None for keys that are smooth already.
        out: with the largest magnitude of each channel of V in place.
        permuted: V8 with its keys in the order that `hopper` wants.
    """
    B, H, N, D = k.shape
    _, blocks, block_k, BD = out.k8.shape
    with on_device(k):
        _quantise_kernel[(blocks, B * H)](
            k, v, out.k_scale if mean is None else mean, out.v_largest, out.k8, out.k_scale, out.v8, *k.stride()[:3],
            *v.stride()[:3], H, N, blocks, D=D, BD=BD, BLOCK=block_k, CENTRE=mean is not None, FP8_PV=out.low_values,
            PERMUTED=permuted, num_warps=4)  # fmt: skip
