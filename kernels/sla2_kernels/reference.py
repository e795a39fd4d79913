"""Sparse-linear attention in plain torch: the oracle of the kernels, and what runs on a CPU.

Formulas (arXiv 2602.12675, equations 13 and 14, Algorithms 2 and 3), per head, S = Q K^T / sqrt(D), M a block mask:

    O_s = softmax(S restricted to M) V            L = log-sum-exp of the restricted row
    O_l = phi(Q) H / (phi(Q) Z),  H_i = sum_j W_ij h_j,  Z_i = sum_j W_ij z_j,  h_j = phi(K_j)^T V_j,  z_j = phi(K_j)^T 1

Legend: B batch, H heads, N tokens, D head size; T_m, T_n query and key blocks of block_q and block_k tokens, the last may be
ragged. bf16 and fp16 inputs are computed in fp32 and returned in their dtype; fp64 stays fp64.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_MAX = 127.0
FP8_MAX = 448.0  # largest e4m3 value


def num_blocks(length: int, block: int) -> int:
    """Blocks that cover `length` tokens."""
    return -(-length // block)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _blocked(x: Tensor, block: int) -> Tensor:
    """(B, H, N, D) to (B, H, T, block, D), the last block padded with zeros."""
    length = x.shape[-2]
    blocks = num_blocks(length, block)
    return F.pad(x, (0, 0, 0, blocks * block - length)).unflatten(-2, (blocks, block))


def pool_blocks(x: Tensor, block: int) -> Tensor:
    """Mean of each block's tokens, (B, H, T, D) from (B, H, N, D); a ragged block is divided by its own count."""
    length, blocks = x.shape[-2], num_blocks(x.shape[-2], block)
    counts = torch.full((blocks, 1), float(block), dtype=_wide(x).dtype, device=x.device)
    counts[-1] = length - (blocks - 1) * block
    return (_blocked(_wide(x), block).sum(-2) / counts).to(x.dtype)


def smooth_keys(k: Tensor) -> Tensor:
    """K minus its mean over tokens: shifts every row of S by a constant, so a softmax over S does not change."""
    return (_wide(k) - _wide(k).mean(-2, keepdim=True)).to(k.dtype)


def feature_map(x: Tensor, kind: str) -> Tensor:
    """phi of the linear branch, non-negative: `softmax` over D, `elu` (elu + 1) or `relu`."""
    if kind == "softmax":
        return _wide(x).softmax(-1).to(x.dtype)
    if kind == "elu":
        return F.elu(x) + 1
    if kind == "relu":
        return F.relu(x)
    raise ValueError(f"feature_map is {kind!r}, choose softmax, elu or relu")


def expand_mask(mask: Tensor, rows: int, columns: int, block_q: int, block_k: int) -> Tensor:
    """A block tensor (B, H, T_m, T_n) per token pair, (B, H, rows, columns)."""
    return mask.repeat_interleave(block_q, -2)[..., :rows, :].repeat_interleave(block_k, -1)[..., :columns]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return _wide(q) @ _wide(k).transpose(-1, -2) / math.sqrt(q.shape[-1])


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the kept blocks.

    Args:
        q: (B, H, N_q, D); k, v: (B, H, N, D); mask: (B, H, T_m, T_n) bool, at least one block per row.

    Returns:
        Output (B, H, N_q, D) and log-sum-exp (B, H, N_q), natural logarithm, fp32 or wider.
    """
    scores = _scores(q, k)
    scores = scores.masked_fill(~expand_mask(mask, q.shape[-2], k.shape[-2], block_q, block_k), -math.inf)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ _wide(v)).to(q.dtype), lse


def soft_sparse_attention(q: Tensor, k: Tensor, v: Tensor, log_mask: Tensor, block_q: int, block_k: int) -> Tensor:
    """Attention with P proportional to M exp(S) for a soft mask M in (0, 1]; `log_mask` (B, H, T_m, T_n) is its logarithm."""
    scores = _scores(q, k) + expand_mask(_wide(log_mask), q.shape[-2], k.shape[-2], block_q, block_k)
    return (scores.softmax(-1) @ _wide(v)).to(q.dtype)


def linear_attention(q_phi: Tensor, k_phi: Tensor, v: Tensor, weight: Tensor, block_q: int, block_k: int) -> Tensor:
    """Linear attention in which key block j counts `weight[..., i, j]` times for query block i.

    Args:
        q_phi: (B, H, N_q, D) and k_phi: (B, H, N, D), feature maps already applied; v: (B, H, N, D).
        weight: (B, H, T_m, T_n), bool or in [0, 1]: 1 - M.

    Returns:
        (B, H, N_q, D); rows whose weights are all zero are zero.
    """
    q, k, v_wide = _blocked(_wide(q_phi), block_q), _blocked(_wide(k_phi), block_k), _blocked(_wide(v), block_k)
    weight = weight.to(q.dtype)
    h = k.transpose(-1, -2) @ v_wide  # (B, H, T_n, D, D)
    h_sum = (weight @ h.flatten(-2)).unflatten(-1, h.shape[-2:])  # (B, H, T_m, D, D)
    z_sum = weight @ k.sum(-2)  # (B, H, T_m, D)
    normaliser = (q * z_sum[..., None, :]).sum(-1, keepdim=True)  # (B, H, T_m, block_q, 1)
    empty = normaliser <= 0
    out = torch.where(empty, 0.0, (q @ h_sum) / torch.where(empty, 1.0, normaliser))
    return out.flatten(-3, -2)[..., : q_phi.shape[-2], :].to(q_phi.dtype)


def top_k_mask(scores: Tensor, kept: int) -> Tensor:
    """Mask (..., T_m, T_n) of the `kept` largest scores of each row, ties to the lower block index."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def router_scores(
    q: Tensor, k: Tensor, projections: tuple[Tensor, Tensor] | None, block_q: int, block_k: int
) -> Tensor:
    """proj_q(pool(Q)) proj_k(pool(K - mean K))^T, (B, H, T_m, T_n), fp32 or wider; no projections stand for the identity."""
    left, right = pool_blocks(_wide(q), block_q), pool_blocks(smooth_keys(_wide(k)), block_k)
    if projections is not None:
        left, right = left @ projections[0].to(left).T, right @ projections[1].to(right).T
    return left @ right.transpose(-1, -2)


def sla2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    mask: Tensor,
    block_q: int,
    block_k: int,
    kind: str,
    smooth_phi: bool,
) -> Tensor:
    """Sparse branch over `mask`, linear branch over the rest, mixed by alpha (H, T_m); the sum of both if alpha is None.

    Args:
        kind: feature map; smooth_phi: of keys less their mean.
    """
    o_s, _ = sparse_attention(q, k, v, mask, block_q, block_k)
    phi_k = feature_map(smooth_keys(k) if smooth_phi else k, kind)
    o_l = linear_attention(feature_map(q, kind), phi_k, v, ~mask, block_q, block_k)
    return mix(o_s, o_l, alpha, block_q)


def mix(o_s: Tensor, o_l: Tensor, alpha: Tensor | None, block_q: int) -> Tensor:
    """alpha O_s + (1 - alpha) O_l with alpha (H, T_m), or O_s + O_l."""
    if alpha is None:
        return o_s + o_l
    rows = alpha.repeat_interleave(block_q, dim=-1)[..., : o_s.shape[-2], None].to(_wide(o_s).dtype)
    return (rows * _wide(o_s) + (1 - rows) * _wide(o_l)).to(o_s.dtype)


def block_mass(q: Tensor, k: Tensor, block_q: int, block_k: int) -> Tensor:
    """Dense softmax mass of each key block, averaged over the query block's rows, (B, H, T_m, T_n): oracle of router and alpha."""
    mass = _blocked(_scores(q, k).softmax(-1).transpose(-1, -2), block_k).sum(-2)  # (B, H, T_n, N_q)
    return pool_blocks(mass.transpose(-1, -2), block_q)


def sparse_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, grad_o: Tensor, mask: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v by Algorithm 3: P = exp(S - L), dS = P (dP - D) with D = rowsum(dO O).

    Args:
        q, k, v: unquantised inputs, (B, H, N, D).
        o, lse: output and log-sum-exp of the forward.
        grad_o: gradient of the output.
    """
    scale = q.shape[-1] ** -0.5
    scores = _scores(q, k)
    keep = expand_mask(mask, q.shape[-2], k.shape[-2], block_q, block_k)
    p = (scores.masked_fill(~keep, -math.inf) - lse[..., None]).exp()
    grad = _wide(grad_o)
    delta = (grad * _wide(o)).sum(-1, keepdim=True)
    grad_scores = p * (grad @ _wide(v).transpose(-1, -2) - delta) * scale
    return (
        (grad_scores @ _wide(k)).to(q.dtype),
        (grad_scores.transpose(-1, -2) @ _wide(q)).to(k.dtype),
        (p.transpose(-1, -2) @ grad).to(v.dtype),
    )


def _quantise_int8(x: Tensor, block: int) -> Tensor:
    """INT8 and back, one scale per block of tokens and head; halves away from zero."""
    length = x.shape[-2]
    blocks = _blocked(x, block)
    scale = (blocks.abs().amax((-1, -2), keepdim=True) / INT8_MAX).clamp_min(1e-12)
    steps = blocks / scale
    rounded = torch.trunc(steps + 0.5 * steps.sign())
    return (rounded * scale).flatten(-3, -2)[..., :length, :]


def _quantise_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """e4m3 and back."""
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype) * scale


def _quantise_fp8_blocks(x: Tensor, block: int) -> Tensor:
    """e4m3 and back, one scale per block of tokens and head."""
    length = x.shape[-2]
    blocks = _blocked(x, block)
    scale = (blocks.abs().amax((-1, -2), keepdim=True) / FP8_MAX).clamp_min(1e-12)
    return _quantise_fp8(blocks, scale).flatten(-3, -2)[..., :length, :]


def low_bit_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_q: int, block_k: int, precision: str
) -> tuple[Tensor, Tensor]:
    """`sparse_attention` with the numerics of SageAttention2++'s block-sparse path, emulated (paper section 5).

    Q has one scale per query, K one per block and head; P is cast to e4m3 at the static scale 448 of its row maximum over the kept
    blocks (the kernels use the running maximum of their loop, so the two round differently); V has one e4m3 scale per channel.
    The row sum is taken before P is cast.

    Args:
        k: smoothed keys; smoothing is what makes INT8 accurate.
        precision: `int8` (INT8 QK, e4m3 PV), `fp8` (e4m3 both) or `int8-bf16` (INT8 QK, full PV).

    Returns:
        Output and the log-sum-exp of the quantised scores.
    """
    q_low, k_low, v_low = quantise_inputs(_wide(q), _wide(k), _wide(v), block_k, precision)
    scores = _scores(q_low, k_low)
    scores = scores.masked_fill(~expand_mask(mask, q.shape[-2], k.shape[-2], block_q, block_k), -math.inf)
    out, lse = low_bit_softmax(scores, v_low, precision)
    return out.to(q.dtype), lse


def quantise_inputs(q: Tensor, k: Tensor, v: Tensor, block_k: int, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, D) rounded to what the low-bit units multiply, in the dtype they came in."""
    if precision in ("int8", "int8-bf16"):
        q, k = _quantise_int8(q, 1), _quantise_int8(k, block_k)
    elif precision == "fp8":
        q, k = _quantise_fp8_blocks(q, 1), _quantise_fp8_blocks(k, block_k)
    else:
        raise ValueError(f"precision is {precision!r}, choose int8, fp8 or int8-bf16")
    if precision != "int8-bf16":
        v = _quantise_fp8(v, (v.abs().amax(-2, keepdim=True) / FP8_MAX).clamp_min(1e-12))
    return q, k, v


def low_bit_softmax(scores: Tensor, v: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """softmax(scores) v with the low-bit P of `precision`, and the log-sum-exp; scores (..., rows, keys), v (..., keys, D)."""
    top = scores.amax(-1, keepdim=True)
    p = (scores - top).exp()
    total = p.sum(-1, keepdim=True)
    if precision != "int8-bf16":
        p = _quantise_fp8(p, torch.tensor(1 / FP8_MAX, dtype=p.dtype, device=p.device))
    return (p @ v) / total, (top + total.log()).squeeze(-1)
