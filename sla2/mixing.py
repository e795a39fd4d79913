"""Mixings: how the sparse and the linear branch become one output."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# sigmoid(2) = 0.88: the kept blocks hold most of the softmax mass even at high sparsity; stage 1 learns the rest.
ALPHA_LOGIT = 2.0


class AlphaMixing(nn.Module):
    """O = alpha O_s + (1 - alpha) O_l (equation 13), alpha = sigmoid(logit) in (0, 1), one per head and query block.

    The paper ties alpha to block positions (Algorithm 2: R^{N / b_q}), so to one N. For another N we interpolate the logits
    linearly over relative block position; the paper gives no rule.
    """

    def __init__(self, heads: int, head_dim: int, query_blocks: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full((heads, query_blocks), ALPHA_LOGIT))

    @torch.no_grad()
    def start(self, alpha: Tensor) -> None:
        """Set alpha (H, T_m), within what a logit can still be moved from."""
        self.logit.copy_(alpha.clamp(0.02, 0.98).logit())

    def alpha(self, query_blocks: int) -> Tensor:
        """Alpha (H, T_m) in the parameter's dtype, fp32, for a sequence of that many query blocks."""
        logit = self.logit
        if query_blocks != logit.shape[1]:
            logit = F.interpolate(logit[None], size=query_blocks, mode="linear", align_corners=True)[0]
        return torch.sigmoid(logit)

    def forward(self, sparse: Tensor, linear: Tensor, block_q: int, rows: Tensor | None = None) -> Tensor:
        """Mix outputs (B, H, N, D) of both branches.

        Args:
            rows: (R,) numbers of the whole query blocks that the outputs are of, at the length that alpha is laid out for; None
                for all blocks of a sequence.
        """
        length = sparse.shape[-2]
        alpha = self.alpha(-(-length // block_q)) if rows is None else torch.sigmoid(self.logit[:, rows])
        alpha = alpha.repeat_interleave(block_q, dim=1)[:, :length, None]
        return (alpha * sparse + (1 - alpha) * linear).to(sparse.dtype)


class SumMixing(nn.Module):
    """O = O_s + O_l, no weights: the ablation of alpha."""

    def __init__(self, heads: int, head_dim: int, query_blocks: int) -> None:
        super().__init__()

    def forward(self, sparse: Tensor, linear: Tensor, block_q: int, rows: Tensor | None = None) -> Tensor:
        """Add outputs (B, H, N, D) of both branches."""
        return sparse + linear


class ProjectionMixing(nn.Module):
    """O = O_s + Proj(O_l), SLA's mixing: d x d with bias, shared by heads, zero at the start so that step 0 is the sparse branch."""

    def __init__(self, heads: int, head_dim: int, query_blocks: int) -> None:
        super().__init__()
        self.projection = nn.Linear(head_dim, head_dim)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, sparse: Tensor, linear: Tensor, block_q: int, rows: Tensor | None = None) -> Tensor:
        """Mix outputs (B, H, N, D) of both branches."""
        return sparse + self.projection(linear.to(self.projection.weight.dtype)).to(sparse.dtype)


class SparseOnly(nn.Module):
    """O = O_s: the ablation of the linear branch."""

    def __init__(self, heads: int, head_dim: int, query_blocks: int) -> None:
        super().__init__()

    def forward(self, sparse: Tensor, linear: Tensor | None, block_q: int, rows: Tensor | None = None) -> Tensor:
        """The output (B, H, N, D) of the sparse branch; the other need not be computed."""
        return sparse


class LinearOnly(nn.Module):
    """O = O_l: the ablation of the sparse branch."""

    def __init__(self, heads: int, head_dim: int, query_blocks: int) -> None:
        super().__init__()

    def forward(self, sparse: Tensor | None, linear: Tensor, block_q: int, rows: Tensor | None = None) -> Tensor:
        """The output (B, H, N, D) of the linear branch; the other need not be computed."""
        return linear
