"""Latents and text embeddings, encoded once and cached in safetensors shards."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sla2.errors import UserError
from sla2.files import atomic_path, read_json, write_json
from sla2.progress import bar

SHARD_CLIPS = 64


def encode(pipeline, clips, folder: Path, text_length: int, device: torch.device, batch: int = 8) -> None:
    """Encode a split shard by shard; whole shards of an earlier run are kept.

    Args:
        pipeline: WanPipeline with VAE, tokenizer and text encoder.
        clips: `sla2.data.Clips`.
        folder: gets `00000.safetensors`, ... and `index.json`.
        text_length: tokens that captions are padded to.
    """
    starts = list(range(0, len(clips), SHARD_CLIPS))
    for number in bar(len(starts), f"encode {folder.name}"):
        path = folder / f"{number:05d}.safetensors"
        if path.is_file():
            continue
        indices = list(range(starts[number], min(starts[number] + SHARD_CLIPS, len(clips))))
        latents = []
        for start in range(0, len(indices), batch):
            frames = clips.batch(indices[start : start + batch]).to(device)
            latents.append(encode_frames(pipeline.vae, frames).cpu())
        captions = [clips[i].caption for i in indices]
        tensors = {"latents": torch.cat(latents), "text": encode_text(pipeline, captions, text_length, device).cpu()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary)
    empty = encode_text(pipeline, [""], text_length, device).cpu()
    with atomic_path(folder / "empty.safetensors") as temporary:
        save_file({"text": empty}, temporary)
    write_json(folder / "index.json", {"clips": len(clips), "shard_clips": SHARD_CLIPS, "text_length": text_length})


@torch.no_grad()
def encode_frames(vae, frames: Tensor) -> Tensor:
    """Normalised latents (B, C, T', h, w) in fp32 of uint8 frames (B, T, H, W, 3): the mean of the VAE's posterior."""
    video = (frames.float() / 127.5 - 1).permute(0, 4, 1, 2, 3).to(vae.dtype)
    latents = vae.encode(video).latent_dist.mode().float()
    mean, std = latent_statistics(vae, latents)
    return (latents - mean) / std


def latent_statistics(vae, like: Tensor) -> tuple[Tensor, Tensor]:
    """The VAE's latents_mean and latents_std as (1, C, 1, 1, 1)."""
    return tuple(
        torch.tensor(v, device=like.device).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )


@torch.no_grad()
def encode_text(pipeline, captions: list[str], text_length: int, device: torch.device) -> Tensor:
    """Text embeddings (B, text_length, D) in fp32, as the pipeline makes them for a prompt."""
    embeds, _ = pipeline.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=text_length, device=device
    )
    return embeds.float()


class Latents:
    """Cached split: `batch(indices)` reads latents (B, C, T', h, w) and text embeddings (B, L, D) from its shards.

    Raises:
        UserError: when the cache is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = read_json(self.folder / "index.json")
        self.clips, self.shard_clips = index["clips"], index["shard_clips"]
        if not self.clips:
            raise UserError(f"{self.folder}: holds no clips; give the data section more of them")
        self.empty_text = self._tensor("empty", "text")

    def __len__(self) -> int:
        return self.clips

    def _tensor(self, shard: str, name: str) -> Tensor:
        with safe_open(self.folder / f"{shard}.safetensors", framework="pt") as file:
            return file.get_tensor(name)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Latents and text embeddings of these clips."""
        rows: list[tuple[Tensor, Tensor]] = []
        for index in indices:
            shard, place = divmod(index, self.shard_clips)
            with safe_open(self.folder / f"{shard:05d}.safetensors", framework="pt") as file:
                rows.append((file.get_slice("latents")[place : place + 1], file.get_slice("text")[place : place + 1]))
        return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
