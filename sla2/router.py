"""Routers: which key blocks a query block attends to exactly (paper section 4, equations 15 to 17).

A router turns pooled queries and keys into scores; `top_k_mask` (hard, equation 16, beside the kernels) and `soft_top_k` (equation 17) turn scores into
masks. Where we differ from the paper: equation 16 scores raw products, Algorithm 2 line 8 puts softmax(. / sqrt(d)) on them; the
hard mask is the same, SoftTop-k is not, so `router_logits` chooses and defaults to `raw` (wan.md section 4: softmaxed scores make
the soft mask nearly uniform).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sla2_kernels.reference import top_k_mask

BISECTIONS = 40  # halves the bracket below fp32 resolution


@dataclass(frozen=True)
class Shape:
    """What a router is made for.

    Args:
        heads, head_dim: of the layer.
        key_blocks: T_n of the length that it is trained at; routers serve other lengths too.
        stride: key blocks in a query block, b_q / b_k.
    """

    heads: int
    head_dim: int
    key_blocks: int
    stride: float


class LearnedRouter(nn.Module):
    """P_c = proj_q(pool(Q)) proj_k(pool(K))^T, projections d x d, shared by the heads of a layer, initialised to the identity.

    The identity is SLA's heuristic router, so stage 1 starts from it.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.eye(shape.head_dim))
        self.key = nn.Parameter(torch.eye(shape.head_dim))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores (B, H, T_m, T_n) of pooled queries (B, H, T_m, D) and pooled, smoothed keys (B, H, T_n, D)."""
        dtype = self.query.dtype
        return (q.to(dtype) @ self.query.mT) @ (k.to(dtype) @ self.key.mT).mT


class OffsetRouter(LearnedRouter):
    """`LearnedRouter` with projections of each head's own, and a bias for each head and offset between the two blocks; not in the paper.

    Heads look for different things, and where a block lies tells much of its worth. Offsets are in key blocks, so at another
    length they keep their meaning as long as frames have as many tokens; those farther than any seen in training take the bias
    of the farthest.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        eye = torch.eye(shape.head_dim).repeat(shape.heads, 1, 1)
        self.query, self.key = nn.Parameter(eye), nn.Parameter(eye.clone())
        self.bias = nn.Parameter(torch.zeros(shape.heads, 2 * shape.key_blocks - 1))  # offset 0 in the middle
        self.unit = shape.head_dim**0.5  # scores are over sqrt(D) before they are compared: a bias in units of those
        self.stride = shape.stride

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """As `LearnedRouter.forward`."""
        rows = (torch.arange(q.shape[-2], device=q.device) * self.stride).long()
        farthest = self.bias.shape[1] // 2
        offset = torch.arange(k.shape[-2], device=k.device) - rows[:, None]  # (T_m, T_n)
        return super().forward(q, k) + self.unit * self.bias[:, offset.clamp(-farthest, farthest) + farthest]


class MeanPoolRouter(nn.Module):
    """SLA's heuristic: pool(Q) pool(K)^T, no parameters."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """As `LearnedRouter.forward` with the identity for both projections."""
        return q.float() @ k.float().mT


class RandomRouter(nn.Module):
    """Scores that know nothing of the content: the lower bound for routing. The same draw in every call of one geometry."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Uniform scores (B, H, T_m, T_n), equal for every batch item; drawn on the CPU so that devices agree."""
        shape = (q.shape[1], q.shape[2], k.shape[2])
        scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        return scores.to(q.device).expand(q.shape[0], *shape)


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, kept: float, tau: float) -> Tensor:
        z = scores / tau
        share = torch.tensor(kept / z.shape[-1], dtype=z.dtype, device=z.device)
        # sum(sigmoid(z + lam)) grows in lam, and equals `kept` inside this bracket.
        low = torch.logit(share) - z.amax(-1, keepdim=True)
        high = torch.logit(share) - z.amin(-1, keepdim=True)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            above = torch.sigmoid(z + middle).sum(-1, keepdim=True) > kept
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        mask = torch.sigmoid(z + (low + high) / 2)
        ctx.save_for_backward(mask)
        ctx.tau = tau
        return mask

    @staticmethod
    def backward(ctx, grad: Tensor):
        (mask,) = ctx.saved_tensors
        weight = mask * (1 - mask)
        total = weight.sum(-1, keepdim=True)
        # A saturated row has no weight left anywhere: its mask does not move, so its gradient is zero.
        centre = (weight * grad).sum(-1, keepdim=True) / total.clamp_min(torch.finfo(mask.dtype).tiny)
        return weight / ctx.tau * (grad - centre), None, None


def soft_top_k(scores: Tensor, kept: float, tau: float) -> Tensor:
    """SoftTop-k, equation 17: sigmoid(scores / tau + lambda_i), lambda_i such that row i sums to `kept`.

    The gradient goes through lambda_i by the implicit function theorem: with w = m (1 - m),
    dL/dx = (w / tau) (g - <w, g> / sum(w)).

    Args:
        scores: (..., T_n), fp32 or fp64.
        kept: blocks per row, 0 < kept <= T_n; T_n gives ones.
        tau: temperature above 0, in units of the scores.
    """
    if not 0 < kept <= scores.shape[-1]:
        raise ValueError(f"kept is {kept}, must be above 0 and at most {scores.shape[-1]} key blocks")
    if kept == scores.shape[-1]:
        return torch.ones_like(scores)
    return _SoftTopK.apply(scores, kept, tau)


def straight_through(scores: Tensor, kept: int, tau: float) -> Tensor:
    """The hard mask's value with SoftTop-k's gradient: what stage 1 optimises is then what inference runs."""
    soft = soft_top_k(scores, kept, tau)
    return soft + (top_k_mask(scores, kept).to(soft) - soft).detach()
