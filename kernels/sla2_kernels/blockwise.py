"""The sparse branch in plain torch that touches kept blocks only: what backend `reference` runs.

`reference.sparse_attention` defines the same operator over all N x N scores and is the oracle of this file's tests. Here each
query block gathers its kept keys and values, so time and memory fall with sparsity: on a CPU at 97% a forward costs less than
dense attention, where the oracle costs several times it.

Legend: B batch, H heads, N tokens, D head size; T_m, T_n query and key blocks of block_q and block_k tokens; K the most blocks
that any query block keeps.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sla2_kernels import reference
from sla2_kernels.reference import _blocked, _wide

MASS_SCORES = 2**26  # scores that `block_mass` holds at once: 256 MiB in fp32, one query block of Wan2.1-1.3B at 480p


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """As `reference.sparse_attention`, differentiable in q, k and v."""
    scores, v_kept, _ = _gathered(_wide(q), _wide(k), _wide(v), mask, block_q, block_k)
    lse = scores.logsumexp(-1, keepdim=True)
    out = (scores - lse).exp() @ v_kept
    return _rows(out, q).to(q.dtype), _rows(lse, q).squeeze(-1)


def low_bit_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_q: int, block_k: int, precision: str
) -> tuple[Tensor, Tensor]:
    """As `reference.low_bit_sparse_attention`."""
    inputs = reference.quantise_inputs(_wide(q), _wide(k), _wide(v), block_k, precision)
    scores, v_kept, _ = _gathered(*inputs, mask, block_q, block_k)
    out, lse = reference.low_bit_softmax(scores, v_kept, precision)
    return _rows(out, q).to(q.dtype), _rows(lse[..., None], q).squeeze(-1)


def sparse_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, grad_o: Tensor, mask: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.sparse_attention_backward`, with the log-sum-exp of the unquantised scores recomputed here."""
    q_blocks = _blocked(_wide(q), block_q)
    scores, v_kept, (k_kept, index) = _gathered(_wide(q), _wide(k), _wide(v), mask, block_q, block_k)
    p = scores.softmax(-1)  # (B, H, T_m, block_q, K * block_k)
    grad, out = _blocked(_wide(grad_o), block_q), _blocked(_wide(o), block_q)
    delta = (grad * out).sum(-1, keepdim=True)
    grad_scores = p * (grad @ v_kept.transpose(-1, -2) - delta) * q.shape[-1] ** -0.5
    grad_q = _rows(grad_scores @ k_kept, q).to(q.dtype)
    grad_k, grad_v = (
        _scattered(weights.transpose(-1, -2) @ blocks, index, k, block_k).to(k.dtype)
        for weights, blocks in ((grad_scores, q_blocks), (p, grad))
    )
    return grad_q, grad_k, grad_v


def block_mass(q: Tensor, k: Tensor, block_q: int, block_k: int) -> Tensor:
    """As `reference.block_mass`, a few query blocks at a time; q may be whole query blocks of a longer sequence."""
    B, H, N, D = k.shape
    rows = block_q * max(1, MASS_SCORES // (B * H * N * block_q))
    q, keys = _wide(q) * D**-0.5, _wide(k).mT
    ragged = reference.num_blocks(N, block_k) * block_k - N
    parts = []
    for part in q.split(rows, dim=2):
        mass = F.pad((part @ keys).softmax(-1), (0, ragged)).unflatten(-1, (-1, block_k)).sum(-1)  # (B, H, rows, T_n)
        parts.append(reference.pool_blocks(mass, block_q))
    return torch.cat(parts, dim=2)


def _gathered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_q: int, block_k: int):
    """Scores (B, H, T_m, block_q, K * block_k), -inf where nothing is kept, kept values and keys, and kept block numbers."""
    count = mask.sum(-1, keepdim=True)
    index = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[
        ..., : int(count.max())
    ]  # (B, H, T_m, K)
    k_kept, v_kept = (_take(_blocked(x, block_k), index) for x in (k, v))
    token = index[..., None] * block_k + torch.arange(block_k, device=q.device)
    kept = torch.arange(index.shape[-1], device=q.device) < count
    allowed = (kept[..., None] & (token < k.shape[-2])).flatten(-2)[..., None, :]
    scores = _blocked(q, block_q) @ k_kept.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~allowed, -math.inf), v_kept, (k_kept, index)


def _take(blocks: Tensor, index: Tensor) -> Tensor:
    """Blocks (B, H, T_n, block_k, D) by number (B, H, T_m, K), as (B, H, T_m, K * block_k, D)."""
    B, H = index.shape[:2]
    at = (torch.arange(B * H, device=index.device).view(B, H, 1, 1) * blocks.shape[2] + index).flatten()
    return blocks.flatten(0, 2).index_select(0, at).view(*index.shape, *blocks.shape[3:]).flatten(3, 4)


def _scattered(taken: Tensor, index: Tensor, like: Tensor, block_k: int) -> Tensor:
    """Sum of (B, H, T_m, K * block_k, D) into the blocks that it was taken from, (B, H, N, D): the transpose of `_take`."""
    B, H, N, D = like.shape
    blocks = reference.num_blocks(N, block_k)
    at = (torch.arange(B * H, device=index.device).view(B, H, 1, 1) * blocks + index).flatten()
    total = taken.new_zeros(B * H * blocks, block_k, D)
    total.index_add_(0, at, taken.reshape(-1, block_k, D))
    return total.view(B, H, blocks * block_k, D)[:, :, :N]


def _rows(blocks: Tensor, like: Tensor) -> Tensor:
    """(B, H, T_m, block_q, C) to (B, H, N, C)."""
    return blocks.flatten(2, 3)[:, :, : like.shape[2]]
