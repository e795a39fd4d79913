"""Linear attention over weighted key blocks.

    h_j = phi(K_j)^T V_j,  z_j = phi(K_j)^T 1,  H_i = sum_j W_ij h_j,  Z_i = sum_j W_ij z_j,  O_i = phi(Q_i) H_i / (phi(Q_i) Z_i)
    with n = phi(Q_i) Z_i and E = rowsum(dO O):  dH_i = phi(Q_i)^T (dO / n),  dZ_i = -phi(Q_i)^T (E / n),
    dphi(Q_i) = (dO H_i^T - E Z_i^T) / n,  dh_j = sum_i W_ij dH_i,  dz_j = sum_i W_ij dZ_i,
    dphi(K_j) = V_j dh_j^T + dz_j^T,  dV_j = phi(K_j) dh_j,  dW_ij = <dH_i, h_j> + <dZ_i, z_j>

Saved for the backward: Q, K, V, W, h, z, H, Z. h and H have the inputs' dtype; z, Z and the normaliser n are fp32.

Legend: B batch, H heads, N tokens, D head size, BD the power of two that holds D, BLOCK tokens of a block, BM tokens of a tile.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sla2_kernels.launch import STATE_GROUP, linear_config
from sla2_kernels.primitives import (
    blocks_of,
    dot,
    head_offset,
    load_block,
    load_tile,
    of_head,
    on_device,
    power_of_two,
    store_tile,
    tma_aligned,
)
from sla2_kernels.product import padded, padded_length, product


@triton.jit
def feature(x, rows, N, D: tl.constexpr, BD: tl.constexpr, FEATURE: tl.constexpr):
    """phi of rows [rows, BD], fp32; zero past D and past N."""
    x = x.to(tl.float32)
    valid = (rows[:, None] < N) & (tl.arange(0, BD)[None, :] < D)
    if FEATURE == "softmax":
        within = tl.where(tl.arange(0, BD)[None, :] < D, x, float("-inf"))
        e = tl.exp(within - tl.max(within, 1)[:, None])
        phi = e / tl.sum(e, 1)[:, None]
    elif FEATURE == "elu":
        phi = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    else:
        phi = tl.maximum(x, 0.0)
    return tl.where(valid, phi, 0.0)


@triton.jit
def feature_gradient(x, phi, dphi, FEATURE: tl.constexpr):
    """Gradient of x from that of phi, [rows, BD]."""
    if FEATURE == "softmax":
        return phi * (dphi - tl.sum(phi * dphi, 1)[:, None])
    if FEATURE == "elu":
        return dphi * tl.minimum(phi, 1.0)
    return tl.where(x > 0, dphi, 0.0)


@triton.jit
def centred(x, mean, D: tl.constexpr, BD: tl.constexpr, CENTRE: tl.constexpr):
    """Rows of K in fp32, less their mean over all tokens if CENTRE."""
    x = x.to(tl.float32)
    if CENTRE:
        x -= load_sum(mean, D, BD)[None, :]
    return x


@triton.jit
def load_state(base, D: tl.constexpr, BD: tl.constexpr):
    """One h or H, [BD, BD], from D x D contiguous numbers."""
    return load_tile(base, tl.arange(0, BD), D, D, D, BD, BD != D)


@triton.jit
def load_sum(base, D: tl.constexpr, BD: tl.constexpr):
    """One z or Z, [BD]."""
    return tl.load(base + tl.arange(0, BD), mask=tl.arange(0, BD) < D, other=0.0)


@triton.jit
def linear_rows(phi, state, total):
    """phi H / (phi Z) [BM, BD] fp32 and 1 / (phi Z) [BM], both zero in rows with no block; `phi` has the state's dtype."""
    normaliser = tl.sum(phi.to(tl.float32) * total[None, :], 1)  # [BM]
    inverse = tl.where(normaliser > 0, 1 / tl.where(normaliser > 0, normaliser, 1.0), 0.0)
    return dot(phi, state) * inverse[:, None], inverse


@triton.jit
def _state_kernel(k, v, mean, h, z, largest, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, H, N,
                  blocks, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
                  FEATURE: tl.constexpr, CENTRE: tl.constexpr, MAGNITUDE: tl.constexpr, TMA: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    i_bh = tl.program_id(1)
    k, v = of_head(k, i_bh, H, stride_kb, stride_kh, TMA), of_head(v, i_bh, H, stride_vb, stride_vh, TMA)
    first = tl.program_id(0) * GROUP
    magnitude = tl.zeros([BD], tl.float32)
    # Several blocks a program, so that the next one is on its way while this one is computed.
    for block in tl.range(first, tl.minimum(first + GROUP, blocks), num_stages=STAGES):
        state = tl.zeros([BD, BD], tl.float32)
        total = tl.zeros([BD], tl.float32)
        for part in tl.static_range(BLOCK // BM):
            start = block * BLOCK + part * BM
            v_tile = load_block(v, i_bh // H, i_bh % H, start, stride_vn, N, D, BD, BM, TMA, True)  # [BM, BD]
            k_tile = load_block(k, i_bh // H, i_bh % H, start, stride_kn, N, D, BD, BM, TMA, True)
            k_tile = centred(k_tile, mean + i_bh * D, D, BD, CENTRE)
            phi = feature(k_tile, start + tl.arange(0, BM), N, D, BD, FEATURE).to(v_tile.dtype)
            total += tl.sum(phi.to(tl.float32), 0)  # of the rounded phi, so that a constant V comes out constant
            state = dot(tl.trans(phi), v_tile, state)
            if MAGNITUDE:
                magnitude = tl.maximum(magnitude, tl.max(tl.abs(v_tile), 0).to(tl.float32))
        line = i_bh.to(tl.int64) * blocks + block
        if TMA:
            h.store([line.to(tl.int32), 0, 0], state.to(v_tile.dtype).reshape(1, BD, BD))
        else:
            store_tile(h + line * D * D, state, tl.arange(0, BD), D, D, D, BD)
        tl.store(z + line * D + tl.arange(0, BD), total, mask=tl.arange(0, BD) < D)
    if MAGNITUDE:
        tl.atomic_max(largest + i_bh * D + tl.arange(0, BD), magnitude, mask=tl.arange(0, BD) < D)


@triton.jit
def _rows_kernel(q, state, total, alpha, o, stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on, H, NQ,
                 D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, FEATURE: tl.constexpr,
                 WEIGHTED: tl.constexpr):  # fmt: skip
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    rows = i_m * BM + tl.arange(0, BM)
    i_t, row_blocks = i_m * BM // BLOCK, tl.cdiv(NQ, BLOCK)
    line = i_bh.to(tl.int64) * row_blocks + i_t
    q_tile = load_tile(q + head_offset(i_bh, H, stride_qb, stride_qh), rows, stride_qn, NQ, D, BD, True)  # [BM, BD]
    phi = feature(q_tile, rows, NQ, D, BD, FEATURE).to(q_tile.dtype)
    out, _ = linear_rows(phi, load_state(state + line * D * D, D, BD), load_sum(total + line * D, D, BD))
    if WEIGHTED:
        out *= 1 - tl.load(alpha + (i_bh % H) * row_blocks + i_t)
    store_tile(o + head_offset(i_bh, H, stride_ob, stride_oh), out, rows, stride_on, NQ, D, BD)


@triton.jit
def _rows_backward_kernel(q, do, state, total, sparse, alpha, dq, dstate, dtotal, dalpha,
                          stride_qb, stride_qh, stride_qn, stride_db, stride_dh, stride_dn, stride_sb, stride_sh, stride_sn,
                          stride_gb, stride_gh, stride_gn, H, NQ, blocks,
                          D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
                          FEATURE: tl.constexpr, WEIGHTED: tl.constexpr):  # fmt: skip
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    line = i_bh.to(tl.int64) * blocks + i_m
    state_tile = load_state(state + line * D * D, D, BD)  # [BD, BD]
    total_tile = load_sum(total + line * D, D, BD)  # [BD]
    grad_state = tl.zeros([BD, BD], tl.float32)
    grad_total = tl.zeros([BD], tl.float32)
    share = 1.0
    if WEIGHTED:
        share -= tl.load(alpha + (i_bh % H) * blocks + i_m)
        grad_alpha = tl.zeros([BM], tl.float32)
    for part in tl.static_range(BLOCK // BM):
        rows = i_m * BLOCK + part * BM + tl.arange(0, BM)
        q_tile = load_tile(q + head_offset(i_bh, H, stride_qb, stride_qh), rows, stride_qn, NQ, D, BD, True)
        do_tile = load_tile(do + head_offset(i_bh, H, stride_db, stride_dh), rows, stride_dn, NQ, D, BD, True)
        phi = feature(q_tile, rows, NQ, D, BD, FEATURE)  # [BM, BD]
        low = phi.to(q_tile.dtype)
        out, inverse = linear_rows(low, state_tile, total_tile)
        if WEIGHTED:  # d alpha = <dO, O_s - O_l>
            s_tile = load_tile(sparse + head_offset(i_bh, H, stride_sb, stride_sh), rows, stride_sn, NQ, D, BD, True)
            grad_alpha += tl.sum(do_tile.to(tl.float32) * (s_tile.to(tl.float32) - out), 1)
        inverse *= share
        scaled = do_tile.to(tl.float32) * inverse[:, None]  # dO / n
        error = tl.sum(scaled * out, 1)  # E / n
        grad_state = dot(tl.trans(low), scaled.to(low.dtype), grad_state)
        grad_total -= tl.sum(low.to(tl.float32) * error[:, None], 0)
        dphi = dot(do_tile, tl.trans(state_tile)) * inverse[:, None] - error[:, None] * total_tile[None, :]
        grad = feature_gradient(q_tile.to(tl.float32), phi, dphi, FEATURE)
        store_tile(dq + head_offset(i_bh, H, stride_gb, stride_gh), grad, rows, stride_gn, NQ, D, BD)
    store_tile(dstate + line * D * D, grad_state, tl.arange(0, BD), D, D, D, BD)
    tl.store(dtotal + line * D + tl.arange(0, BD), grad_total, mask=tl.arange(0, BD) < D)
    if WEIGHTED:
        tl.store(dalpha + line, tl.sum(grad_alpha, 0))


@triton.jit
def _state_backward_kernel(k, v, mean, dh, dz, dk, dv, column_sum, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
                           stride_gb, stride_gh, stride_gn, stride_wb, stride_wh, stride_wn, H, N, blocks, padded_blocks,
                           D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
                           FEATURE: tl.constexpr, CENTRE: tl.constexpr):  # fmt: skip
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    line = i_bh.to(tl.int64) * padded_blocks + i_n
    grad_state = load_state(dh + line * D * D, D, BD)  # [BD, BD]
    grad_total = load_sum(dz + line * D, D, BD)  # [BD]
    columns_sum = tl.zeros([BD], tl.float32)
    for part in tl.static_range(BLOCK // BM):
        rows = i_n * BLOCK + part * BM + tl.arange(0, BM)
        k_tile = load_tile(k + head_offset(i_bh, H, stride_kb, stride_kh), rows, stride_kn, N, D, BD, True)  # [BM, BD]
        v_tile = load_tile(v + head_offset(i_bh, H, stride_vb, stride_vh), rows, stride_vn, N, D, BD, True)
        k_tile = centred(k_tile, mean + i_bh * D, D, BD, CENTRE)
        phi = feature(k_tile, rows, N, D, BD, FEATURE)
        dphi = dot(v_tile, tl.trans(grad_state)) + grad_total[None, :]
        grad_k = feature_gradient(k_tile, phi, dphi, FEATURE)
        columns_sum += tl.sum(grad_k, 0)
        grad_v = dot(phi.to(v_tile.dtype), grad_state)
        store_tile(dk + head_offset(i_bh, H, stride_gb, stride_gh), grad_k, rows, stride_gn, N, D, BD)
        store_tile(dv + head_offset(i_bh, H, stride_wb, stride_wh), grad_v, rows, stride_wn, N, D, BD)
    if CENTRE:
        tl.store(
            column_sum + (i_bh.to(tl.int64) * blocks + i_n) * D + tl.arange(0, BD),
            columns_sum,
            mask=tl.arange(0, BD) < D,
        )


def block_states(
    k: Tensor, v: Tensor, block_k: int, feature_map: str, mean: Tensor | None = None, largest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h (B * H, T, D, D) in the inputs' dtype and z (B * H, T, D) fp32 of every key block; T is T_n to the next multiple of 8.

    The blocks past T_n are zero; cuBLAS has its fast kernels for such lengths only (`product`).

    Args:
        k, v: (B, H, N, D), last dimension contiguous.
        mean: (B * H, D) fp32, taken from K first.
        largest: (B * H, D) fp32, raised to the largest magnitude of each channel of V: reading V for it alone costs more.
    """
    B, H, N, D = k.shape
    blocks, BD = padded_length(triton.cdiv(N, block_k)), power_of_two(D)
    h = torch.empty(B * H, blocks, D, D, dtype=k.dtype, device=k.device)
    z = torch.empty(B * H, blocks, D, dtype=torch.float32, device=k.device)
    BM, num_warps = linear_config("state", k, block_k)
    group, stages = STATE_GROUP if k.element_size() == 2 else (1, 1)
    # h has lines of D numbers, which may be unaligned where those of a view K are not.
    tma, k_in, v_in = blocks_of(BM, BD, k, v) if tma_aligned(h) else (False, k, v)
    with on_device(k):
        _state_kernel[(triton.cdiv(blocks, group), B * H)](
            k_in, v_in, z if mean is None else mean, square_tiles(h, BD) if tma else h, z,
            z if largest is None else largest, *k.stride()[:3], *v.stride()[:3], H, N, blocks, D=D, BD=BD, BM=BM, BLOCK=block_k,
            GROUP=group, FEATURE=feature_map, CENTRE=mean is not None, MAGNITUDE=largest is not None, TMA=tma, STAGES=stages, num_warps=num_warps, num_stages=stages)  # fmt: skip
    return h, z


def square_tiles(x: Tensor, BD: int) -> TensorDescriptor:
    """Descriptor of (B * H, T, D, D) as D x D tiles, which TMA cuts to D."""
    return TensorDescriptor(x, [x.shape[0] * x.shape[1], *x.shape[2:]], list(x.stride()[1:]), [1, BD, BD])


def rows_output(
    q: Tensor, state: Tensor, total: Tensor, alpha: Tensor | None, block_q: int, feature_map: str
) -> Tensor:
    """phi(Q) H / (phi(Q) Z), (B, H, NQ, D), times 1 - alpha (H, T_m) if it is given."""
    B, H, NQ, D = q.shape
    o = torch.empty_like(q)
    BM, num_warps = linear_config("rows", q, block_q)
    with on_device(q):
        _rows_kernel[(triton.cdiv(NQ, BM), B * H)](
            q, state, total, total if alpha is None else alpha, o, *q.stride()[:3], *o.stride()[:3], H, NQ,
            D=D, BD=power_of_two(D), BM=BM, BLOCK=block_q, FEATURE=feature_map, WEIGHTED=alpha is not None,
            num_warps=num_warps)  # fmt: skip
    return o


def forward(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, block_q: int, block_k: int,
            feature_map: str) -> tuple[Tensor, ...]:  # fmt: skip
    """O (B, H, NQ, D), and h, z, H, Z for the backward.

    Args:
        q: (B, H, NQ, D); k, v: (B, H, N, D), last dimension contiguous.
        weight: (B, H, T_m, T_n), bool or floating.
    """
    B, H, _, D = q.shape
    h, z = block_states(k, v, block_k, feature_map)
    state = product(padded(weight, h.dtype), h.flatten(2)).view(B * H, -1, D, D)
    total = product(padded(weight, z.dtype), z)
    return rows_output(q, state, total, None, block_q, feature_map), h, z, state, total


@dataclass
class Mixture:
    """What the fused operator adds to the backward: O_s and alpha (H, T_m) fp32, or none for a sum; the mean of K, if taken."""

    sparse: Tensor
    alpha: Tensor | None
    mean: Tensor | None


@dataclass
class Gradients:
    """dQ, dK, dV (B, H, N, D); dW (B, H, T_m, T_n); dalpha (B * H, T_m); the mean of dK over its tokens (B * H, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor | None = None
    alpha: Tensor | None = None
    column_mean: Tensor | None = None


def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, state: Tensor, total: Tensor, block_q: int,
             block_k: int, feature_map: str, mixture: Mixture | None = None,
             states: tuple[Tensor, Tensor] | None = None) -> Gradients:  # fmt: skip
    """Gradients of linear attention, or of its share of a mixture.

    Args:
        weight: (B * H, T_m, T), see `padded`.
        state, total: H (B * H, T_m, D, D) and Z (B * H, T_m, D).
        states: h and z, if the gradient of `weight` is wanted.
    """
    B, H, NQ, D = q.shape
    N = k.shape[2]
    shared = {"D": D, "BD": power_of_two(D), "FEATURE": feature_map}
    grads = Gradients(torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    dstate, dtotal = torch.empty_like(state), torch.empty_like(total)
    rows, blocks = triton.cdiv(NQ, block_q), triton.cdiv(N, block_k)
    alpha = mixture.alpha if mixture else None
    mean = mixture.mean if mixture else None
    sparse = mixture.sparse if mixture else do
    weighted, centre = alpha is not None, mean is not None
    if weighted:
        grads.alpha = torch.empty(B * H, rows, dtype=torch.float32, device=q.device)
    with on_device(q):
        BM, num_warps = linear_config("rows_backward", q, block_q)
        _rows_backward_kernel[(rows, B * H)](
            q, do, state, total, sparse, alpha if weighted else total, grads.q, dstate, dtotal,
            grads.alpha if weighted else total, *q.stride()[:3], *do.stride()[:3], *sparse.stride()[:3],
            *grads.q.stride()[:3], H, NQ, rows, BM=BM, BLOCK=block_q, WEIGHTED=weighted, num_warps=num_warps,
            **shared)  # fmt: skip
        # (T, D D) and (T, D), of which the state kernel reads the first T_n.
        dh, dz = product(weight.mT, dstate.flatten(2)), product(weight.mT.float(), dtotal)
        column_sum = torch.empty(B * H, blocks, D, dtype=torch.float32, device=k.device) if centre else dz
        BM, num_warps = linear_config("state_backward", k, block_k)
        _state_backward_kernel[(blocks, B * H)](
            k, v, mean if centre else dz, dh, dz, grads.k, grads.v, column_sum, *k.stride()[:3], *v.stride()[:3],
            *grads.k.stride()[:3], *grads.v.stride()[:3], H, N, blocks, dz.shape[1], BM=BM, BLOCK=block_k, CENTRE=centre,
            num_warps=num_warps, **shared)  # fmt: skip
    if centre:
        grads.column_mean = column_sum.sum(1) / N
    if states is not None:
        h, z = states
        dw = product(dstate.flatten(2), h.flatten(2).mT, torch.float32) + product(dtotal, z.mT)
        grads.weight = dw[..., :blocks].unflatten(0, (B, H))
    return grads
