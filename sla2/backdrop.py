"""Backgrounds of procedural scenes: smooth value noise that a camera can pan over, and grain.

The noise lives on an endless lattice with hashed values, so a panning camera never reaches its end and no random state is kept.
Legend: B clips, T frames, H, W; lengths in short sides of the frame (`sla2.scenes`).
"""

import math
from functools import cache

import torch
from torch import Tensor

OCTAVES = ((0.25, 0.6), (0.125, 0.3), (0.0625, 0.15))  # cell of the noise in short sides, amplitude
GRAIN_SIDE = 512
_MASK = 0xFFFFFFFF


def light(scenes: list[dict], times: Tensor, height: int, width: int, device: str) -> Tensor:
    """Brightness of the background (B, T, H, W) around 1, T = 1 when no camera pans."""
    short = min(height, width)
    velocity = torch.tensor([scene["pan"]["velocity"] for scene in scenes], dtype=torch.float64)
    times = times if velocity.any() else times[:1]
    offset = velocity[:, None, :] * times[None, :, None]
    seeds = torch.tensor([scene["background"]["seed"] for scene in scenes])[:, None, None, None]
    total = 0.0
    for octave, (cell, amplitude) in enumerate(OCTAVES):
        column, near_x, x = _lattice((torch.arange(width) + 0.5) / short, offset[..., :1], cell, device)
        row, near_y, y = _lattice((torch.arange(height) + 0.5) / short, offset[..., 1:], cell, device)
        values = (_hash(seeds + octave, row[..., None], column[:, :, None, :]) * (2 / _MASK) - 1).float().to(device)
        rows = _between(values, near_y[..., None], y[..., None], 2)
        total = total + amplitude * _between(rows, near_x[:, :, None, :], x[:, :, None, :], 3)
    contrast = torch.tensor([float(scene["background"]["contrast"]) for scene in scenes])[:, None, None, None]
    return 1 + contrast.to(device) * total


def _lattice(pixels: Tensor, offset: Tensor, cell: float, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """One axis of the noise: lattice numbers (B, T, n) in use, each pixel's place among them (B, T, L), and its smooth fraction."""
    at = (pixels + offset) / cell
    whole = at.floor()
    near = (whole - whole[..., :1]).long()
    numbers = whole[..., :1].long() + torch.arange(int(near.max()) + 2)
    fraction = at - whole
    smooth = fraction**3 * (fraction * (fraction * 6 - 15) + 10)
    return numbers, near.to(device), smooth.float().to(device)


def _between(values: Tensor, near: Tensor, smooth: Tensor, axis: int) -> Tensor:
    """Values along an axis, from the lattice number `near` to the next by the fraction `smooth`."""
    first = values.take_along_dim(near, axis)
    return first + (values.take_along_dim(near + 1, axis) - first) * smooth


def grain(scenes: list[dict], steps: range, height: int, width: int, device: str) -> Tensor:
    """Grain (B, T, H, W) in 8-bit levels: every frame sees another window of one field of normal numbers."""
    sigma = torch.tensor([float(scene["background"]["grain"]) for scene in scenes], device=device)[:, None, None, None]
    if not sigma.any():
        return sigma
    seeds = torch.tensor([scene["background"]["seed"] for scene in scenes])[:, None, None]
    start = _hash(seeds, torch.tensor(list(steps))[None, :, None], torch.tensor([7, 11]))
    y = (start[..., :1] + torch.arange(height)) % GRAIN_SIDE
    x = (start[..., 1:] + torch.arange(width)) % GRAIN_SIDE
    return sigma * _grain_field().to(device)[y.to(device)[..., None], x.to(device)[:, :, None, :]]


@cache
def _grain_field() -> Tensor:
    uniform = (_hash(torch.tensor(1), torch.arange(GRAIN_SIDE**2)) + 0.5) / (_MASK + 1)
    return (math.sqrt(2) * torch.erfinv(2 * uniform - 1)).float().view(GRAIN_SIDE, GRAIN_SIDE)


def _hash(seed: Tensor, *keys: Tensor) -> Tensor:
    """32 random bits, as int64, for every combination of seed and keys."""
    bits = _mix(seed & _MASK)
    for key in keys:
        bits = _mix(bits ^ (key * 0x9E3779B1 & _MASK))
    return bits


def _mix(bits: Tensor) -> Tensor:
    for _ in range(2):
        bits = (bits ^ (bits >> 16)) * 0x45D9F3B & _MASK
    return bits ^ (bits >> 16)
