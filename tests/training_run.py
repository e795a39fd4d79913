"""A base model with cached latents, made in a second, and steps that train on it in one process or several."""

import importlib
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from sla2.adapter import fingerprint_files
from sla2.latents import packed
from sla2.random_wan import random_transformer

GRID = (2, 4, 4)
ROW = {
    "variant": "sla2-90", "attention": "sla2", "router": "learned", "mixing": "alpha", "quantization": "none",
    "sparsity": 0.5, "finetune": True,
}  # fmt: skip
SETTINGS = {
    "study": "test", "seed": 0, "train_seed": 0, "device": "cpu", "threads": 1, "variant": ROW,
    "attention": {"block_q": 8, "block_k": 4}, "steps": 4, "batch": 4, "micro_batch": 1, "lr": 1e-3, "lr_mixing": 1e-2,
    "betas": [0.9, 0.999], "warmup": 1, "weight_decay": 0.01, "clip": 1.0, "ema": 0.9, "timesteps": "uniform",
    "caption_dropout": 0.1, "loss": "diffusion", "trainable": "all", "alpha": None, "gradient_checkpointing": True, "select": "last",
    "parallel": "ddp", "compile": False, "tensorboard": False, "validate_every": 2, "checkpoint_every": 2,
}  # fmt: skip


def make_base(folder: Path) -> Path:
    """`base_model.json` of random weights, with eight clips to train on and four held out."""
    torch.manual_seed(0)
    random_transformer("tiny", torch.device("cpu")).save_pretrained(folder / "pipeline/transformer")
    draw = torch.Generator().manual_seed(1)
    for split, count in (("train", 8), ("heldout", 4)):
        latents = torch.randn(count, 16, GRID[0], 2 * GRID[1], 2 * GRID[2], generator=draw)
        text = torch.randn(count, 8, 16, generator=draw)
        text[:, 5:] = 0
        (folder / "latents" / split).mkdir(parents=True)
        for name, tensors in (
            ("00000", {"latents": latents}),
            ("text-00000", packed(text)),
            ("empty", packed(text[:1])),
        ):
            save_file(tensors, folder / "latents" / split / f"{name}.safetensors")
        index = {"clips": count, "shard_clips": 64, "text_length": 8}
        (folder / "latents" / split / "index.json").write_text(json.dumps(index))
    base = {
        "pipeline": "pipeline", "revision": None, "weights_sha256": "a", "parameters": 1, "tokens": 32, "grid": GRID,
        "layers": 2, "heads": 2, "head_dim": 32, "frames": 5, "height": 64, "width": 64, "fps": 8, "text_length": 8,
        "flow_shift": 3.0, "latents": "latents", "fingerprint": fingerprint_files(folder / "pipeline/transformer"),
    }  # fmt: skip
    (folder / "base_model.json").write_text(json.dumps(base))
    return folder / "base_model.json"


def fine_tune(base: Path, output: Path, processes: int = 1, **changes) -> None:
    """Stage 2 with some settings changed, in processes of their own where there are several."""
    arguments = ["--settings", json.dumps(SETTINGS | changes), "--base", str(base), "--output", str(output)]
    run("sla2.stage2", arguments, processes)


def run(module: str, arguments: list[str], processes: int = 1) -> None:
    """Run a step, in processes of their own where there are several."""
    if processes == 1:
        _run(module, arguments, {})
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    # Processes fork from one that has the libraries and, unlike this one, no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_run", "diffusers.models.transformers.transformer_wan"])
    team = [
        context.Process(target=_run, args=(module, arguments, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        for rank in range(processes)
    ]
    for member in team:
        member.start()
    for member in team:
        member.join(timeout=120)  # one that waits for a neighbour which has failed
        member.kill()
    assert [member.exitcode for member in team] == [0] * processes


def _run(module: str, arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    former, sys.argv = sys.argv, [module, *arguments]
    try:
        importlib.import_module(module).main()
    finally:
        sys.argv = former
