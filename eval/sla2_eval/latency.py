"""Step latency: kernel, attention operation, denoising step and whole video, for every row of the sheet, in one process.

    python -m sla2_eval.latency --settings JSON --base results/S/base_model/base_model.json --variants config/variants.tsv \
        --output results/S/latency/latency.csv

Four times under four names. `kernel`: the sparse branch alone, its blocks given. `attention_op`: all of smoothing, routing,
quantisation, both branches and mixing. `denoising_step`: one forward of the transformer. `end_to_end`: a video, put together
from steps, text encoder, VAE and file, which are timed apart; nothing is offloaded. Each stands against the fastest dense kernel
of this device and against FlashAttention2, timed in the same rounds (the kernel's are those of the operation): quote the ratios, not
the milliseconds.
Weights do not matter to time, so the modules are fresh; rows that differ in training only share their timing.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sla2.attention import AttentionSettings, SparseLinearAttention, build
from sla2.device import claim_device
from sla2.errors import run_main
from sla2.latents import Latents
from sla2.progress import say
from sla2.record import Record, write_provenance, write_records
from sla2.variant import Variant, read_variants
from sla2_eval.flops import Flops, dense_flops, layer_flops, realised_sparsity
from sla2_eval.timing import GpuWatch, interleaved_ms, percentiles, refuse_shared_gpu
from sla2_kernels import resolve_backend, sparse_attention

DENSE, FA2 = "dense", "dense fa2"  # keys of times: the fastest dense kernel of the device, and FlashAttention2
KERNELS = {
    FA2: (SDPBackend.FLASH_ATTENTION, "_native_flash"),
    "dense cudnn": (SDPBackend.CUDNN_ATTENTION, "_native_cudnn"),
}
PARTS = ("text_encoding", "vae_decoding", "writing")
PROMPT = "a red circle moves to the right"  # any text: the encoder reads its padding too
ANOTHER_DEVICE = "FlashAttention2 runs on a GPU; on this device dense attention is torch's own"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings",
        type=json.loads,
        required=True,
        help="config section latency, attention, generate, and variants: the rows to time",
    )
    parser.add_argument("--base", type=Path, required=True, help="base_model.json")
    parser.add_argument("--variants", type=Path, required=True, help="the variants sheet")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    # Imported here: diffusers, which it needs, costs eight seconds of a core.
    from sla2.wan import BaseModel, load_transformer

    chosen = {row["variant"] for row in args.settings["variants"]}
    sheet = {name: row for name, row in read_variants(args.variants).items() if name in chosen}
    base = BaseModel.read(args.base)
    device = claim_device(args.settings, alone=True)
    refuse_shared_gpu(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attention = AttentionSettings(**args.settings["attention"])
    shape = (args.settings["batch"], base.heads, base.tokens, base.head_dim)
    draw = torch.Generator().manual_seed(args.settings["seed"])
    q, k, v = (torch.randn(shape, generator=draw).to(device, dtype) for _ in range(3))
    modules = attention_modules(sheet, base, attention, device)
    say(f"latency: {len(modules)} attentions for {len(sheet)} rows, {base.tokens} tokens, {device}")
    times: dict[str, dict[str, list[float]]] = {}
    with torch.inference_mode(), GpuWatch(device) as watch:
        times["attention_op"] = time_operations(modules, q, k, v, args.settings, device)
        masks = {key: m.route(q, k) for key, m in modules.items() if isinstance(m, SparseLinearAttention)}
        times["kernel"] = time_kernels(modules, masks, q, k, v, attention, args.settings, device)
        times["kernel"] |= {key: values for key, values in times["attention_op"].items() if key.startswith(DENSE)}
        transformer = load_transformer(base, dtype=dtype).to(device).eval()
        times["denoising_step"], peaks = time_steps(modules, transformer, base, args.settings, device)
        del transformer
        around = time_around(base, dtype, device)
    conditions = f"{device_name(device)} {str(dtype).removeprefix('torch.')} N={base.tokens} batch={shape[0]}"
    if device.type == "cpu":
        conditions += f" threads={torch.get_num_threads()}"
    records = []
    for row in sheet.values():
        key = timing_key(row)
        backend = "sdpa" if row.dense else resolve_backend(attention.backend, q)
        rows = {
            **(timings("kernel", "dense_attention", times["kernel"], key) if not row.dense else no_kernel()),
            **timings("attention_op", "dense_attention", times["attention_op"], key),
            **timings("denoising_step", "dense_denoising_step", times["denoising_step"], key),
            **end_to_end(times["denoising_step"], key, around, args.settings),
            "memory.denoising_step_peak": (
                peaks.get(key),
                "MiB",
                False,
                "measured on a GPU only: a CPU's allocator keeps no peak",
            ),
            **work(row, masks[key][0] if key in masks else None, base, attention),
        }
        for metric, (value, unit, higher_is_better, *reason) in rows.items():
            records.append(
                Record(
                    study=args.settings["study"],
                    variant=row.variant,
                    metric=metric,
                    value=value,
                    unit=unit,
                    higher_is_better=higher_is_better,
                    backend="formula" if metric.startswith(("flops", "sparsity")) else f"{backend}/{conditions}",
                    reason="" if value is not None else reason[0],
                )
            )
    write_provenance(args.output, args.settings, base_sha256=base.weights_sha256, gpu_while_timing=watch.summary)
    write_records(args.output, records)


def timing_key(row: Variant) -> str:
    """Equal for rows whose forward is the same computation."""
    if row.attention == "full":
        return DENSE
    precision = row.quantization.split("-")[-1]  # post-training and quantisation-aware rows infer alike
    return f"{row.attention} {row.router} {row.mixing} {precision} {row.sparsity:g}"


def attention_modules(sheet: dict[str, Variant], base, attention: AttentionSettings, device) -> dict[str, nn.Module]:
    """One fresh attention per timing key, torch's own dense one left out."""
    rows = {timing_key(row): row for row in sheet.values()}
    return {
        key: build(row, base.heads, base.head_dim, base.tokens, attention).to(device).eval()
        for key, row in rows.items()
        if key != DENSE
    }


def with_fastest(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """The times, the fastest dense kernel's also under `DENSE`."""
    dense = [values for key, values in times.items() if key.startswith(DENSE)]
    return {**times, DENSE: min(dense, key=lambda values: percentiles(values)["p50"])}


def dense_calls(q: Tensor, k: Tensor, v: Tensor, device: torch.device) -> dict[str, Callable[[], object]]:
    """Dense attention by every kernel that is a candidate on this device."""

    def call(kernel: SDPBackend | None) -> Tensor:
        with sdpa_kernel(kernel) if kernel is not None else nullcontext():
            return F.scaled_dot_product_attention(q, k, v)

    if device.type != "cuda":
        return {DENSE: lambda: call(None)}
    return {key: lambda kernel=kernel: call(kernel) for key, (kernel, _) in KERNELS.items()}


def time_operations(
    modules: dict[str, nn.Module], q: Tensor, k: Tensor, v: Tensor, settings: dict, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of one attention layer by timing key."""
    functions = dense_calls(q, k, v, device)
    functions |= {key: lambda module=module: module(q, k, v) for key, module in modules.items()}
    return with_fastest(interleaved_ms(functions, settings["warmup"], settings["repeats"], device))


def time_kernels(
    modules: dict[str, nn.Module],
    masks: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: AttentionSettings,
    settings: dict,
    device: torch.device,
) -> dict[str, list[float]]:
    """Milliseconds of the sparse branch alone by timing key; masks (B, H, T_m, T_n), none of dense attention."""
    blocks = {"block_q": attention.block_q, "block_k": attention.block_k, "backend": attention.backend}
    functions = {
        key: partial(sparse_attention, q, k, v, mask, precision=modules[key].quantizer.precision(False), **blocks)
        for key, mask in masks.items()
    }
    return interleaved_ms(functions, settings["warmup"], settings["repeats"], device)


def time_steps(
    modules: dict[str, nn.Module], transformer: nn.Module, base, settings: dict, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds and peak MiB of one forward of the transformer by timing key; layers share a module, which costs the same."""
    from sla2.flow import predict
    from sla2.wan import AttentionProcessor, self_attentions

    layers = self_attentions(transformer)
    dense = [layer.processor for layer in layers]
    processors = {key: [AttentionProcessor(module)] * len(layers) for key, module in modules.items()}
    latents, text = (
        tensor.to(device).expand(settings["batch"], *tensor.shape[1:])
        for tensor in Latents(Path(base.latents) / "heldout").batch([0])
    )
    sigma = torch.full((settings["batch"],), 0.7, device=device)
    peaks: dict[str, float] = {}

    def prepare(key: str) -> None:
        for layer, processor in zip(layers, processors.get(key, dense), strict=True):
            if key in KERNELS:
                processor._attention_backend = KERNELS[key][1]
            layer.set_processor(processor)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def forward(key: str) -> None:
        predict(transformer, latents, sigma, text)
        if device.type == "cuda":
            peaks[key] = torch.cuda.max_memory_allocated(device) / 2**20

    keys = (*(KERNELS if device.type == "cuda" else (DENSE,)), *modules)
    functions = {key: lambda key=key: forward(key) for key in keys}
    times = with_fastest(interleaved_ms(functions, settings["warmup"], settings["repeats"], device, prepare))
    if device.type == "cuda":
        peaks[DENSE] = min(value for key, value in peaks.items() if key in KERNELS)
    return times, peaks


def time_around(base, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Milliseconds of what a video takes besides its steps, median of three: `PARTS`."""
    from sla2.latents import encode_text
    from sla2.video import write_mp4
    from sla2.wan import load_pipeline

    pipeline = load_pipeline(base.pipeline, base.revision, dtype, transformer=None).to(device)
    latents = Latents(Path(base.latents) / "heldout").batch([0])[0].to(device, pipeline.vae.dtype)
    frames = torch.zeros(base.frames, base.height, base.width, 3, dtype=torch.uint8)
    frames[..., 0] = torch.linspace(0, 255, base.width)
    with tempfile.TemporaryDirectory() as folder:
        calls = {
            "text_encoding": lambda: encode_text(pipeline, [PROMPT], base.text_length, device),
            "vae_decoding": lambda: pipeline.vae.decode(latents, return_dict=False)[0].cpu(),
            "writing": lambda: write_mp4(Path(folder) / "clip.mp4", frames, base.fps),
        }
        return {name: percentiles(times)["p50"] for name, times in interleaved_ms(calls, 1, 3, device).items()}


def end_to_end(
    times_ms: dict[str, list[float]], key: str, around: dict[str, float], settings: dict
) -> dict[str, tuple]:
    """A whole video of the study's sampler: every step, the prompt and with guidance the empty one, VAE and file."""
    forwards = 2 if settings["guidance"] > 1 else 1

    def denoising(key: str) -> float:
        return settings["steps"] * forwards * percentiles(times_ms[key])["p50"] / settings["batch"]

    def whole(key: str) -> float:
        return denoising(key) + forwards * around["text_encoding"] + around["vae_decoding"] + around["writing"]

    rows: dict[str, tuple] = {f"latency.{name}.p50": (around[name], "ms", False) for name in PARTS}
    rows["latency.offload"] = (None, "ms", False, "nothing is offloaded: all weights stay on the device")
    rows["latency.denoising"] = (denoising(key), "ms", False)
    rows["latency.end_to_end"] = (whole(key), "ms", False)
    return rows | ratios("end_to_end", whole(DENSE), whole(FA2) if FA2 in times_ms else None, whole(key))


def no_kernel() -> dict[str, tuple]:
    """Dense attention has no sparse branch to time alone."""
    reason = "dense attention has no sparse branch"
    return {
        **{f"latency.kernel.p{p}": (None, "ms", False, reason) for p in (20, 50, 80)},
        "speedup.kernel": (None, "1", True, reason),
        "speedup_fa2.kernel": (None, "1", True, reason),
    }


def timings(name: str, dense_name: str, times_ms: dict[str, list[float]], key: str) -> dict[str, tuple]:
    """Percentiles of a row and of the fastest dense kernel, and the ratios of medians."""
    own, dense = percentiles(times_ms[key]), percentiles(times_ms[DENSE])
    rows: dict[str, tuple] = {f"latency.{name}.{p}": (value, "ms", False) for p, value in own.items()}
    rows |= {f"latency.{dense_name}.{p}": (value, "ms", False) for p, value in dense.items()}
    fa2 = percentiles(times_ms[FA2])["p50"] if FA2 in times_ms else None
    return rows | ratios(name, dense["p50"], fa2, own["p50"])


def ratios(name: str, dense: float, fa2: float | None, own: float) -> dict[str, tuple]:
    """How many times faster a row is than the fastest dense kernel, and than FlashAttention2 where that runs."""
    return {
        f"speedup.{name}": (dense / own, "1", True),
        f"speedup_fa2.{name}": (fa2 / own if fa2 is not None else None, "1", True, ANOTHER_DEVICE),
    }


def work(row: Variant, mask: Tensor | None, base, attention: AttentionSettings) -> dict[str, tuple]:
    """FLOPs for one video and the sparsity behind them; mask (H, T_m, T_n), None for dense attention."""
    dense = dense_flops(base.tokens, base.head_dim)
    if mask is None:
        layer, sparsity = Flops(sparse=base.heads * dense), 0.0
    else:
        blocks = (attention.block_q, attention.block_k)
        words = {"attention": row.attention, "router": row.router, "mixing": row.mixing}
        layer = layer_flops(mask, base.tokens, base.head_dim, *blocks, **words)
        sparsity = realised_sparsity(mask, base.tokens, *blocks)
    items = {part: getattr(layer, part) for part in ("router", "sparse", "linear", "mixing")}
    dense_forward = base.layers * base.heads * dense
    return {
        "flops.per_head": (layer.total / base.heads, "FLOP", False),
        **{f"flops.per_head.{part}": (value / base.heads, "FLOP", False) for part, value in items.items()},
        "flops.dense_per_head": (dense, "FLOP", False),
        "flops.dense_per_layer": (base.heads * dense, "FLOP", False),
        "flops.per_layer": (layer.total, "FLOP", False),
        **{f"flops.per_layer.{part}": (value, "FLOP", False) for part, value in items.items()},
        "flops.per_forward": (base.layers * layer.total, "FLOP", False),
        **{f"flops.per_forward.{part}": (base.layers * value, "FLOP", False) for part, value in items.items()},
        "flops.dense_per_forward": (dense_forward, "FLOP", False),
        "flops.reduction": (dense_forward / (base.layers * layer.total), "1", True),
        "sparsity.realised": (sparsity, "1", None),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    run_main(main)
