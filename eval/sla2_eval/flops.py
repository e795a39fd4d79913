"""FLOPs of sparse-linear attention, item by item, at the block counts that were really kept.

One multiply and one add are two FLOPs; elementwise functions (exp, feature map, division) are left out on both sides, as
`4 N^2 d` leaves out the softmax. Legend: N tokens, d head size, b_q and b_k block sizes, T_m and T_n their counts, M the block mask.

    dense    4 N^2 d               Q K^T and P V
    router   4 N d                 smoothing K, pooling Q and K; nothing for `random`
             2 (T_m + T_n) d^2     projections, of routers that learn
             2 T_m T_n d           scores of the pooled rows
    sparse   4 d sum_ij M_ij |i| |j|   |i|, |j| true block lengths, so a ragged last block counts right
    linear   2 N d^2 + N d         h_j and z_j of every key block
             2 T_m T_n (d^2 + d)   H_i = sum_j (1 - M_ij) h_j and Z_i, one matrix product
             2 N d^2 + 2 N d       phi(Q) H and phi(Q) Z
    mixing   3 N d alpha; N d sum; 2 N d^2 + N d projection

When nothing is skipped there is no router, no linear branch and no mixing: the total is `4 N^2 d`, exactly.
The paper's printed totals are 96 heads' worth at 1.3B (8 layers of 12, of its 30) and 100 at 14B (2.5 layers of 40): compare ratios.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sla2.variant import DENSE_ATTENTIONS, LEARNED_ROUTERS


@dataclass(frozen=True)
class Flops:
    """FLOPs of the four parts of the operator; sums over heads, layers and forwards add up."""

    router: int = 0
    sparse: int = 0
    linear: int = 0
    mixing: int = 0

    @property
    def total(self) -> int:
        """What is executed."""
        return self.router + self.sparse + self.linear + self.mixing

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def dense_flops(tokens: int, head_dim: int) -> int:
    """Dense attention of one head: `4 N^2 d`, the dense-equivalent work of every variant."""
    return 4 * tokens * tokens * head_dim


def head_flops(
    mask: Tensor,
    tokens: int,
    head_dim: int,
    block_q: int,
    block_k: int,
    *,
    attention: str,
    router: str,
    mixing: str,
) -> Flops:
    """FLOPs of one head for one sequence.

    Args:
        mask: (T_m, T_n) bool, the blocks kept by the sparse branch.
        tokens: N.
        head_dim: d.
        block_q, block_k: tokens in a query block and in a key block.
        attention: `full`, `full_other`, `sla`, `sla_main` or `sla2`; `sla_main` sums its linear branch over all keys once.
        router: `none`, `learned`, `mean_pool` or `random`.
        mixing: `none`, `alpha`, `sum`, `projection`, or `sparse` or `linear`: that branch alone.

    Raises:
        ValueError: when the mask does not have one entry per pair of blocks.
    """
    rows, columns = _lengths(tokens, block_q), _lengths(tokens, block_k)
    if tuple(mask.shape) != (len(rows), len(columns)):
        raise ValueError(
            f"{tokens} tokens in blocks of {block_q} and {block_k} make a mask of {(len(rows), len(columns))}, got {tuple(mask.shape)}"
        )
    if mixing == "linear":
        router, sparse = "none", 0  # neither is needed
    else:
        sparse = 4 * head_dim * int(_kept_pairs(mask, rows, columns))
    if attention in DENSE_ATTENTIONS or (bool(mask.all()) and mixing != "linear"):
        return Flops(sparse=sparse)
    state = head_dim * head_dim + head_dim  # entries of one block's h_j and z_j
    gather = len(columns) * state if attention == "sla_main" else 2 * len(rows) * len(columns) * state
    linear = tokens * (2 * head_dim * head_dim + head_dim) + gather + tokens * (2 * head_dim * head_dim + 2 * head_dim)
    linear = 0 if mixing == "sparse" else linear
    return Flops(
        router=_router(router, tokens, head_dim, len(rows), len(columns)),
        sparse=sparse,
        linear=linear,
        mixing=_mixing(mixing, tokens, head_dim),
    )


def layer_flops(mask: Tensor, tokens: int, head_dim: int, block_q: int, block_k: int, **words: str) -> Flops:
    """Sum over the heads of one layer; mask (H, T_m, T_n), the rest as in `head_flops`."""
    return sum((head_flops(head, tokens, head_dim, block_q, block_k, **words) for head in mask), Flops())


def realised_sparsity(mask: Tensor, tokens: int, block_q: int, block_k: int) -> float:
    """Share of query-key pairs (true tokens, not blocks) that the sparse branch skips; mask (..., T_m, T_n)."""
    kept = _kept_pairs(mask, _lengths(tokens, block_q), _lengths(tokens, block_k))
    return 1 - float(kept.double().mean()) / tokens**2


def _kept_pairs(mask: Tensor, row_lengths: list[int], column_lengths: list[int]) -> Tensor:
    """Query-key pairs in the kept blocks; mask (..., T_m, T_n), answer (...), int64."""
    rows, columns = (torch.tensor(lengths, device=mask.device) for lengths in (row_lengths, column_lengths))
    return (mask.bool() * rows[:, None] * columns).sum((-1, -2))


def _lengths(tokens: int, block: int) -> list[int]:
    """True length of every block; the last may be short."""
    return [min(block, tokens - start) for start in range(0, tokens, block)]


def _router(router: str, tokens: int, head_dim: int, t_m: int, t_n: int) -> int:
    """K's mean and smoothing (2 N d), pooling of Q and K (2 N d), projections (of routers that learn), scores of the pooled rows."""
    if router in ("none", "random"):
        return 0
    projections = 2 * (t_m + t_n) * head_dim * head_dim if router in LEARNED_ROUTERS else 0
    return 4 * tokens * head_dim + projections + 2 * t_m * t_n * head_dim


def _mixing(mixing: str, tokens: int, head_dim: int) -> int:
    return {
        "none": 0,
        "sparse": 0,
        "linear": 0,
        "alpha": 3 * tokens * head_dim,
        "sum": tokens * head_dim,
        "projection": tokens * head_dim * (2 * head_dim + 1),
    }[mixing]
