"""Flow matching as Wan2.1 trains and samples it: x_sigma = (1 - sigma) x_0 + sigma eps, velocity eps - x_0, t = 1000 sigma."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sla2.latents import Latents

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


def predict(transformer: nn.Module, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """Velocity (B, C, T', h, w) in fp32 of noisy latents at sigma (B,)."""
    dtype = transformer.dtype
    return transformer(x.to(dtype), timesteps(sigma), text.to(dtype), return_dict=False)[0].float()


def flow_losses(
    transformer: nn.Module,
    latents: Tensor,
    text: Tensor,
    empty: Tensor,
    shift: float,
    draw: torch.Generator,
    caption_dropout: float = 0.0,
    teacher: nn.Module | None = None,
    micro_batch: int = 0,
) -> Iterator[Tensor]:
    """Mean squared error of the predicted velocity at shifted uniform noise levels, in parts that sum to it.

    fp32 weights compute in bf16 on a GPU; the error itself is fp32. Draws do not depend on `micro_batch`.

    Args:
        latents: (B, C, T', h, w), normalised; text: (B, L, D); empty: (1, L, D) embedding of the empty caption.
        draw: CPU generator of noise levels (stratified over the batch), noise and dropped captions.
        teacher: predicts the target velocity in place of the data's.
        micro_batch: clips in one part; 0 takes all in one.
    """
    count, device = latents.shape[0], latents.device
    uniform = (torch.rand(count, generator=draw) + torch.arange(count)) / count
    sigma = shifted(uniform.clamp(1e-3, 1 - 1e-3), shift).to(device)
    noise = torch.randn(latents.shape, generator=draw).to(device)
    dropped = (torch.rand(count, generator=draw) < caption_dropout).to(device)
    text = torch.where(dropped[:, None, None], empty, text)
    x, target = noisy(latents, noise, sigma)
    for start in range(0, count, micro_batch or count):
        part = slice(start, start + (micro_batch or count))
        inputs = x[part], sigma[part], text[part]
        wanted = target[part]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if teacher is not None:
                with torch.no_grad():
                    wanted = predict(teacher, *inputs)
            found = predict(transformer, *inputs)
        yield (found - wanted).square().mean() * (len(wanted) / count)


@torch.no_grad()
def heldout_loss(
    transformer: nn.Module, heldout: Latents, shift: float, device: torch.device, micro_batch: int = 0, clips: int = 16
) -> float:
    """Flow-matching loss on held-out clips at fixed noise, in eval mode; comparable between steps and variants.

    Args:
        micro_batch: clips in one forward pass, as in `flow_losses`; four at a time share a draw whatever it is.
    """
    was_training = transformer.training
    transformer.eval()
    total, count, empty = 0.0, min(clips, len(heldout)), heldout.empty_text.to(device)
    for start in range(0, count, 4):
        indices = list(range(start, min(start + 4, count)))
        latents, text = (tensor.to(device) for tensor in heldout.batch(indices))
        parts = flow_losses(transformer, latents, text, empty, shift, generator(0, 3, start), micro_batch=micro_batch)
        total += len(indices) * sum(map(float, parts))
    transformer.train(was_training)
    return total / count
