"""Latents and text embeddings, encoded once into safetensors shards with an index, and read ahead of the training step.

A text embedding is stored without its padding, which is zeros: a caption of 60 tokens in place of 512. Shards are independent, so
an interrupted run keeps the finished ones, and a clip is read by its place without touching the others.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sla2.errors import UserError
from sla2.files import atomic_path, read_json, write_json
from sla2.progress import bar
from sla2.team import Team

SHARD_CLIPS = 64


def encode_texts(pipeline, captions: list[str], folder: Path, text_length: int, team: Team) -> None:
    """Embed the captions of a split, shard by shard, and the empty caption; finished shards of an earlier run are kept.

    Args:
        pipeline: with tokenizer and text encoder.
        folder: gets `text-00000.safetensors`, ... and `empty.safetensors`.
        text_length: tokens that captions are padded or cut to.
        team: its processes share the shards.
    """
    shards = _shards("text-", len(captions), folder, team)
    for path, part in bar(shards, f"encode {folder.name} captions", shown=team.first):
        if not path.is_file():
            embeds = encode_text(pipeline, [captions[index] for index in part], text_length, team.device)
            _save(path, packed(embeds.cpu()))
    if team.first and not (folder / "empty.safetensors").is_file():
        _save(folder / "empty.safetensors", packed(encode_text(pipeline, [""], text_length, team.device).cpu()))


def encode_clips(vae, clips, folder: Path, text_length: int, team: Team, batch: int = 8) -> None:
    """Encode the frames of a split, shard by shard, and write its index; finished shards of an earlier run are kept.

    Returns when every process of the team has encoded its own, so that what is in the index is there.

    Args:
        clips: `sla2.data.Clips`; the next frames are decoded while the VAE works.
        folder: gets `00000.safetensors`, ... and `index.json`; `encode_texts` comes first.
        team: its processes share the shards.
        batch: clips that the VAE takes at once.
    """
    shards = _shards("", len(clips), folder, team)
    jobs = [
        (path, part[at : at + batch])
        for path, part in shards
        if not path.is_file()
        for at in range(0, len(part), batch)
    ]
    left = {path: sum(job[0] == path for job in jobs) for path, _ in shards}
    frames = Ahead(lambda step: clips.batch(jobs[step][1]))
    latents: list[Tensor] = []
    for step in bar(len(jobs), f"encode {folder.name} clips", shown=team.first):
        path, _ = jobs[step]
        latents.append(encode_frames(vae, frames(step, last=step + 1 == len(jobs)).to(team.device)).cpu())
        left[path] -= 1
        if not left[path]:
            _save(path, {"latents": torch.cat(latents)})
            latents = []
    team.wait()
    if team.first:
        write_json(folder / "index.json", {"clips": len(clips), "shard_clips": SHARD_CLIPS, "text_length": text_length})
    team.wait()


def _shards(prefix: str, count: int, folder: Path, team: Team) -> list[tuple[Path, list[int]]]:
    """Files and the indices of their clips, of the shards that this process makes."""
    parts = [list(range(start, min(start + SHARD_CLIPS, count))) for start in range(0, count, SHARD_CLIPS)]
    shards = [(folder / f"{prefix}{number:05d}.safetensors", part) for number, part in enumerate(parts)]
    return shards[team.rank :: team.size]


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def packed(embeds: Tensor) -> dict[str, Tensor]:
    """Embeddings (B, L, D) without the zero rows that end each, as `text` (sum of lengths, D) and `ends` (B,)."""
    lengths = [int(used.nonzero().max()) + 1 if used.any() else 0 for used in embeds.ne(0).any(-1)]
    rows = [embed[:length] for embed, length in zip(embeds, lengths, strict=True)]
    return {"text": torch.cat(rows), "ends": torch.tensor(lengths).cumsum(0)}


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
    """Text embeddings (B, text_length, D) in the text encoder's dtype, as the pipeline makes them for a prompt."""
    embeds, _ = pipeline.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=text_length, device=device
    )
    return embeds


class Latents:
    """Cached split: `batch(indices)` reads latents (B, C, T', h, w) and text embeddings (B, L, D), both fp32, from its shards.

    Raises:
        UserError: when the cache is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = read_json(self.folder / "index.json")
        self.clips, self.shard_clips, self.text_length = index["clips"], index["shard_clips"], index["text_length"]
        if not self.clips:
            raise UserError(f"{self.folder}: holds no clips; give the data section more of them")
        self.empty_text = self._text("empty", 0)[None]

    def __len__(self) -> int:
        return self.clips

    def _text(self, shard: str, place: int) -> Tensor:
        """Padded embedding (L, D)."""
        with safe_open(self.folder / f"{shard}.safetensors", framework="pt") as file:
            ends = [0, *file.get_tensor("ends").tolist()]
            text = file.get_slice("text")[ends[place] : ends[place + 1]].float()
        return torch.nn.functional.pad(text, (0, 0, 0, self.text_length - len(text)))

    def batch(self, indices: list[int], frames: int | None = None) -> tuple[Tensor, Tensor]:
        """Latents and text embeddings of these clips, of their first latent frames only where a number of them is given."""
        latents, texts = [], []
        for index in indices:
            shard, place = divmod(index, self.shard_clips)
            with safe_open(self.folder / f"{shard:05d}.safetensors", framework="pt") as file:
                latents.append(file.get_slice("latents")[place, :, :frames])
            texts.append(self._text(f"text-{shard:05d}", place))
        return torch.stack(latents), torch.stack(texts)


class Images:
    """First frames of a split's clips, which the VAE codes as images, held on a device: `batch` and `empty_text` as of `Latents`."""

    def __init__(self, data: Latents, device: torch.device) -> None:
        self.latents, self.texts = (x.to(device) for x in data.batch(list(range(len(data))), frames=1))
        self.empty_text = data.empty_text

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Latents (B, C, 1, h, w) and text embeddings (B, L, D) of these clips, on the device."""
        chosen = sent(torch.tensor(indices), self.latents.device)
        return self.latents[chosen], self.texts[chosen]


class Ahead:
    """Results of `read(step)`, the next one formed by a thread while this one is in use.

    Args:
        read: of a step's number; it runs in the thread.
    """

    def __init__(self, read: Callable[[int], object]) -> None:
        self.read, self.waited_s = read, 0.0
        self.thread = ThreadPoolExecutor(1)
        self.coming: dict[int, Future] = {}

    def __call__(self, step: int, last: bool = False):
        """Result of a step; without `last`, the step after it is begun."""
        began = time.perf_counter()
        future = self.coming.pop(step, None) or self.thread.submit(self.read, step)
        if not last:
            self.coming[step + 1] = self.thread.submit(self.read, step + 1)
        result = future.result()
        self.waited_s += time.perf_counter() - began
        return result


class Stream:
    """Batches of a training run on its device, read ahead by a thread, from pinned memory on a GPU.

    Args:
        data: the split.
        order: indices of the batch of a step.
        steps: of the run; nothing is read beyond them.
    """

    def __init__(self, data: Latents, order: Callable[[int], list[int]], steps: int, device: torch.device) -> None:
        self.device, self.steps = device, steps
        pin = (lambda tensor: tensor.pin_memory()) if device.type == "cuda" else (lambda tensor: tensor)
        self.ahead = Ahead(lambda step: [pin(tensor) for tensor in data.batch(order(step))])

    def __call__(self, step: int) -> list[Tensor]:
        """Latents (B, C, T', h, w) and text embeddings (B, L, D) of a step."""
        return [x.to(self.device, non_blocking=True) for x in self.ahead(step, last=step + 1 >= self.steps)]

    def waited_s(self) -> float:
        """Seconds that callers have waited for data so far."""
        return self.ahead.waited_s


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on the device, without waiting for what a GPU still computes."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
