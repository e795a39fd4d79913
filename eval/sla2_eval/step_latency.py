"""Times of Wan2.1 at full size with random weights on one GPU: kernel, attention op, denoising step, and the parts around it.

    PYTHONPATH=.:kernels:eval python -m sla2_eval.step_latency --output results/reference/latency-h200

A denoising step is one forward of the transformer, batch 1 (guidance takes two); eager, and with every block compiled, for all
rows alike. Rows are timed in turn, round by round, so that a drift of clocks touches all of them. The whole op has smoothing,
routing, quantisation, both branches and mixing inside; the kernel is its sparse branch alone, the blocks given. The floor is a
step whose attention operator returns V. Rows are written as they come: measurements.csv, and summary.csv with the ratios.
"""

import argparse
import csv
import io
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sla2.attention import AttentionSettings, build
from sla2.device import claim_device
from sla2.errors import run_main
from sla2.files import write_atomic
from sla2.flow import predict
from sla2.progress import say
from sla2.record import write_provenance
from sla2_eval.full_size import (
    DENSE_CUDNN,
    DENSE_FA2,
    FLOOR,
    ROWS,
    SHAPES,
    Shape,
    Switch,
    build_transformer,
    default_dtype,
    inputs,
)
from sla2_eval.timing import GpuWatch, call_ms, percentiles, refuse_shared_gpu
from sla2_kernels import sparse_attention

KERNELS = {DENSE_FA2: SDPBackend.FLASH_ATTENTION, DENSE_CUDNN: SDPBackend.CUDNN_ATTENTION}
REPEATS = {"attention_op": 15, "kernel": 15, "denoising_step": 8, "around": 1}
SLOW_MS = 2000.0  # a step that takes longer is repeated twice only
COMPILED_DISTANCE = 0.05  # relative distance of a compiled answer from the eager one above which nothing is timed
STEPS, FORWARDS = 50, 2  # Wan's own sampler: steps, and forwards a step with guidance


@dataclass
class Measurement:
    """One timed thing; without `ms` there is a `reason`. `mode` is `eager` or `compiled`; memory in MiB, weights included.

    A compiled row with `graph_breaks` was compiled in pieces, and says less about what a compiler can do for it.
    """

    shape: str
    part: str
    mode: str
    row: str
    sparsity: float | None = None
    precision: str = ""
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    repeats: int = 0
    warmup_s: float | None = None
    graph_breaks: int | None = None
    peak_mib: float | None = None
    clock_mhz: float | None = None
    clock_mhz_min: float | None = None
    power_w: float | None = None
    temperature_c_max: float | None = None
    reason: str = ""


class Table:
    """Measurements, written as they come, so that a run cut short keeps what it has."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, []

    def add(self, measurements: list[Measurement]) -> None:
        for one in measurements:
            found = f"{one.ms:.3f} ms" if one.ms is not None else one.reason
            say(f"{one.shape} {one.part} {one.mode} {one.row}: {found}")
        self.rows += measurements
        write_csv(self.folder / "measurements.csv", [asdict(row) for row in self.rows])
        write_csv(self.folder / "summary.csv", summary(self.rows))


def write_csv(path: Path, rows: list[dict]) -> None:
    if not rows:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if v is None else f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_atomic(path, text.getvalue())


def summary(rows: list[Measurement]) -> list[dict]:
    """Medians with their ratio to FlashAttention2, to the fastest dense kernel of the run, and to the floor of the step.

    `end_to_end` is put together: 50 steps of two forwards, the text encoder twice, VAE and file, nothing offloaded.
    """
    times = {(r.shape, r.part, r.mode, r.row): r.ms for r in rows if r.ms is not None}
    answer = []
    for (shape, part, mode, row), ms in [*times.items(), *end_to_end(times).items()]:
        if part == "around":
            continue
        everything = times | end_to_end(times)
        fa2 = everything.get((shape, part, mode, DENSE_FA2))
        dense = [t for name in KERNELS if (t := everything.get((shape, part, mode, name))) is not None]
        floor = everything.get((shape, part, mode, FLOOR))
        answer.append(
            {
                "shape": shape,
                "part": part,
                "mode": mode,
                "row": row,
                "ms": ms,
                "speedup_fa2": fa2 / ms if fa2 else None,
                "speedup_fastest_dense": min(dense) / ms if dense else None,
                "floor_share": floor / ms if floor else None,
            }
        )
    return answer


def end_to_end(times: dict[tuple, float]) -> dict[tuple, float]:
    """Milliseconds of a whole video by row, where the step and everything around it were timed."""
    answer = {}
    for (shape, part, mode, row), ms in times.items():
        around = [times.get((shape, "around", "eager", name)) for name in ("text_encoding", "vae_decoding", "writing")]
        if part == "denoising_step" and None not in around:
            text, vae, writing = around
            answer[shape, "end_to_end", mode, row] = STEPS * FORWARDS * ms + FORWARDS * text + vae + writing
    return answer


class Timer:
    """Warm-up, interleaved rounds and peak memory on one device, until a deadline.

    Args:
        deadline: `time.monotonic()` after which nothing new is begun.
    """

    def __init__(self, device: torch.device, deadline: float) -> None:
        self.device, self.deadline = device, deadline

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def run(
        self,
        shape: str,
        part: str,
        mode: str,
        calls: dict[str, Callable[[], object]],
        prepare: Callable[[str], None] = lambda name: None,
        warm: Callable[[str], None] | None = None,
    ) -> list[Measurement]:
        """Time every call; what fails in its warm-up, or finds no time left, is a row with the reason."""
        found = {name: describe(shape, part, mode, name) for name in calls}
        for name, one in found.items():
            if self.late:
                one.reason = "not measured: the time that the command was given is spent"
                continue
            began = time.monotonic()
            prepare(name)
            try:
                warm(name) if warm else calls[name]()
                self._synchronise()
            except Exception as error:  # of a kernel, a compiler or a library: the other rows are still worth having
                first = (str(error).strip().splitlines() or [""])[0][:200]
                one.reason = f"{type(error).__name__}: {first}"
                continue
            one.warmup_s = time.monotonic() - began
            if mode == "compiled":
                one.graph_breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
                torch._dynamo.utils.counters.clear()
        ready = [name for name, one in found.items() if not one.reason]
        if mode == "compiled":  # a graph that breaks may be compiled once more when its row's turn comes again
            for name in ready:
                prepare(name)
                warm(name)
        times: dict[str, list[float]] = {name: [] for name in ready}
        with GpuWatch(self.device) as watch:
            repeats = REPEATS[part]
            while repeats > 0 and ready and not (self.late and times[ready[-1]]):
                for name in ready:
                    prepare(name)
                    self._reset_peak()
                    times[name].append(call_ms(calls[name], self.device))
                    found[name].peak_mib = self._peak_mib()
                repeats -= 1
                if max(max(values) for values in times.values()) > SLOW_MS and part == "denoising_step":
                    repeats = min(repeats, 1 if len(times[ready[0]]) == 1 else 0)
        for name in ready:
            one, spread = found[name], percentiles(times[name])
            one.ms, one.ms_p20, one.ms_p80 = statistics.median(times[name]), spread["p20"], spread["p80"]
            one.repeats = len(times[name])
            for key, value in watch.summary.items():
                setattr(one, key, value)
        return list(found.values())

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak_mib(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else None


def describe(shape: str, part: str, mode: str, name: str) -> Measurement:
    variant = ROWS.get(name)
    if variant is None:
        return Measurement(shape, part, mode, name, 0.0 if name in KERNELS else None)
    return Measurement(shape, part, mode, name, variant.sparsity, variant.quantization)


def time_attention(
    name: str, shape: Shape, timer: Timer, settings: AttentionSettings, dtype: torch.dtype
) -> Iterator[list[Measurement]]:
    """Whole operator of one layer, then the sparse branch alone with the same number of blocks."""
    draw = torch.Generator().manual_seed(0)
    size = (1, shape.heads, shape.tokens, shape.head_dim)
    q, k, v = (torch.randn(size, generator=draw, dtype=torch.float32).to(timer.device, dtype) for _ in range(3))
    modules = {
        row: build(variant, shape.heads, shape.head_dim, shape.tokens, settings)
        .to(timer.device)
        .eval()
        .requires_grad_(False)
        for row, variant in ROWS.items()
        if variant is not None
    }
    whole = {row: lambda kernel=kernel: dense(kernel, q, k, v) for row, kernel in KERNELS.items()}
    yield timer.run(name, "attention_op", "eager", whole | {row: lambda m=m: m(q, k, v) for row, m in modules.items()})
    calls = dict(whole)  # in the same rounds, as clocks depend on what runs beside
    for row, module in modules.items():
        mask, precision = module.route(q, k), module.quantizer.precision(False)
        blocks = {"block_q": settings.block_q, "block_k": settings.block_k, "backend": settings.backend}
        calls[row] = lambda mask=mask, precision=precision, blocks=blocks: sparse_attention(
            q, k, v, mask, precision=precision, **blocks
        )
    yield timer.run(name, "kernel", "eager", calls)


def dense(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def time_steps(
    name: str, shape: Shape, timer: Timer, settings: AttentionSettings, dtype: torch.dtype, compiler: str
) -> Iterator[list[Measurement]]:
    """One forward of the transformer, eager and with compiled blocks.

    The warm-up runs the first two blocks only: all blocks are alike, and it compiles, loads and allocates what the others need.
    """
    transformer = build_transformer(shape, timer.device, dtype)
    parameters = sum(p.numel() for p in transformer.parameters())
    say(f"{name}: {parameters / 1e9:.2f} G parameters, {shape.tokens} tokens, {timer.device}")
    switch, arguments = Switch(transformer, shape, settings), inputs(shape, timer.device, dtype)
    calls = {row: lambda: predict(transformer, *arguments) for row in ROWS}
    blocks, eager = transformer.blocks, {}

    def short(row: str) -> None:
        transformer.blocks = blocks[:2]
        try:
            answer = predict(transformer, *arguments)
        finally:
            transformer.blocks = blocks
        if not bool(torch.isfinite(answer).all()):
            raise ValueError("the answer holds values that are not finite")
        if row in eager:
            distance = float((answer - eager[row]).norm() / eager[row].norm())
            if not distance < COMPILED_DISTANCE:
                raise ValueError(f"the compiled answer is {distance:.3f} away from the eager one, relatively")
        else:
            eager[row] = answer

    yield timer.run(name, "denoising_step", "eager", calls, switch, short)
    compile_blocks(blocks, compiler)
    yield timer.run(name, "denoising_step", "compiled", calls, switch, short)
    torch._dynamo.reset()


def compile_blocks(blocks: nn.ModuleList, compiler: str) -> None:
    """Compile every block in place; one graph a row, shared by all blocks, kept side by side while the rows take turns."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.recompile_limit = 4 * len(ROWS)
    for block in blocks:
        block.compile(dynamic=False, backend=compiler)


def time_around(name: str, shape: Shape, timer: Timer, dtype: torch.dtype) -> Iterator[list[Measurement]]:
    """What a video takes besides its steps: text encoder (UMT5-XXL's size), VAE decoder in fp32 as `WanPipeline` runs it, file."""
    yield timer.run(name, "around", "eager", {"text_encoding": text_encoding(shape, timer.device, dtype)})
    yield timer.run(name, "around", "eager", {"vae_decoding": vae_decoding(shape, timer.device)})
    yield timer.run(name, "around", "eager", {"writing": writing(shape)})
    offload = Measurement(
        name, "around", "eager", "offload", reason="nothing is offloaded: all weights stay on the device"
    )
    yield [offload]


def lazily(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """A call that builds what it needs the first time, in its warm-up."""
    made: list = []

    def call() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return call


def text_encoding(shape: Shape, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    def make() -> Callable[[], object]:
        from transformers import UMT5Config, UMT5EncoderModel

        width = shape.text[1]
        config = UMT5Config(
            vocab_size=shape.vocabulary,
            d_model=width,
            d_kv=64,
            d_ff=width * 5 // 2,
            num_layers=shape.text_layers,
            num_heads=width // 64,
            feed_forward_proj="gated-gelu",
        )
        with device, default_dtype(dtype):
            model = UMT5EncoderModel(config).eval()
        ids = torch.ones(1, shape.text[0], dtype=torch.long, device=device)
        return lambda: model(ids, attention_mask=torch.ones_like(ids))

    return lazily(make)


def vae_decoding(shape: Shape, device: torch.device) -> Callable[[], object]:
    def make() -> Callable[[], object]:
        from diffusers import AutoencoderKLWan

        with device:
            vae = AutoencoderKLWan(base_dim=shape.vae_width, z_dim=shape.channels).eval()
        latents = torch.randn(shape.latents, generator=torch.Generator().manual_seed(0)).to(device)
        return lambda: vae.decode(latents, return_dict=False)[0].cpu()

    return lazily(make)


def writing(shape: Shape) -> Callable[[], object]:
    def make() -> Callable[[], object]:
        import tempfile

        from sla2.video import write_mp4

        folder = tempfile.TemporaryDirectory()
        ramp = torch.linspace(0, 255, shape.width).expand(shape.frames, shape.height, shape.width)
        frames = torch.stack([ramp, ramp.flip(-1), ramp.roll(40, -1)], dim=-1).to(torch.uint8)
        return lambda folder=folder: write_mp4(Path(folder.name) / "clip.mp4", frames, 16)

    return lazily(make)


def measure(
    shapes: dict[str, Shape],
    table: Table,
    device: torch.device,
    settings: AttentionSettings,
    budget_s: float,
    compiler: str = "inductor",
) -> None:
    """Time everything; of two shapes the smaller gets 38% of the budget at most, and what it leaves goes on."""
    dtype = torch.bfloat16
    end = time.monotonic() + budget_s
    for number, (name, shape) in enumerate(shapes.items()):
        left = end - time.monotonic()
        timer = Timer(device, time.monotonic() + (left if number == len(shapes) - 1 else 0.38 * left))
        for part in (
            time_attention(name, shape, timer, settings, dtype),
            time_steps(name, shape, timer, settings, dtype, compiler),
            time_around(name, shape, timer, dtype),
        ):
            for measurements in part:
                table.add(measurements)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the CSV files")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--budget-s", type=float, default=470.0, help="seconds after which nothing new is begun")
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    refuse_shared_gpu(device)
    device = claim_device({"device": "cuda"}, alone=True)
    table = Table(args.output)
    settings = AttentionSettings(backend="triton")
    write_provenance(
        args.output / "measurements.csv",
        {"shapes": {name: asdict(SHAPES[name]) for name in args.shapes}, "attention": asdict(settings)},
        rows=list(ROWS),
        columns=[field.name for field in fields(Measurement)],
    )
    with torch.no_grad():
        measure({name: SHAPES[name] for name in args.shapes}, table, device, settings, args.budget_s)


if __name__ == "__main__":
    run_main(main)
