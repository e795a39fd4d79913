"""Step base_model: a given diffusers Wan folder or hub id, checked and hashed, or a small Wan trained from scratch.

Either way the result is loaded by `WanPipeline.from_pretrained`, and latents and text embeddings are encoded once. Processes that
`sla2 --gpus N base_model` starts train the small Wan together, and share what is encoded.

    python -m sla2.base_model --settings JSON --data results/S/data --output results/S/base_model
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from sla2.errors import UserError, run_main
from sla2.files import read_json, settings_hash, sha256_file, sha256_folder, write_folder, write_json
from sla2.progress import say
from sla2.record import write_provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="config section base_model, and video, as JSON"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data step")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    settings, output = args.settings, args.output

    import torch

    from sla2.data import Clips
    from sla2.latents import Latents, encode_clips, encode_texts
    from sla2.small_wan import build_pipeline, train_transformer, train_vae
    from sla2.team import join
    from sla2.training import Log
    from sla2.wan import load_pipeline, load_text_encoder, load_transformer_config, load_vae

    team = join(settings | {"parallel": "ddp"})
    splits = {name: Clips(args.data / f"{name}.jsonl", settings["video"], team.device) for name in ("train", "heldout")}
    identity = identity_of(settings, args.data)
    work, log = output / f".work-{identity}", Log()
    latents = output / f"latents-{identity}"

    def encode(text_pipeline: Callable, vae: Callable) -> dict[str, Latents]:
        """Captions first: UMT5-XXL is eight times the size of the VAE and is let go before frames are encoded."""
        used = {name: clips for name, clips in splits.items() if len(clips)}
        pipeline = text_pipeline()
        for name, clips in used.items():
            encode_texts(pipeline, clips.captions, latents / name, settings["text_length"], team)
        del pipeline
        if team.device.type == "cuda":
            torch.cuda.empty_cache()
        encoder = vae().to(team.device)
        for name, clips in used.items():
            encode_clips(encoder, clips, latents / name, settings["text_length"], team, settings["encode_batch"])
        return {name: Latents(latents / name) for name in used}

    place, revision = settings["pretrained"], settings["revision"]
    note = output / "trained.json"  # of the pipeline beside it; its provenance goes where the weights go
    if place is None:
        place = str(output / "pipeline")
        trained = read_json(note) if note.is_file() else {}
        if trained.get("identity") == identity:
            # Weights travel to another machine more easily than latents do, which are a hundred times their size.
            if team.first:
                say("base_model: already trained; latents are encoded where they are missing")
            log.restore(trained["log"])
            pipeline = load_pipeline(place, None)
            encode(lambda: pipeline.to(team.device), lambda: pipeline.vae.eval())
        else:
            pipeline = build_pipeline(settings, splits["train"].captions)
            train_vae(pipeline.vae, splits["train"], splits["heldout"], settings, team, work, log)
            data = encode(lambda: pipeline.to(team.device), lambda: pipeline.vae)
            train_transformer(pipeline, data["train"], data["heldout"], settings, team, work, log)
            if team.first:
                write_folder(place, lambda folder: pipeline.to("cpu").save_pretrained(folder))
                write_json(note, {"identity": identity, "log": log.state()})
                write_provenance(note, settings, processes=team.size)
    else:
        encode(lambda: load_text_encoder(place, revision, team.device), lambda: load_vae(place, revision).eval())
    if team.first:
        config = load_transformer_config(place, revision)
        write_json(output / "base_model.json", describe(settings, place, revision, config, latents.name))
        log.write(output / "log.csv")
        write_provenance(output / "base_model.json", settings, processes=team.size)
        shutil.rmtree(work, ignore_errors=True)
        for stale in output.glob("latents-*"):
            if stale != latents:
                shutil.rmtree(stale, ignore_errors=True)
        for stale in latents.glob("prompts-*"):  # of an earlier text encoder, by `sla2.generate`
            stale.unlink()
        say(f"base_model: {place}")
    team.wait()
    team.leave()


def identity_of(settings: dict, data: Path) -> str:
    """Of what is trained with these settings on this folder of the data step; kept in `trained.json` beside the weights."""
    return settings_hash({"settings": settings, "data": sha256_folder(data, "*.jsonl")})


def describe(settings: dict, place: str, revision: str | None, config: dict, latents: str) -> dict:
    """Content of `base_model.json`; keys as `sla2.wan.BaseModel`."""
    from sla2.adapter import fingerprint_files
    from sla2.wan import vae_factors

    weights = weights_folder(place, revision)
    video = settings["video"]
    temporal, spatial = vae_factors(place, revision)
    patch = config["patch_size"]
    grid = [
        ((video["frames"] - 1) // temporal + 1) // patch[0],
        video["height"] // spatial // patch[1],
        video["width"] // spatial // patch[2],
    ]
    local = Path(place)
    return {
        "pipeline": local.name if settings["pretrained"] is None else place,
        "revision": revision,
        "weights_sha256": weights_hash(weights),
        "fingerprint": fingerprint_files(weights),
        "parameters": count_parameters(config),
        "tokens": grid[0] * grid[1] * grid[2],
        "grid": grid,
        "layers": config["num_layers"],
        "heads": config["num_attention_heads"],
        "head_dim": config["attention_head_dim"],
        **{key: video[key] for key in ("frames", "height", "width", "fps")},
        "text_length": settings["text_length"],
        "flow_shift": settings["flow_shift"],
        "latents": latents,
    }


def count_parameters(config: dict) -> int:
    """Parameters of the transformer, counted on the meta device."""
    import torch
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    return sum(p.numel() for p in model.parameters())


def weights_folder(place: str, revision: str | None) -> Path:
    """Folder of the transformer's weight files, in the pipeline's or in the hub's local cache.

    Raises:
        UserError: when it holds none.
    """
    folder = Path(place) / "transformer"
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(place, revision=revision, allow_patterns=["transformer/*"])) / "transformer"
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"base_model.pretrained: {folder} holds no .safetensors file; give a diffusers Wan folder")
    return folder


def weights_hash(folder: Path) -> str:
    """Hash of the weight files in a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return sha256_file(files[0]) if len(files) == 1 else sha256_folder(folder, "*.safetensors")


if __name__ == "__main__":
    run_main(main)
