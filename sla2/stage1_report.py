"""What stage 1 reached at each layer and noise level, beside the controls that say what it is worth.

On held-out clips, others than those by which the state was chosen.

Routers: the row's own, by its word, and `mean_pool` (the heuristic: the identity for both projections), `random` and `oracle` (the
key blocks with the largest exact softmax mass). Alpha: `trained` is the row's mixing, of its own router only; `fitted` is each
router's own best alpha in the sense of least squares, by head and query block, on training clips, so that routers are compared
at their best; `exact` is P_1 1, the softmax mass that was kept, which the decomposition of section 2.2 takes.

Metrics of a router, with no alpha: `kept_mass`, P_1 1, mean over heads and query blocks; `oracle_overlap`, share of the oracle's
blocks that it chose; `mask_concentration`, share of SoftTop-k's mask that lies in the hard choice. Metrics of both: `hard_error`
and `soft_error`, relative squared error against dense attention under the hard and the soft mask; `alpha_error`, mean |alpha - P_1 1|.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from sla2.attention import SparseLinearAttention
from sla2.estimators import hard_branches, relative_error, scaled, soft_branches
from sla2.files import write_atomic
from sla2.router import MeanPoolRouter, RandomRouter, Shape, soft_top_k
from sla2.variant import kept_blocks
from sla2_kernels.blockwise import block_mass
from sla2_kernels.reference import mix, pool_blocks, top_k_mask

COLUMNS = ("layer", "sigma", "router", "alpha", "metric", "value")


class AlphaFit:
    """Alpha (H, T_m) of each router that minimises the relative squared error of the hard operator over the samples that were added.

    Args:
        controls: whether the control routers get theirs, or only the row's own router.
    """

    def __init__(self, module: SparseLinearAttention, controls: bool) -> None:
        self.module, self.controls = module, controls
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def add(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
        """Add samples; all (B, H, N, D), o being the dense output."""
        block, mass = self.module.settings.block_q, _mass(self.module, q, k) if self.controls else None
        weight = 1 / o.float().square().mean((1, 2, 3), keepdim=True)  # as in `relative_error`
        for word, scores in router_scores(self.module, q, k, mass):
            sparse, linear = hard_branches(self.module, q, k, v, _hard(self.module, scores))
            apart, wanted = sparse.float() - linear.float(), o.float() - linear.float()
            sums = (
                pool_blocks((weight * x * apart).sum(-1, keepdim=True), block).sum((0, -1)) for x in (wanted, apart)
            )
            self.sums[word] = tuple(
                a + b for a, b in zip(self.sums.get(word, (0.0, 0.0)), sums, strict=True)
            )  # (H, T_m)

    def alpha(self, word: str) -> Tensor:
        """Alpha (H, T_m) in [0, 1]."""
        above, below = self.sums[word]
        return (above / below.clamp_min(torch.finfo(below.dtype).tiny)).clamp(0, 1)


def router_scores(
    module: SparseLinearAttention, q: Tensor, k: Tensor, mass: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """Word and scores (B, H, T_m, T_n) of the row's own router and, with the block mass (B, H, T_m, T_n), of the controls."""
    own = module.variant.router
    yield own, module.scores(q, k)
    if mass is None:
        return
    D = q.shape[-1]
    shape = Shape(q.shape[1], D, mass.shape[-1], module.settings.block_q / module.settings.block_k)
    for word, kind in (("mean_pool", MeanPoolRouter), ("random", RandomRouter)):
        if word != own:
            yield word, module.scores(q, k, kind(shape))
    yield "oracle", mass.clamp_min(torch.finfo(mass.dtype).tiny).log() * D**0.5  # the scores of which it is the softmax


@torch.no_grad()
def layer_report(
    module: SparseLinearAttention, fit: AlphaFit, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logits: str, tau: float
) -> Iterator[tuple[str, str, str, float]]:
    """Router, alpha, metric and value of one layer.

    Args:
        fit: of this layer, after its training samples.
        q, k, v, o: (B, H, N, D), o being the dense output.
        logits, tau: what SoftTop-k gets and its temperature, for the soft error and the concentration.
    """
    block, mass = module.settings.block_q, _mass(module, q, k)
    best = _hard(module, mass)
    for word, scores in router_scores(module, q, k, mass):
        mask, kept = _hard(module, scores), module.kept(k.shape[-2])
        soft = soft_top_k(scaled(scores, q.shape[-1], logits), kept, tau)
        held = (mass * mask).sum(-1)  # (B, H, T_m)
        yield word, "", "kept_mass", held.mean().item()
        yield word, "", "oracle_overlap", (mask & best).sum().item() / best.sum().item()
        yield word, "", "mask_concentration", (soft * mask).sum().item() / soft.sum().item()
        branches = {
            "hard_error": hard_branches(module, q, k, v, mask),
            "soft_error": soft_branches(module, q, k, v, soft),
        }
        alphas = {"trained": None} if word == module.variant.router else {}
        for name, alpha in (alphas | {"fitted": fit.alpha(word), "exact": held}).items():
            for metric, (sparse, linear) in branches.items():
                out = mix(sparse, linear, alpha, block) if alpha is not None else module.mixing(sparse, linear, block)
                yield word, name, metric, relative_error(out, o).item()
            if name == "trained" and hasattr(module.mixing, "alpha"):
                alpha = module.mixing.alpha(held.shape[-1])
            if alpha is not None:
                yield word, name, "alpha_error", (alpha - held).abs().mean().item()


def write_report(path: Path, rows: list[tuple]) -> None:
    """Write `report.csv`: (layer, sigma, router, alpha, metric, value), mean over the clips of equal keys."""
    values: dict[tuple, list[float]] = {}
    for *key, value in rows:
        values.setdefault(tuple(key), []).append(value)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([*key, f"{fmean(found):.6g}"] for key, found in values.items())
    write_atomic(path, text.getvalue())


def _mass(module: SparseLinearAttention, q: Tensor, k: Tensor) -> Tensor:
    return block_mass(q, k, module.settings.block_q, module.settings.block_k).float()


def _hard(module: SparseLinearAttention, scores: Tensor) -> Tensor:
    return top_k_mask(scores, kept_blocks(module.variant.sparsity, scores.shape[-1]))
