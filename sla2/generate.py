"""Step generate: videos of the prompts by `WanPipeline` with the variant installed.

Every variant gets the same prompts, seeds and initial noise: the noise of a video depends on its prompt's place and its seed
only, and is drawn on the CPU. The first job embeds the prompts for all, so that UMT5-XXL is loaded once in a study and not beside
the transformer. Videos are written one by one, so a stopped run keeps what is finished.

    python -m sla2.generate --settings JSON --base .../base_model.json [--trained .../stage2/VARIANT/seed0] --prompts TSV --output DIR
"""

import argparse
import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sla2.adapter import load_variant
from sla2.attention import AttentionSettings
from sla2.device import claim_device
from sla2.errors import run_main
from sla2.files import atomic_path, read_json, settings_hash, sha256_file, sha256_folder, write_atomic, write_json
from sla2.flow import generator
from sla2.latents import encode_text
from sla2.progress import bar
from sla2.prompts import Prompt, read_prompts
from sla2.record import write_provenance
from sla2.training import each
from sla2.variant import Variant
from sla2.video import write_lossless, write_mp4
from sla2.wan import BaseModel, compile_blocks, load_pipeline, load_text_encoder


def initial_noise(pipeline, base: BaseModel, place: int, seed: int) -> Tensor:
    """Noise (1, C, T', h, w) in fp32 of the prompt at that place of the sheet and that sampling seed."""
    temporal, spatial = pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial
    frames = (base.frames - 1) // temporal + 1
    channels = pipeline.transformer.config.in_channels
    shape = (1, channels, frames, base.height // spatial, base.width // spatial)
    return torch.randn(shape, generator=generator(seed, 7, place))


def embed(base: BaseModel, texts: list[str], device: torch.device) -> dict[str, Tensor]:
    """Embedding (1, L, D) of each text, on the CPU; kept beside the latents, so that later jobs do without the text encoder."""
    key = settings_hash({"texts": texts, "base": base.weights_sha256, "device": device.type})
    path = Path(base.latents) / f"prompts-{key}.safetensors"
    if not path.is_file():
        pipeline = load_text_encoder(base.pipeline, base.revision, device)
        rows = [encode_text(pipeline, [text], base.text_length, device).cpu() for text in texts]
        del pipeline
        if device.type == "cuda":
            torch.cuda.empty_cache()
        with atomic_path(path) as temporary:
            save_file({"text": torch.cat(rows)}, temporary)
    return dict(zip(texts, load_file(path)["text"].split(1), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="config section generate, variant, attention, video, as JSON"
    )
    parser.add_argument("--base", type=Path, required=True, help="base_model.json")
    parser.add_argument(
        "--trained", type=Path, help="folder of a stage-2 run, or of a stage-1 run for a row without fine-tuning"
    )
    parser.add_argument("--prompts", type=Path, required=True, help="tab-separated prompts")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    settings, base, variant = args.settings, BaseModel.read(args.base), Variant.from_row(args.settings["variant"])
    prompts = read_prompts(args.prompts)
    device = claim_device(settings)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    trained = sha256_folder(args.trained, "*.safetensors") if args.trained else base.weights_sha256
    identity = settings_hash({"settings": settings, "weights": trained, "prompts": sha256_file(args.prompts)})
    jobs = [(place, prompt, seed) for seed in range(settings["seeds"]) for place, prompt in enumerate(prompts)]
    done = {job[1].prompt_id + f"-s{job[2]}": finished(args.output, job, identity) for job in jobs}
    missing = [job for job in jobs if not done[f"{job[1].prompt_id}-s{job[2]}"]]
    if missing:
        texts = sorted({prompt.text for prompt in prompts} | {settings["negative_prompt"]})
        embeds = embed(base, texts, device)
        transformer = load_variant(base, variant, AttentionSettings(**settings["attention"]), args.trained, dtype)
        if settings["compile"]:
            compile_blocks(transformer)
        parts = {"transformer": transformer, "text_encoder": None, "tokenizer": None}
        pipeline = load_pipeline(base.pipeline, base.revision, dtype, **parts).to(device)
        pipeline.set_progress_bar_config(disable=True)
        name = f"generate {variant.variant} seed {settings['train_seed']}"
        for batch in bar(list(each(missing, settings["batch"])), name):
            for entry in sample(pipeline, base, batch, embeds, settings, device, args.output):
                write_json(args.output / "finished" / f"{entry['id']}.json", {**entry, "identity": identity})
                done[entry["id"]] = entry
    write_provenance(args.output / "manifest.jsonl", settings, weights_sha256=trained)
    lines = [json.dumps({k: v for k, v in done[key].items() if k != "identity"}, sort_keys=True) for key in done]
    write_atomic(args.output / "manifest.jsonl", "\n".join(lines) + "\n")


def finished(output: Path, job: tuple[int, Prompt, int], identity: str) -> dict | None:
    """What an earlier run wrote of this video with the same settings and weights, if its lossless file is whole."""
    _, prompt, seed = job
    note = output / "finished" / f"{prompt.prompt_id}-s{seed}.json"
    if not note.is_file():
        return None
    entry = read_json(note)
    lossless = output / entry["file"]
    if entry["identity"] != identity or not lossless.is_file() or sha256_file(lossless) != entry["sha256"]:
        return None
    return entry


@torch.no_grad()
def sample(
    pipeline,
    base: BaseModel,
    batch: list,
    embeds: dict[str, Tensor],
    settings: dict,
    device: torch.device,
    output: Path,
) -> list[dict]:
    """Sample and write one batch of (place, prompt, seed), with embeddings by text; returns their manifest entries."""
    noise = torch.cat([initial_noise(pipeline, base, place, seed) for place, _, seed in batch])
    began = time.perf_counter()
    frames = pipeline(
        prompt_embeds=torch.cat([embeds[prompt.text] for _, prompt, _ in batch]).to(device),
        negative_prompt_embeds=embeds[settings["negative_prompt"]].expand(len(batch), -1, -1).to(device),
        height=base.height,
        width=base.width,
        num_frames=base.frames,
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"],
        latents=noise.to(device),
        max_sequence_length=base.text_length,
        output_type="pt",
    ).frames  # (B, T, 3, H, W) in [0, 1]
    seconds = (time.perf_counter() - began) / len(batch)

    def write(job: tuple[int, Prompt, int], clip: Tensor, start: Tensor) -> dict:
        """Both files of a video, and what the manifest says of it."""
        _, prompt, seed = job
        pixels = (clip.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()  # (T, H, W, 3)
        name = f"{prompt.prompt_id}-s{seed}"
        write_mp4(output / "videos" / f"{name}.mp4", pixels, base.fps)
        write_lossless(output / "lossless" / f"{name}.mkv", pixels, base.fps)
        return {
            "id": name,
            "prompt_id": prompt.prompt_id,
            "text": prompt.text,
            "seed": seed,
            "noise_sha256": hashlib.sha256(start.numpy().tobytes()).hexdigest(),
            "frames": pixels.shape[0],
            "height": pixels.shape[1],
            "width": pixels.shape[2],
            "fps": base.fps,
            "file": f"lossless/{name}.mkv",
            "sha256": sha256_file(output / "lossless" / f"{name}.mkv"),
            "seconds": round(seconds, 3),
        }

    with ThreadPoolExecutor(settings["threads"]) as pool:  # encoders let go of Python's lock
        return list(pool.map(write, batch, frames, noise))


if __name__ == "__main__":
    run_main(main)
