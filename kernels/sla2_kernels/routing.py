"""Which key blocks each query block keeps: pooling, scores, top-k and its lookup table.

    Qbar, Kbar = block means, Kbar less the mean of K;  scores = proj_q(Qbar) proj_k(Kbar)^T;  M = top-k of each row

All in fp32. Smoothing K only adds a constant to each row of scores, so it cannot change M; it is kept because it spares the
scores a large common part. M is a choice, not a function, so no gradient goes through here. Equal scores go to the lower block
index, always: the k-th largest score is found exactly, by its bits.

Legend: T blocks of BLOCK tokens, D head size, BD the power of two that holds D, WIDTH the power of two that holds a row of scores.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_kernels.primitives import head_offset, load_tile, on_device, power_of_two
from sla2_kernels.product import padded_length, product


@triton.jit
def _pool_kernel(x, pooled, stride_b, stride_h, stride_n, H, N, blocks, D: tl.constexpr, BD: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    rows, columns = i_t * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BD)
    tile = load_tile(x + head_offset(i_bh, H, stride_b, stride_h), rows, stride_n, N, D, BD, True)  # [BLOCK, BD]
    mean = tl.sum(tile.to(tl.float32), 0) / tl.minimum(BLOCK, N - i_t * BLOCK)
    tl.store(pooled + (i_bh.to(tl.int64) * blocks + i_t) * D + columns, mean, mask=columns < D)


@triton.jit
def _column_kernel(x, out, T, scale, less, D: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr):
    i_bh, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BC + tl.arange(0, BC)
    x += i_bh * T * D
    total = tl.zeros([BT, BC], tl.float32)
    for first in tl.range(0, T, BT, num_stages=2):
        t = first + tl.arange(0, BT)
        valid = (t[:, None] < T) & (columns[None, :] < D)
        total += tl.load(x + t[:, None] * D + columns[None, :], mask=valid, other=0.0)
    total = tl.sum(total, 0)
    last = tl.load(x + (T - 1) * D + columns, mask=columns < D, other=0.0)
    tl.store(out + i_bh * D + columns, total * scale - last * less, mask=columns < D)


@triton.jit
def _top_k_kernel(scores, mask, weight, table, count, kept, entries, length, WIDTH: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, WIDTH)
    score = tl.load(scores + line * entries + entry, mask=entry < entries, other=float("-inf"))  # [WIDTH]
    # Bits of a float in an order that unsigned integers share; adding zero makes -0 and 0 equal.
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    order = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    order = tl.where(entry < entries, order, 0)
    threshold = tl.zeros([1], tl.uint32)
    for bit in tl.static_range(32):
        candidate = threshold | (1 << (31 - bit))
        enough = tl.sum((order >= candidate).to(tl.int32), 0) >= kept
        threshold = tl.where(enough, candidate, threshold)
    above, equal = order > threshold, order == threshold
    room = kept - tl.sum(above.to(tl.int32), 0)
    take = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    place = tl.cumsum(take.to(tl.int32), 0) - 1
    tl.store(mask + line * entries + entry, take.to(tl.uint8), mask=entry < entries)
    skipped = (entry < entries) & (take == 0)
    tl.store(weight + line * length + entry, skipped.to(tl.float32).to(weight.dtype.element_ty), mask=entry < length)
    tl.store(table + line * kept + place, entry, mask=take)
    tl.store(count + line, kept)


def pool(x: Tensor, block: int) -> Tensor:
    """Means (B * H, T, D) fp32 over blocks of `block` tokens of x (B, H, N, D)."""
    B, H, N, D = x.shape
    pooled = torch.empty(B * H, triton.cdiv(N, block), D, dtype=torch.float32, device=x.device)
    with on_device(x):
        # H100, 480p: 0.087 ms for Q and K with two warps, 0.100 with four, 0.117 with eight.
        _pool_kernel[(pooled.shape[1], B * H)](
            x, pooled, *x.stride()[:3], H, N, pooled.shape[1], D=D, BD=power_of_two(D), BLOCK=block, num_warps=2)  # fmt: skip
    return pooled


def over_blocks(x: Tensor, scale: float = 1.0, less: float = 0.0) -> Tensor:
    """scale * (sum over T) - less * (last of T): from (B * H, T, D) fp32, contiguous, to (B * H, D)."""
    heads, T, D = x.shape
    out = torch.empty(heads, D, dtype=torch.float32, device=x.device)
    with on_device(x):
        _column_kernel[(heads, triton.cdiv(D, 32))](x, out, T, scale, less, D=D, BC=32, BT=128, num_warps=4)
    return out


def key_mean(pooled: Tensor, tokens: int, block: int) -> Tensor:
    """Mean of K over its tokens (B * H, D) from block means, of which the last may be of fewer tokens."""
    ragged = tokens - (pooled.shape[1] - 1) * block
    return over_blocks(pooled, block / tokens, (block - ragged) / tokens)


@dataclass
class Route:
    """A choice of key blocks.

    Args:
        mask: (B * H, T_m, T_n) bool.
        tables: key blocks of each query block, and how many; see `lookup`.
        weight: 1 - mask as numbers (B * H, T_m, T), see `padded`.
    """

    mask: Tensor
    tables: tuple[Tensor, Tensor]
    weight: Tensor


def empty_route(heads: int, rows: int, entries: int, kept: int, dtype: torch.dtype, device: torch.device) -> Route:
    """Memory for a choice of `kept` among `entries` blocks in each of `rows` rows; `dtype` is that of the weight."""
    return Route(
        torch.empty(heads, rows, entries, dtype=torch.bool, device=device),
        (
            torch.empty(heads, rows, kept, dtype=torch.int32, device=device),
            torch.empty(heads, rows, dtype=torch.int32, device=device),
        ),
        torch.empty(heads, rows, padded_length(entries), dtype=dtype, device=device),
    )


def top_k(scores: Tensor, kept: int, out: Route) -> None:
    """Write the `kept` largest scores of each row (B * H, T_m, T_n) fp32."""
    heads, rows, entries = scores.shape
    width = max(8, triton.next_power_of_2(entries))
    with on_device(scores):
        # H200: rows of 512 take 0.017 ms with one warp and 0.023 with four, rows of 2048 0.85 and 0.52.
        _top_k_kernel[(heads * rows,)](
            scores, out.mask.view(torch.uint8), out.weight, *out.tables, kept, entries, out.weight.shape[-1], WIDTH=width,
            num_warps=min(8, max(1, width // 512)))  # fmt: skip


def route(pooled_queries: Tensor, pooled_keys: Tensor, mean: Tensor, projections: tuple[Tensor, Tensor] | None, kept: int,
          out: Route) -> None:  # fmt: skip
    """Write the key blocks of each query block.

    Args:
        pooled_queries: (B * H, T_m, D); pooled_keys: (B * H, T_n, D) block means of K; mean: (B * H, D) of K.
        projections: proj_q and proj_k, (D, D) each; None for the identity.
    """
    left, right = pooled_queries, pooled_keys - mean[:, None]
    if projections is not None:
        left, right = (
            product(x.view(1, -1, x.shape[-1]), w.float().T[None]).view_as(x)
            for x, w in zip((left, right), projections, strict=True)
        )
    top_k(product(left, right.mT), kept, out)
