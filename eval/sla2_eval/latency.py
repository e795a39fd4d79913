"""Step latency: time of the attention operation and of a denoising step, for every row of the sheet, in one process.

    python -m sla2_eval.latency --settings JSON --base results/S/base_model/base_model.json --variants config/variants.tsv \
        --output results/S/latency/latency.csv

The attention operation is all of it: smoothing, routing, quantisation, both branches, mixing. A denoising step is one forward
of the transformer. Both stand against dense SDPA, timed in the same rounds: quote the ratios, not the milliseconds.
Weights do not matter to time, so the modules are fresh; rows that differ in training only share their timing.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sla2.attention import AttentionSettings, build
from sla2.device import claim_device
from sla2.errors import run_main
from sla2.latents import Latents
from sla2.progress import say
from sla2.record import Record, write_provenance, write_records
from sla2.variant import Variant, read_variants
from sla2_eval.flops import Flops, dense_flops, layer_flops, realised_sparsity
from sla2_eval.timing import interleaved_ms, percentiles, refuse_shared_gpu
from sla2_kernels import resolve_backend

DENSE = "dense"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings",
        type=json.loads,
        required=True,
        help="config section latency, attention, and variants: the rows to time",
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
    device = claim_device(args.settings)
    refuse_shared_gpu(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attention = AttentionSettings(**args.settings["attention"])
    shape = (args.settings["batch"], base.heads, base.tokens, base.head_dim)
    draw = torch.Generator().manual_seed(args.settings["seed"])
    q, k, v = (torch.randn(shape, generator=draw).to(device, dtype) for _ in range(3))
    modules = attention_modules(sheet, base, attention, device)
    say(f"latency: {len(modules)} attentions for {len(sheet)} rows, {base.tokens} tokens, {device}")
    with torch.inference_mode():
        op_ms = time_operations(modules, q, k, v, args.settings, device)
        transformer = load_transformer(base, dtype=dtype).to(device).eval()
        step_ms = time_steps(modules, transformer, base, args.settings, device)
        masks = {key: module.route(q, k)[0] for key, module in modules.items()}
    conditions = f"{device_name(device)} {str(dtype).removeprefix('torch.')} N={base.tokens} batch={shape[0]}"
    if device.type == "cpu":
        conditions += f" threads={torch.get_num_threads()}"
    records = []
    for row in sheet.values():
        backend = "sdpa" if row.attention == "full" else resolve_backend(attention.backend, q)
        rows = {
            **timings("attention_op", "dense_attention", op_ms, timing_key(row)),
            **timings("denoising_step", "dense_denoising_step", step_ms, timing_key(row)),
            **work(row, masks.get(timing_key(row)), base, attention),
        }
        for metric, (value, unit, higher_is_better) in rows.items():
            records.append(
                Record(
                    study=args.settings["study"],
                    variant=row.variant,
                    metric=metric,
                    value=value,
                    unit=unit,
                    higher_is_better=higher_is_better,
                    backend="formula" if metric.startswith(("flops", "sparsity")) else f"{backend}/{conditions}",
                )
            )
    write_provenance(args.output, args.settings, base_sha256=base.weights_sha256)
    write_records(args.output, records)


def timing_key(row: Variant) -> str:
    """Equal for rows whose forward is the same computation."""
    if row.attention == "full":
        return DENSE
    precision = row.quantization.split("-")[-1]  # post-training and quantisation-aware rows infer alike
    return f"{row.attention} {row.router} {row.mixing} {precision} {row.sparsity:g}"


def attention_modules(sheet: dict[str, Variant], base, attention: AttentionSettings, device) -> dict[str, nn.Module]:
    """One fresh attention per timing key, dense left out."""
    rows = {timing_key(row): row for row in sheet.values()}
    return {
        key: build(row, base.heads, base.head_dim, base.tokens, attention).to(device).eval()
        for key, row in rows.items()
        if key != DENSE
    }


def time_operations(
    modules: dict[str, nn.Module], q: Tensor, k: Tensor, v: Tensor, settings: dict, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of one attention layer by timing key."""
    functions: dict[str, Callable] = {DENSE: lambda: F.scaled_dot_product_attention(q, k, v)}
    functions |= {key: lambda module=module: module(q, k, v) for key, module in modules.items()}
    return interleaved_ms(functions, settings["warmup"], settings["repeats"], device)


def time_steps(
    modules: dict[str, nn.Module], transformer: nn.Module, base, settings: dict, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of one forward of the transformer by timing key; layers share a module, which costs the same."""
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

    def prepare(key: str) -> None:
        for layer, processor in zip(layers, processors.get(key, dense), strict=True):
            layer.set_processor(processor)

    functions = {key: lambda: predict(transformer, latents, sigma, text) for key in (DENSE, *modules)}
    try:
        return interleaved_ms(functions, settings["warmup"], settings["repeats"], device, prepare)
    finally:
        prepare(DENSE)


def timings(name: str, dense_name: str, times_ms: dict[str, list[float]], key: str) -> dict[str, tuple]:
    """Percentiles of a row and of dense attention, and the ratio of the two medians."""
    own, dense = percentiles(times_ms[key]), percentiles(times_ms[DENSE])
    rows: dict[str, tuple] = {f"latency.{name}.{p}": (value, "ms", False) for p, value in own.items()}
    rows |= {f"latency.{dense_name}.{p}": (value, "ms", False) for p, value in dense.items()}
    rows[f"speedup.{name}"] = (dense["p50"] / own["p50"], "1", True)
    return rows


def work(row: Variant, mask: Tensor | None, base, attention: AttentionSettings) -> dict[str, tuple]:
    """FLOPs for one video and the sparsity behind them; mask (H, T_m, T_n), None for full attention."""
    dense = dense_flops(base.tokens, base.head_dim)
    if mask is None:
        layer, sparsity = Flops(sparse=base.heads * dense), 0.0
    else:
        blocks = (attention.block_q, attention.block_k)
        words = {"attention": row.attention, "router": row.router, "mixing": row.mixing}
        layer = layer_flops(mask, base.tokens, base.head_dim, *blocks, **words)
        sparsity = realised_sparsity(mask, base.tokens, *blocks)
    forward = {part: base.layers * getattr(layer, part) for part in ("router", "sparse", "linear", "mixing")}
    dense_forward = base.layers * base.heads * dense
    return {
        "flops.per_head": (layer.total / base.heads, "FLOP", False),
        "flops.per_layer": (layer.total, "FLOP", False),
        "flops.per_forward": (sum(forward.values()), "FLOP", False),
        **{f"flops.per_forward.{part}": (value, "FLOP", False) for part, value in forward.items()},
        "flops.dense_per_forward": (dense_forward, "FLOP", False),
        "flops.reduction": (dense_forward / sum(forward.values()), "1", True),
        "sparsity.realised": (sparsity, "1", None),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    run_main(main)
