"""Estimators: what stage 1 minimises at one layer, on a sample of query blocks (section 6, equation 17).

The hard choice of blocks has no gradient. Three ways to train a router all the same:

    soft              SoftTop-k in the forward and the backward, as in the paper. Its loss can fall while the hard choice gets
                      worse: a uniform soft mask cancels in the softmax's normaliser.
    straight_through  the hard mask in the forward, SoftTop-k's Jacobian in the backward: what is minimised is what inference runs.
    mass              cross-entropy of the router's softmax against the exact softmax mass of each key block, the target that
                      SeerAttention distils; the mixing learns on the hard output.

Where the router has nothing to learn, the mixing learns on the hard output whatever the estimator. Nothing here is of size N x N,
and only the sampled rows are attended.
"""

import torch
from torch import Tensor

from sla2.attention import SparseLinearAttention
from sla2.router import soft_top_k, straight_through
from sla2_kernels import linear_attention, soft_sparse_attention, sparse_attention
from sla2_kernels.blockwise import block_mass
from sla2_kernels.reference import smooth_keys, top_k_mask

# Share of its weight that a skipped block keeps in the sparse branch of `straight_through`. log M has no gradient at M = 0; with
# a share it has that of adding the block, which is what the router must learn. It is small, as alpha learns on what leaks: with
# 1e-3, alpha of the random router, which keeps 2.5% of the mass, got worse and not better.
SKIPPED = 1e-4


def relative_error(out: Tensor, target: Tensor) -> Tensor:
    """Squared error over the target's power: equal weight for layers of unequal size."""
    return (out.float() - target.float()).square().mean() / target.float().square().mean()


def layer_loss(
    module: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor, o: Tensor, rows: Tensor, settings: dict, tau: float
) -> Tensor:
    """Loss of one layer's router and mixing.

    Args:
        q, k, v: (B, H, N, D), and o, the dense output.
        rows: (R,) numbers of whole query blocks.
        settings: config section `stage1`.
        tau: temperature of SoftTop-k at this step.
    """
    block = module.settings.block_q
    tokens = (rows[:, None] * block + torch.arange(block, device=rows.device)).flatten()
    scores = module.scores(q, k)[:, :, rows]
    q, o = q[:, :, tokens], o[:, :, tokens]
    kept = module.kept(k.shape[-2])
    if settings["estimator"] == "mass" or not scores.requires_grad:
        loss = relative_error(module.mixing(*hard_branches(module, q, k, v, top_k_mask(scores, kept)), block, rows), o)
        return loss + divergence(scores, q, k, module) if scores.requires_grad else loss
    choose, skipped = {"soft": (soft_top_k, 0.0), "straight_through": (straight_through, SKIPPED)}[
        settings["estimator"]
    ]
    mask = choose(scaled(scores, q.shape[-1], settings["router_logits"]), kept, tau)
    return relative_error(module.mixing(*soft_branches(module, q, k, v, mask, skipped), block, rows), o)


def scaled(scores: Tensor, head_dim: int, kind: str) -> Tensor:
    """Router scores as SoftTop-k gets them: `raw`, `scaled` by 1 / sqrt(D), or the `softmax` of these."""
    if kind == "raw":
        return scores
    logits = scores * head_dim**-0.5
    return logits.softmax(-1) if kind == "softmax" else logits


def soft_branches(
    module: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, skipped: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sparse and linear output (B, H, N_q, D) under a soft mask M, differentiable in it.

    The sparse branch is P proportional to M exp(S), the linear one is weighted by 1 - M; both are the hard operator where M is
    0 or 1.

    Args:
        q: (B, H, N_q, D), whole query blocks; k, v: (B, H, N, D).
        mask: (B, H, N_q / b_q, T_n) in [0, 1], fp32.
        skipped: least weight of a block in the sparse branch.
    """
    smooth, linear_keys, blocks = _keys(module, k)
    least = max(skipped, torch.finfo(mask.dtype).tiny)
    sparse = soft_sparse_attention(q, smooth, v, (mask * (1 - least) + least).log(), **blocks)
    return sparse, linear_attention(q, linear_keys, v, 1 - mask, feature_map=module.settings.feature_map, **blocks)


@torch.no_grad()
def hard_branches(
    module: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """As `soft_branches`, for a bool mask and without gradients."""
    smooth, linear_keys, blocks = _keys(module, k)
    sparse, _ = sparse_attention(q, smooth, v, mask, **blocks)
    weight = module.linear_weight(mask)
    return sparse, linear_attention(q, linear_keys, v, weight, feature_map=module.settings.feature_map, **blocks)


def divergence(scores: Tensor, q: Tensor, k: Tensor, module: SparseLinearAttention) -> Tensor:
    """Mean KL divergence of the router's softmax from the exact softmax mass of the key blocks, in nats per query block."""
    s = module.settings
    with torch.no_grad():
        mass = block_mass(q, k, s.block_q, s.block_k)
    log_share = (scores * q.shape[-1] ** -0.5).log_softmax(-1)
    return torch.nn.functional.kl_div(log_share, mass.to(log_share), reduction="none").sum(-1).mean()


def _keys(module: SparseLinearAttention, k: Tensor) -> tuple[Tensor, Tensor, dict]:
    """Keys of the sparse and of the linear branch, and the keywords of the operators."""
    s = module.settings
    smooth = smooth_keys(k)
    blocks = {"block_q": s.block_q, "block_k": s.block_k, "backend": s.backend}
    return smooth, smooth if s.phi_keys == "smoothed" else k, blocks
