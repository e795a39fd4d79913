"""Time `sla2_attention` and its parts against dense attention and FlexAttention on one GPU.

    PYTHONPATH=kernels python kernels/bench/measure.py --output results/reference/kernels-h100

Writes measurements.csv (one row a measurement), summary.csv (whole operator at the two shapes of Wan2.1) and provenance.json.
Every time is of one CUDA graph replay with a cold L2 cache, so launch gaps and Python count for nobody: median, and 20th and
80th percentile. Routing, low-bit conversion, both branches and mixing are inside. A wrong result or a busy GPU stops the run
before the first time is taken. Legend: N tokens, D head size, H heads; effective_tflops is 4 H N^2 D / time, the paper's C/t.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from sla2_kernels import (
    fused,
    linear,
    linear_attention,
    reference,
    routing,
    sla2_attention,
    soft_sparse_attention,
    sparse_attention,
)

SHAPES = {"1.3B-480p": (12, 32760, 128), "14B-720p": (40, 75600, 128)}  # H, N, D of Wan2.1 at 81 frames
SPARSITIES = (0.97, 0.95, 0.90, 0.85)
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
DENSE = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
PRECISIONS = {"none": "bf16", "int8": "int8", "fp8": "fp8", "int8-bf16": "int8-bf16"}
BUDGET_MS = 150  # of repetitions, for one measurement


@dataclass
class Row:
    """One measurement; `part` is `whole` for a complete attention."""

    shape: str
    H: int
    N: int
    D: int
    sparsity: float
    passes: str
    part: str
    implementation: str
    precision: str
    ms: float
    ms_p20: float
    ms_p80: float
    effective_tflops: float


class Table:
    """Rows, written as they come, so that a run cut short keeps what it has."""

    def __init__(self, path: Path) -> None:
        self.rows: list[Row] = []
        self.path = path

    def add(self, shape: str, size: tuple[int, int, int], sparsity: float, passes: str, part: str, by: str,
            precision: str, call) -> None:  # fmt: skip
        H, N, D = size
        ms, low, high = timing(call)
        dense = 4 * H * N * N * D * (1 if passes == "forward" else 3.5)
        self.rows.append(
            Row(shape, H, N, D, sparsity, passes, part, by, precision, *(round(x, 5) for x in (ms, low, high)),
                round(dense / ms / 1e9, 1)))  # fmt: skip
        print(f"{shape} {sparsity:.0%} {passes} {part} {by} {precision}: {ms:.3f} ms", flush=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name.replace("passes", "pass") for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            for row in self.rows:
                entry = asdict(row)
                entry["pass"] = entry.pop("passes")
                writer.writerow(entry)

    def time_of(self, **wanted) -> float | None:
        found = [row.ms for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items())]
        return found[0] if found else None


def timing(call) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of a call in ms."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    times = do_bench(graph.replay, warmup=20, rep=BUDGET_MS, quantiles=[0.5, 0.2, 0.8])
    del graph, kept
    return tuple(times)


def check() -> None:
    """Stop if an answer is wrong: bf16 and low-bit forward and bf16 gradients against float64."""
    H, N, D = 2, 1000, 128
    q, k, v, grad = draw(H, N, D, 4)
    alpha = torch.rand(H, 8, device="cuda")
    mask = random_mask(H, N, 0.8)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    exact = reference.sla2_attention(*wide, alpha.double(), mask, 128, 64, "softmax", True)
    gradients = torch.autograd.grad(exact, wide, grad.double())
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = sla2_attention(*leaves, mask=mask, alpha=alpha)
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    errors = {
        name: distance(a, b) for name, a, b in zip(["o", "dq", "dk", "dv"], found, (exact, *gradients), strict=True)
    }
    limits = dict.fromkeys(errors, 0.02)
    for precision, limit in (("int8-bf16", 0.03), ("int8", 0.06), ("fp8", 0.08)):
        errors[precision] = distance(sla2_attention(q, k, v, mask=mask, alpha=alpha, precision=precision), exact)
        limits[precision] = limit
    print("relative errors against float64:", {name: f"{error:.4f}" for name, error in errors.items()}, flush=True)
    wrong = [name for name, error in errors.items() if not error < limits[name]]
    if wrong:
        sys.exit(f"wrong result, nothing is timed: {', '.join(f'{n} errs by {errors[n]:.3f}' for n in wrong)}")


def refuse_busy_gpu() -> None:
    """Stop if another process computes on the GPU."""
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    others = {int(pid) for pid in subprocess.check_output(query, text=True).split() if pid.isdigit()} - {os.getpid()}
    if others:
        sys.exit(f"the GPU is busy with process {', '.join(map(str, sorted(others)))}; times taken now would mislead")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def draw(H: int, N: int, D: int, count: int) -> list[torch.Tensor]:
    """Random normal (1, H, N, D) bf16, laid out as Wan's projections are: views of (1, N, H, D)."""
    return [torch.randn(1, N, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(count)]


def kept_blocks(N: int, sparsity: float) -> int:
    return max(1, round((1 - sparsity) * reference.num_blocks(N, 64)))


def random_mask(H: int, N: int, sparsity: float) -> torch.Tensor:
    scores = torch.rand(1, H, reference.num_blocks(N, 128), reference.num_blocks(N, 64), device="cuda")
    return reference.top_k_mask(scores, kept_blocks(N, sparsity))


def dense(backend: SDPBackend, q, k, v):
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def both(call, inputs: list[torch.Tensor], grad: torch.Tensor):
    """Forward and backward of a call on leaves."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(call(*leaves), leaves, grad)


def measure_shape(table: Table, shape: str, sparsities: tuple[float, ...], backward: bool) -> None:
    """Dense baselines and the whole operator at one shape."""
    H, N, D = size = SHAPES[shape]
    q, k, v, grad = draw(H, N, D, 4)
    alpha = torch.rand(H, reference.num_blocks(N, 128), device="cuda")
    eye = torch.eye(D, device="cuda")

    def ours(q, k, v, alpha=alpha, sparsity=0.97, precision="none"):
        kept = kept_blocks(N, sparsity)
        return sla2_attention(q, k, v, kept=kept, alpha=alpha, projections=(eye, eye), precision=precision)

    for name, backend in DENSE.items():
        table.add(shape, size, 0.0, "forward", "whole", name, "bf16", lambda b=backend: dense(b, q, k, v))
    for sparsity in sparsities:
        for precision, label in PRECISIONS.items():
            table.add(shape, size, sparsity, "forward", "whole", "sla2", label,
                      lambda s=sparsity, p=precision: ours(q, k, v, sparsity=s, precision=p))  # fmt: skip
    if not backward:
        return
    for name, backend in DENSE.items():
        run = both(lambda *x, b=backend: dense(b, *x), [q, k, v], grad)
        table.add(shape, size, 0.0, "forward+backward", "whole", name, "bf16", run)
    for sparsity in sparsities:
        for precision, label in [("none", "bf16")] + ([("fp8", "fp8")] if sparsity == sparsities[0] else []):
            run = both(lambda q, k, v, a, s=sparsity, p=precision: ours(q, k, v, a, s, p), [q, k, v, alpha], grad)
            table.add(shape, size, sparsity, "forward+backward", "whole", "sla2", label, run)


def measure_soft(table: Table, shape: str, blocks: int) -> None:
    """Stage 1's soft branches for some query blocks, forward and with the gradients of log M and of the weight."""
    H, N, D = SHAPES[shape]
    _, k, v, grad = draw(H, N, D, 4)
    q, grad = draw(H, 128 * blocks, D, 1)[0], grad[:, :, : 128 * blocks]
    log_mask = torch.rand(1, H, blocks, reference.num_blocks(N, 64), device="cuda").log_softmax(-1)

    def soft(log_mask):
        return soft_sparse_attention(q, k, v, log_mask) + linear_attention(q, k, v, 1 - log_mask.exp())

    for passes, run in (("forward", lambda: soft(log_mask)), ("forward+backward", both(soft, [log_mask], grad))):
        table.add(shape, (H, N, D), 0.0, passes, f"soft, {blocks} query blocks", "sla2", "bf16", run)


def measure_sparse_branch(table: Table, shape: str, sparsities: tuple[float, ...]) -> None:
    """Sparse branch alone, mask given, beside FlexAttention with the same block mask."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled = torch.compile(flex_attention)
    H, N, D = size = SHAPES[shape]
    q, k, v = draw(H, N, D, 3)
    for sparsity in sparsities:
        mask = random_mask(H, N, sparsity)
        count = mask.sum(-1).int()
        order = mask.int().argsort(dim=-1, descending=True, stable=True).int()
        blocks = BlockMask.from_kv_blocks(count, order, BLOCK_SIZE=(128, 64), seq_lengths=(N, N))
        run = lambda b=blocks: compiled(q, k, v, block_mask=b)  # noqa: E731
        found, _ = sparse_attention(q, k, v, mask)
        print("distance of FlexAttention from the sparse branch:", f"{distance(run(), found):.4f}", flush=True)
        table.add(shape, size, sparsity, "forward", "sparse", "flex", "bf16", run)
        table.add(
            shape, size, sparsity, "forward", "sparse", "sla2", "bf16", lambda m=mask: sparse_attention(q, k, v, m)
        )


def measure_parts(table: Table, shape: str, sparsity: float) -> None:
    """The steps of the forward, each alone."""
    H, N, D = size = SHAPES[shape]
    q, k, v = draw(H, N, D, 3)
    alpha = torch.rand(H, reference.num_blocks(N, 128), device="cuda")
    eye = torch.eye(D, device="cuda")
    settings = fused.Settings(kept_blocks(N, sparsity), 128, 64, "softmax", True, "none")
    pooled, pooled_queries = routing.pool(k, 64), routing.pool(q, 128)
    mean = routing.key_mean(pooled, N, 64)
    chosen = routing.empty_route(H, pooled_queries.shape[1], pooled.shape[1], settings.kept, q.dtype, q.device)
    routing.route(pooled_queries, pooled, mean, (eye, eye), settings.kept, chosen)
    h, z = linear.block_states(k, v, 64, "softmax", mean)
    state = fused.product(chosen.weight, h.flatten(2)).view(H, -1, D, D)
    total = torch.empty_like(pooled_queries)
    fused.remaining(z, chosen.tables, pooled.shape[1], total)
    parts = {
        "pooling": lambda: (routing.pool(q, 128), routing.key_mean(routing.pool(k, 64), N, 64)),
        "routing": lambda: routing.route(pooled_queries, pooled, mean, (eye, eye), settings.kept, chosen),
        "block states": lambda: linear.block_states(k, v, 64, "softmax", mean),
        "sum of states": lambda: (
            fused.product(chosen.weight, h.flatten(2)), fused.remaining(z, chosen.tables, pooled.shape[1], total)),
        "attention and mixing": lambda: fused.both_branches(
            q, k, v, chosen.tables, state, total, alpha, None, settings, False),
    }  # fmt: skip
    for part, call in parts.items():
        table.add(shape, size, sparsity, "forward", part, "sla2", "bf16", call)


def measure_lengths(table: Table, sparsity: float, D: int) -> None:
    """Whole operator and cuDNN's dense attention at 12 heads over N."""
    for N in LENGTHS:
        q, k, v = draw(12, N, D, 3)
        alpha = torch.rand(12, reference.num_blocks(N, 128), device="cuda")
        eye, size = torch.eye(D, device="cuda"), (12, N, D)

        def run(precision, a=(q, k, v, alpha, eye), kept=kept_blocks(N, sparsity)):  # noqa: B008
            return sla2_attention(*a[:3], kept=kept, alpha=a[3], projections=(a[4], a[4]), precision=precision)

        table.add(f"N{N}-D{D}", size, sparsity, "forward", "whole", "sla2", "bf16", lambda r=run: r("none"))
        table.add(f"N{N}-D{D}", size, sparsity, "forward", "whole", "sla2", "fp8", lambda r=run: r("fp8"))
        for name, backend in DENSE.items():
            table.add(f"N{N}-D{D}", size, 0.0, "forward", "whole", name, "bf16",
                      lambda b=backend, a=(q, k, v): dense(b, *a))  # fmt: skip


def write_summary(table: Table, path: Path) -> None:
    """Whole operator at Wan's shapes, with its speed-up over both dense baselines of the same run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["shape", "sparsity", "pass", "precision", "ms", "speedup_fa2", "speedup_cudnn"])
        for row in table.rows:
            if row.shape not in SHAPES or row.part != "whole" or row.implementation != "sla2":
                continue
            base = [table.time_of(shape=row.shape, passes=row.passes, implementation=name) for name in DENSE]
            ratios = [f"{time / row.ms:.2f}" if time else "" for time in base]
            writer.writerow([row.shape, f"{row.sparsity:.2f}", row.passes, row.precision, f"{row.ms:.4f}", *ratios])


def ceilings() -> dict[str, float]:
    """What this GPU reaches at best: a bf16 matrix product of 8192³ in TFLOP/s, and a copy of 2 GiB, read and written, in TB/s."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    product, copy = (do_bench(call, warmup=50, rep=BUDGET_MS, return_mode="median")
                     for call in (lambda: a @ b, lambda: target.copy_(source)))  # fmt: skip
    return {"matmul_tflops": round(2 * 8192**3 / product / 1e9, 1), "copy_tbps": round(2 * 2**31 / copy / 1e9, 3)}


def provenance(commit: str) -> dict:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "commit": commit,
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.check_output(query, text=True).strip(),
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "timing": "CUDA graph replay, cold L2, median and 20th and 80th percentile",
        "inputs": "random normal bf16, (1, H, N, D) as views of (1, N, H, D)",
        "ceilings": ceilings(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the CSV files and provenance.json")
    parser.add_argument("--commit", default="unknown", help="git commit of the code, recorded")
    args = parser.parse_args(arguments)
    refuse_busy_gpu()
    check()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "provenance.json").write_text(json.dumps(provenance(args.commit), indent=1) + "\n")
    table = Table(args.output / "measurements.csv")
    steps = [
        lambda: measure_shape(table, "1.3B-480p", SPARSITIES, backward=True),
        lambda: measure_sparse_branch(table, "1.3B-480p", SPARSITIES),
        lambda: measure_shape(table, "14B-720p", SPARSITIES, backward=True),
        lambda: measure_soft(table, "1.3B-480p", 16),
        lambda: measure_parts(table, "1.3B-480p", 0.97),
        lambda: measure_parts(table, "14B-720p", 0.97),
        lambda: measure_lengths(table, 0.97, 128),
        lambda: measure_lengths(table, 0.97, 64),
    ]
    for step in steps:
        step()
        torch.cuda.empty_cache()
        write_summary(table, args.output / "summary.csv")


if __name__ == "__main__":
    main()
