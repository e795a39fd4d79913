"""Attention error: how far an approximate attention's output is from dense attention on the same Q, K, V."""

import torch
from torch import Tensor


def attention_error(output: Tensor, dense: Tensor) -> dict[str, float]:
    """Card: `attention.rel_l1`, `attention.rmse`, `attention.cosine`, exact.

    Definition: distance of an approximate output from the dense one on the same Q, K and V.
    Formula: rel_l1 = sum|O - O'| / sum|O|; rmse = sqrt(mean((O - O')^2)); cosine of the two flattened tensors.
    Range: rel_l1 and rmse [0, inf), cosine [-1, 1]; equal tensors give 0, 0 and 1. Direction: rel_l1 and rmse lower, cosine higher.
    Source: definitions of the SageAttention and SpargeAttention papers; computed in float64.
    Blind spots: every token and head weighs by its magnitude; errors that the next layers would cancel still count. rel_l1 and
        cosine do not change when both tensors are scaled, rmse does.

    Args:
        output, dense: tensors of one shape, such as (B, H, N, D).

    Raises:
        ValueError: when the shapes differ, or the dense output is zero.
    """
    if output.shape != dense.shape:
        raise ValueError(f"attention outputs have one shape, got {tuple(output.shape)} and {tuple(dense.shape)}")
    output, dense = output.double(), dense.double()
    scale = dense.abs().sum()
    if scale == 0:
        raise ValueError("the dense output is zero everywhere: relative errors are undefined")
    difference = output - dense
    cosine = (output * dense).sum() / (output.norm() * dense.norm()).clamp_min(torch.finfo(torch.float64).tiny)
    return {
        "attention.rel_l1": float(difference.abs().sum() / scale),
        "attention.rmse": float(difference.square().mean().sqrt()),
        "attention.cosine": float(cosine),
    }
