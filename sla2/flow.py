"""Flow matching as Wan2.1 trains and samples it: x_sigma = (1 - sigma) x_0 + sigma eps, velocity eps - x_0, t = 1000 sigma."""

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """Noise levels sigma in (0, 1) from uniform ones by Wan's shift: s u / (1 + (s - 1) u); 3 for 480p, 5 for 720p."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def noisy(latents: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents (B, C, T, h, w) at sigma (B,), and the velocity to predict."""
    sigma = sigma.view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise, noise - latents


def timesteps(sigma: Tensor) -> Tensor:
    """Timesteps that the transformer expects for sigma."""
    return sigma * TRAIN_TIMESTEPS


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on these numbers only, so that a resumed run draws what an uninterrupted one does."""
    seed = 0  # torch seeds its Mersenne Twister with the low 32 bits only, so every number must reach them
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63)
    return torch.Generator().manual_seed(seed)
