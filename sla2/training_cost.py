"""Time and peak memory of a training step, or of one forward, of Wan2.1 at a real size with random weights.

A training step is the one of stage 2: forward, backward with the activations of each block formed again, clipping, AdamW, the
average, bf16 autocast over fp32 weights. Dense rows keep diffusers' own processor under the named SDPA backend. Sparse rows run
stage 2's row of the sheet; their cross-attention takes FlashAttention2, so that only self-attention differs.

    python -m sla2.training_cost --pass train --size 1.3b --config config/wan2.1-1.3b-480p.yaml --output costs.csv
"""

import argparse
import csv
import gc
import io
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._functorch import config as autograd_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from sla2.attention import AttentionSettings
from sla2.config import load_study
from sla2.device import claim_device
from sla2.errors import UserError, run_main
from sla2.files import write_atomic
from sla2.flow import flow_losses, generator, predict
from sla2.progress import say
from sla2.random_wan import SIZES, WAN_TRANSFORMER, random_transformer
from sla2.record import write_provenance
from sla2.stage2 import choose_optimizer
from sla2.study import Study
from sla2.training import GIB, Average, update
from sla2.variant import FULL
from sla2.wan import compile_blocks, install

COLUMNS = ("pass", "size", "tokens", "row", "batch", "compiled", "seconds", "fastest", "slowest", "peak_gib", "reason")
DENSE = {"dense-fa2": SDPBackend.FLASH_ATTENTION, "dense-cudnn": SDPBackend.CUDNN_ATTENTION}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pass", dest="kind", choices=("train", "forward"), required=True)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--config", type=Path, required=True, help="study: its video, attention, stage2 and variants")
    parser.add_argument("--rows", nargs="+", default=["sla2-97"], help="rows of the sheet beside the dense ones")
    parser.add_argument("--warmup", type=int, default=2, help="calls before timing")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, of dense rows too")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls")
    parser.add_argument("--output", type=Path, required=True, help="CSV file, written row by row")
    args = parser.parse_args()
    study = load_study(args.config)
    absent = [name for name in args.rows if name not in study.variants]
    if absent:
        raise UserError(f"--rows: {', '.join(absent)} not of this study; choose some of {', '.join(study.variants)}")
    device = claim_device(study.section("stage2"), alone=True)
    write_provenance(args.output, study.section("stage2"), size=args.size)
    rows = []
    for name in (*DENSE, *args.rows):
        rows.append(measure(name, study, args, device))
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(args.output, text.getvalue())
        say(
            f"{args.kind} {args.size} {name}: {rows[-1]['seconds'] or rows[-1]['reason']} s, {rows[-1]['peak_gib']} GiB"
        )


def measure(name: str, study: Study, args: argparse.Namespace, device: torch.device) -> dict:
    """One row of the CSV; what cannot be run has a reason in place of numbers."""
    row = {"pass": args.kind, "size": args.size, "tokens": study.geometry.tokens, "row": name, "batch": 1}
    row["compiled"] = "yes" if args.compile else "no"
    row |= dict.fromkeys(("seconds", "fastest", "slowest", "peak_gib", "reason"), "")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with backend(name, device):
            calls = training_step if args.kind == "train" else forward
            times = [seconds(call, device) for call in calls(name, study, args, device)][args.warmup :]
    except torch.OutOfMemoryError:
        return row | {"reason": "out of GPU memory"}
    except (RuntimeError, UserError) as error:  # a backend that a build of torch or a GPU does not have
        return row | {"reason": str(error).splitlines()[0]}
    peak = round(torch.cuda.max_memory_allocated(device) / GIB, 2) if device.type == "cuda" else ""
    times = [round(t, 4) for t in (statistics.median(times), min(times), max(times))]
    return row | dict(zip(("seconds", "fastest", "slowest"), times, strict=True)) | {"peak_gib": peak}


@contextmanager
def backend(name: str, device: torch.device) -> Iterator[None]:
    """The SDPA backend of a dense row, FlashAttention2 for the others' cross-attention; torch's own choice on a CPU."""
    on_gpu = device.type == "cuda"
    with sdpa_kernel(DENSE.get(name, SDPBackend.FLASH_ATTENTION)) if on_gpu else nullcontext():
        yield


def seconds(call: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def model(name: str, study: Study, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> nn.Module:
    transformer = random_transformer(args.size, device, dtype)
    row = study.variants[FULL if name in DENSE else name]
    install(transformer, row, AttentionSettings(**study.config["attention"]), study.geometry.tokens)
    if args.compile:
        torch.compiler.reset()
        # That cache knows the call of attention, not its backend: the second dense row would get the first one's graph.
        autograd_config.enable_autograd_cache = False
        compile_blocks(transformer)
    return transformer.to(device)


def inputs(study: Study, size: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Latents (1, C, T', h, w) and a text embedding (1, L, D), random."""
    video, space = study.config["data"]["video"], study.geometry
    sizes = WAN_TRANSFORMER | SIZES[size]["transformer"]
    frames = (video["frames"] - 1) // space.temporal + 1
    shape = (1, sizes["in_channels"], frames, video["height"] // space.spatial, video["width"] // space.spatial)
    draw = generator(study.config["seed"], 8)
    text = torch.randn(1, study.config["base_model"]["text_length"], sizes["text_dim"], generator=draw)
    return torch.randn(shape, generator=draw).to(device), text.to(device)


def training_step(name: str, study: Study, args: argparse.Namespace, device: torch.device) -> Iterator[Callable]:
    """Calls that are a step of stage 2 each."""
    settings = study.section("stage2")
    transformer = model(name, study, args, device, torch.float32).train()
    transformer.enable_gradient_checkpointing()
    optimizer = choose_optimizer(transformer, settings)
    average = Average(transformer, settings["ema"])
    latents, text = inputs(study, args.size, device)
    shift = study.config["base_model"]["flow_shift"]

    def step(number: int) -> None:
        update(flow_losses(transformer, latents, text, text, shift, generator(number)), [optimizer], settings["clip"])
        average.update(number + 1)

    for number in range(args.warmup + args.repeats):
        yield lambda number=number: step(number)


def forward(name: str, study: Study, args: argparse.Namespace, device: torch.device) -> Iterator[Callable]:
    """Calls that are one forward at inference each."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = model(name, study, args, device, dtype).eval()
    latents, text = inputs(study, args.size, device)
    sigma = torch.full((1,), 0.7, device=device)

    @torch.inference_mode()
    def call() -> None:
        predict(transformer, latents, sigma, text)

    for _ in range(args.warmup + args.repeats):
        yield call


if __name__ == "__main__":
    run_main(main)
