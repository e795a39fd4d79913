"""Attention modules: route, attend sparsely and linearly, mix (equations 13 to 16, Algorithm 2)."""

from dataclasses import dataclass
from pkgutil import resolve_name

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sla2.router import Shape
from sla2.variant import ATTENTIONS, MIXINGS, QUANTIZERS, ROUTERS, Variant, kept_blocks
from sla2_kernels import linear_attention, resolve_backend, sla2_attention, sparse_attention
from sla2_kernels.reference import num_blocks, pool_blocks, smooth_keys, top_k_mask


@dataclass(frozen=True)
class AttentionSettings:
    """Config section `attention`.

    Args:
        block_q, block_k: tokens of a query and a key block; the paper has 128 and 64.
        feature_map: phi of the linear branch, `softmax` over the head dim in the paper; or `elu`, `relu`.
        phi_keys: phi of `smoothed` keys (Algorithm 2) or of `raw` ones (released SLA).
        backend: `auto` takes Triton for CUDA tensors and the reference for CPU ones.
    """

    block_q: int = 128
    block_k: int = 64
    feature_map: str = "softmax"
    phi_keys: str = "smoothed"
    backend: str = "auto"


class FullAttention(nn.Module):
    """Dense softmax attention through torch's SDPA."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; all (B, H, N, D)."""
        return F.scaled_dot_product_attention(q, k, v)


class OtherKernelAttention(nn.Module):
    """Dense softmax attention through a kernel that torch's SDPA would not choose: equal but for rounding."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; all (B, H, N, D)."""
        with sdpa_kernel(other_kernel(q)):
            return F.scaled_dot_product_attention(q, k, v)


def other_kernel(q: Tensor) -> SDPBackend:
    """Dense kernel that torch would not choose for such queries."""
    # In half precision a GPU has flash attention or cuDNN; in fp32 it has neither, so that the memory-efficient one is torch's own choice.
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return SDPBackend.EFFICIENT_ATTENTION
    return SDPBackend.MATH


class SparseLinearAttention(nn.Module):
    """SLA2, and with other words of the sheet its predecessors and ablations.

    Router and mixing parameters are fp32 whatever the model's dtype.

    Args:
        variant: row of the sheet.
        heads, head_dim: of the layer.
        tokens: N that alpha is laid out for; other lengths interpolate it.
        settings: config section `attention`.
    """

    def __init__(self, variant: Variant, heads: int, head_dim: int, tokens: int, settings: AttentionSettings) -> None:
        super().__init__()
        self.variant, self.settings = variant, settings
        shape = Shape(heads, head_dim, num_blocks(tokens, settings.block_k), settings.block_q / settings.block_k)
        self.router = resolve_name(ROUTERS[variant.router])(shape)
        self.mixing = resolve_name(MIXINGS[variant.mixing])(heads, head_dim, num_blocks(tokens, settings.block_q))
        self.quantizer = resolve_name(QUANTIZERS[variant.quantization])

    def scores(self, q: Tensor, k: Tensor, router: nn.Module | None = None) -> Tensor:
        """Scores (B, H, T_m, T_n), fp32 or wider, of queries and keys (B, H, N, D), by another router if one is given."""
        # Block means are not rounded to bf16, in which neighbouring scores would be equal; the fused operator does not round either.
        q, k = (x if x.dtype == torch.float64 else x.float() for x in (q, k))
        keys = pool_blocks(k, self.settings.block_k) - k.mean(-2, keepdim=True)  # smoothed
        return (router or self.router)(pool_blocks(q, self.settings.block_q), keys)

    def kept(self, tokens: int) -> int:
        """Key blocks that each query block keeps at that length."""
        return kept_blocks(self.variant.sparsity, num_blocks(tokens, self.settings.block_k))

    @torch.no_grad()
    def route(self, q: Tensor, k: Tensor) -> Tensor:
        """Hard mask (B, H, T_m, T_n), bool, of queries and keys (B, H, N, D)."""
        return top_k_mask(self.scores(q, k), self.kept(k.shape[-2]))

    def linear_weight(self, mask: Tensor) -> Tensor:
        """Blocks of the linear branch: what the sparse one skips; every block for `sla_main`."""
        return torch.ones_like(mask) if self.variant.attention == "sla_main" else ~mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; all (B, H, N, D)."""
        # Routing and normalisers stay in fp32 in training as at inference, so that both choose the same blocks.
        with torch.autocast(q.device.type, enabled=False):
            return self._forward(q, k, v)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = self.settings
        blocks = {"block_q": s.block_q, "block_k": s.block_k, "backend": s.backend}
        # The fused operator covers what mixes by weights and keeps the branches apart; the other rows are put together here.
        fused = self.variant.mixing in ("alpha", "sum") and self.variant.attention != "sla_main"
        if fused and resolve_backend(s.backend, q) == "triton":
            return self._fused(q, k, v, blocks)
        smooth = smooth_keys(k)  # shifts every row of S by a constant, so the softmax branch is unchanged
        mask = self.route(q, k)
        sparse = linear = None
        if self.variant.mixing != "linear":
            precision = self.quantizer.precision(self.training)
            sparse, _ = sparse_attention(q, smooth, v, mask, precision=precision, **blocks)
        if self.variant.mixing != "sparse":
            phi_keys = smooth if s.phi_keys == "smoothed" else k
            linear = linear_attention(q, phi_keys, v, self.linear_weight(mask), feature_map=s.feature_map, **blocks)
        return self.mixing(sparse, linear, s.block_q)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, blocks: dict) -> Tensor:
        weighted, learned = self.variant.mixing == "alpha", self.variant.router == "learned"
        return sla2_attention(
            q,
            k,
            v,
            kept=self.kept(k.shape[-2]),
            alpha=self.mixing.alpha(num_blocks(q.shape[-2], self.settings.block_q)) if weighted else None,
            projections=(self.router.query, self.router.key) if learned else None,
            mask=None if self.variant.router in ("learned", "mean_pool") else self.route(q, k),
            feature_map=self.settings.feature_map,
            phi_keys=self.settings.phi_keys,
            precision=self.quantizer.precision(self.training),
            **blocks,
        )


def build(variant: Variant, heads: int, head_dim: int, tokens: int, settings: AttentionSettings) -> nn.Module:
    """The attention module of a row."""
    if variant.dense:
        return resolve_name(ATTENTIONS[variant.attention])()
    return SparseLinearAttention(variant, heads, head_dim, tokens, settings)
