"""Flow matching as Wan2.1 trains and samples it: x_sigma = (1 - sigma) x_0 + sigma eps, velocity eps - x_0, t = 1000 sigma."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from sla2.latents import Images, Latents, sent
from sla2.team import Team, bare

TRAIN_TIMESTEPS = 1000


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """Noise levels sigma in (0, 1) from uniform ones by Wan's shift: s u / (1 + (s - 1) u); 3 for 480p, 5 for 720p."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def noise_levels(uniform: Tensor, law: str, shift: float) -> Tensor:
    """Noise levels sigma in (0, 1) from uniform numbers there.

    Args:
        law: `uniform` and shifted, `logit_normal` (sigmoid of a standard normal) and shifted, or `edm` (log-normal with mean 1.5
            and deviation 1.6 as s / (1 + s), not shifted).
    """
    if law == "uniform":
        return shifted(uniform, shift)
    normal = torch.special.ndtri(uniform)
    return shifted(torch.sigmoid(normal), shift) if law == "logit_normal" else torch.sigmoid(1.5 + 1.6 * normal)


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
    dtype = bare(transformer).dtype
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
    law: str = "uniform",
    team: Team | None = None,
) -> Iterator[Tensor]:
    """Mean squared error of the predicted velocity at random noise levels, in parts that sum to it.

    fp32 weights compute in bf16 on a GPU; the error itself is fp32. Draws depend on a clip's place in the batch, not on the
    micro-batch or the process that it falls into.

    Args:
        latents: (B, C, T', h, w), normalised; text: (B, L, D); empty: (1, L, D) embedding of the empty caption. With a team,
            of this process's share of the batch, and the parts of all processes sum to the loss.
        draw: CPU generator of noise levels (stratified over the batch), seeds of the noise, and dropped captions.
        teacher: predicts the target velocity in place of the data's.
        micro_batch: clips in one part; 0 takes all in one.
        law: of the noise levels, see `noise_levels`.
    """
    own, device = latents.shape[0], latents.device
    count = own * (team.size if team else 1)
    places = list(team.share(count) if team else range(count))
    uniform = ((torch.rand(count, generator=draw) + torch.arange(count)) / count)[places]
    sigma = sent(noise_levels(uniform.clamp(1e-3, 1 - 1e-3), law, shift), device)
    dropped = sent((torch.rand(count, generator=draw) < caption_dropout)[places], device)
    seeds = torch.randint(2**31, (count,), generator=draw)[places].tolist()
    text = torch.where(dropped[:, None, None], empty, text)
    size = micro_batch or own
    for start in range(0, own, size):
        part = slice(start, start + size)
        noise = draw_noise(latents.shape[1:], seeds[part], device)
        x, wanted = noisy(latents[part], noise, sigma[part])
        inputs = x, sigma[part], text[part]
        if team:
            team.exchange(transformer, gradients=start + size >= own)
        with compute_dtype(device):
            if teacher is not None:
                with torch.no_grad():
                    wanted = predict(teacher, *inputs)
            found = predict(transformer, *inputs)
        yield (found - wanted).square().mean() * (len(wanted) / count)


def draw_noise(shape: torch.Size, seeds: list[int], device: torch.device) -> Tensor:
    """Standard normal noise (B, *shape), of each clip by its seed; a GPU's numbers are not a CPU's."""
    if device.type == "cuda":
        draws = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        return torch.stack([torch.randn(shape, generator=draw, device=device) for draw in draws])
    with ThreadPoolExecutor(
        torch.get_num_threads()
    ) as pool:  # torch draws on one thread, so clips are drawn side by side
        return torch.stack(list(pool.map(lambda seed: torch.randn(shape, generator=generator(seed)), seeds)))


def compute_dtype(device: torch.device) -> torch.autocast:
    """bf16 for fp32 weights on a GPU. A weight is used once in a forward, so keeping its bf16 copy would only cost memory."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


@torch.no_grad()
def heldout_loss(
    transformer: nn.Module,
    heldout: Latents | Images,
    shift: float,
    device: torch.device,
    micro_batch: int = 0,
    team: Team | None = None,
    clips: int = 16,
) -> float:
    """Flow-matching loss on held-out clips at fixed noise, in eval mode; comparable between steps and variants.

    Args:
        micro_batch: clips in one forward pass; 0 takes four.
        team: shares the clips; fewer than `clips` are taken where the processes could not share them evenly.
    """
    was_training = transformer.training
    transformer.eval()
    size = team.size if team else 1
    count = min(clips, len(heldout)) // size * size or size
    places = team.share(count) if team else range(count)
    latents, text = (x.to(device) for x in heldout.batch([place % len(heldout) for place in places]))
    empty = heldout.empty_text.to(device)
    parts = flow_losses(
        transformer, latents, text, empty, shift, generator(0, 3), micro_batch=micro_batch or 4, team=team
    )
    total = sum(map(float, parts))
    transformer.train(was_training)
    return team.sum(total) if team else total
