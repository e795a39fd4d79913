"""Attention error of a variant, layer by layer, against dense attention on the same Q, K, V.

The untouched base model runs densely on noised held-out latents; each layer's Q, K, V and dense output go to the variant's own
attention with its trained router and mixing. So every variant is measured on the same inputs, and an error is the
attention's alone, not the drift of the layers before it.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sla2.adapter import load_adapter
from sla2.attention import AttentionSettings, OtherKernelAttention, SparseLinearAttention
from sla2.flow import generator, noisy, predict
from sla2.latents import Latents
from sla2.variant import Variant
from sla2.wan import BaseModel, capture_qkv, install, self_attentions
from sla2_eval.flops import realised_sparsity
from sla2_eval.metrics.attention import attention_error
from sla2_kernels.blockwise import block_mass

FLOOR_QUERIES = 512  # at most about twice as many: plain attention holds a row of N scores for each
NOISE_STREAM = 6  # of `sla2.flow.generator`; streams below it belong to training


def attention_errors(
    transformer: nn.Module,
    base: BaseModel,
    variant: Variant,
    attention: AttentionSettings,
    trained: Path | None,
    settings: dict,
) -> dict[tuple[int, str], float]:
    """Mean errors over held-out clips and noise levels.

    Args:
        transformer: the base model, untouched; it is so again afterwards.
        trained: folder of the variant's adapter; None for a fresh one.
        settings: config section `score`; `attention_clips` and `attention_sigmas` are read.

    Returns:
        Value by (layer, metric). Dense rows have nothing to compare and get an empty answer.
    """
    if variant.dense:
        return {}
    layers = self_attentions(transformer)
    former = [layer.processor for layer in layers]
    try:
        install(transformer, variant, attention, base.tokens)
        if trained is not None:
            load_adapter(trained, transformer, base)
        modules = [layer.processor.attention.eval() for layer in layers]
        sums: dict[tuple[int, str], float] = {}
        samples = 0
        for captured in captures(transformer, base, settings):
            samples += 1
            for layer, (module, seen) in enumerate(zip(modules, captured, strict=True)):
                for metric, value in layer_errors(module, **seen).items():
                    sums[layer, metric] = sums.get((layer, metric), 0.0) + value
        return {key: total / samples for key, total in sums.items()}
    finally:
        for layer, processor in zip(layers, former, strict=True):
            layer.set_processor(processor)


def kernel_floor(transformer: nn.Module, base: BaseModel, settings: dict) -> dict[tuple[int, str], float]:
    """Card: `floor.attention_rel_l1`, exact.

    Definition: dense attention again with another kernel: how far two that compute the same are apart, the noise floor of attention errors.
    Formula: `attention.rel_l1` of the kernel of `full_other` (on a GPU the memory-efficient one, on a CPU plain torch) against the one
        that the model runs with, over evenly spaced queries.
    Range: [0, inf); 1e-7 in fp32, 1e-3 in bf16. Direction: none; errors below it mean nothing.
    Source: ours; measured on the untouched dense model only.
    Blind spots: says nothing of what the rounding does to a video over many steps; the fidelity of a row of `full_other` does.

    Returns:
        Value by (layer, metric), mean over held-out clips and noise levels; the arguments are those of `attention_errors`.
    """
    sums: dict[tuple[int, str], float] = {}
    samples = 0
    for captured in captures(transformer, base, settings):
        samples += 1
        for layer, seen in enumerate(captured):
            rows = slice(None, None, max(1, seen["q"].shape[-2] // FLOOR_QUERIES))
            with torch.no_grad():
                again = OtherKernelAttention()(seen["q"][:, :, rows].contiguous(), seen["k"], seen["v"])
            error = attention_error(again, seen["o"][:, :, rows])["attention.rel_l1"]
            key = layer, "floor.attention_rel_l1"
            sums[key] = sums.get(key, 0.0) + error
    return {key: total / samples for key, total in sums.items()}


def captures(transformer: nn.Module, base: BaseModel, settings: dict) -> Iterator[list[dict[str, Tensor]]]:
    """q, k, v and dense output o of every layer, (1, H, N, D), for each held-out clip at each noise level."""
    heldout = Latents(Path(base.latents) / "heldout")
    device = next(transformer.parameters()).device
    for clip in range(min(settings["attention_clips"], len(heldout))):
        latents, text = (tensor.to(device) for tensor in heldout.batch([clip]))
        for number, level in enumerate(settings["attention_sigmas"]):
            sigma = torch.full((1,), level, device=device)
            noise = torch.randn(latents.shape, generator=generator(settings["seed"], NOISE_STREAM, clip, number))
            x, _ = noisy(latents, noise.to(device), sigma)
            with torch.no_grad(), capture_qkv(transformer) as found:
                predict(transformer, x, sigma, text)
            yield found


@torch.no_grad()
def layer_errors(module: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> dict[str, float]:
    """Errors of one layer.

    Card: `attention.kept_mass`, exact.

    Definition: how much of dense attention's weight lies in the blocks that the sparse branch keeps.
    Formula: mean over query blocks and heads of the softmax mass of their rows in kept blocks.
    Range: [0, 1]; 1 when nothing is skipped. Direction: higher is better.
    Source: the oracle alpha, P_1 1, of the paper's section 2.2; computed from dense scores.
    Blind spots: mass is not value: a block of little mass can hold what matters.

    Card: `attention.alpha_error`, `attention.alpha_mean`, exact.

    Definition: how far the learnt alpha is from the kept mass, which is what it would be if both branches were exact; and its mean.
    Formula: alpha_error = mean |alpha - kept mass| per head and query block; alpha_mean = mean alpha.
    Range: [0, 1]. Direction: alpha_error lower, alpha_mean none.
    Source: the paper's section 2.2.
    UndefinedError: a mixing without an alpha.
    Blind spots: where the linear branch is poor, the best alpha is not the kept mass.

    Card: `sparsity.realised`, exact.

    Definition: share of query-key pairs that the sparse branch skips, ragged blocks counted by their true length.
    Formula: 1 - kept pairs / N^2.
    Range: [0, 1). Direction: none.
    Source: the mask that the operator used.
    Blind spots: says nothing about which pairs.

    Args:
        q, k, v, o: (B, H, N, D), o being the dense output.
    """
    block_q, block_k = module.settings.block_q, module.settings.block_k
    mask = module.route(q, k)
    kept = (block_mass(q, k, block_q, block_k) * mask).sum(-1)  # (B, H, T_m)
    found = attention_error(module(q, k, v), o)
    found["attention.kept_mass"] = float(kept.mean())
    if hasattr(module.mixing, "alpha"):
        alpha = module.mixing.alpha(kept.shape[-1])
        found["attention.alpha_error"] = float((alpha - kept).abs().mean())
        found["attention.alpha_mean"] = float(alpha.mean())
    found["sparsity.realised"] = realised_sparsity(mask, q.shape[-2], block_q, block_k)
    return found
