"""The paper's numbers against ours: each reproduced, different, or out of reach, with the reason.

    python -m sla2_eval.paper --reference results/reference/*/summary.csv --output paper.csv

`paper.tsv` holds what the paper prints (arXiv 2602.12675, tables 1 and 2 and its speeds). FLOPs are compared as ratios to full attention, ours
from the formula at the blocks that are really kept; the printed totals are of fewer layers than the models have. Speeds are
those that `kernels/bench` and `sla2_eval.step_latency` measured on the GPU that their folder names. Quality needs the published model, its
metrics' weights and the authors' private prompts, unless a study of that model brings records of VBench itself, or of its port here.
"""

import argparse
import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from sla2.errors import UserError, run_main
from sla2.files import write_atomic

REPRODUCED, DIFFERS, CANNOT = "reproduced", "differs", "cannot"
CLOSE = 0.1  # relative distance within which a ratio counts as reproduced; for a speed-up, how far it may fall short
NUMBERS = Path(__file__).with_name("paper.tsv")
BLOCKS = {"block_q": 128, "block_k": 64}
MODELS = {  # heads, layers, tokens; the shape's name in measured files; the start of the name of a study of that model
    "Wan2.1-T2V-1.3B-480P": (12, 30, 32760, "1.3B-480p", "wan2.1-1.3b"),
    "Wan2.1-T2V-14B-720P": (40, 40, 75600, "14B-720p", "wan2.1-14b"),
}
HEAD_DIM = 128
WORDS = {
    "SLA": {"attention": "sla", "router": "mean_pool", "mixing": "projection"},
    "SLA2": {"attention": "sla2", "router": "learned", "mixing": "alpha"},
}
QUALITY = "needs the published Wan2.1 weights, the metric's weights and the authors' private prompts"
MEASURED_BY = {
    "vbench_official": "VBench itself",
    "vbench": "the port of VBench here",
}  # of a dimension, the first that a study has
OF_PAPER = (*(f"{family}." for family in MEASURED_BY), "vision_reward")  # metrics that the paper reports
UNKNOWN = "no such method is built here"


@dataclass(frozen=True)
class Number:
    """One printed number; `sparsity` in [0, 1)."""

    table: str
    model: str
    method: str
    sparsity: float
    quantity: str
    value: float
    unit: str


@dataclass(frozen=True)
class Cell:
    """A printed number with what stands against it here; `ours` is in the unit that `note` or the quantity says."""

    number: Number
    status: str
    ours: float | None
    note: str


def read_numbers(path: Path = NUMBERS) -> list[Number]:
    """What the paper prints."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [Number(**{**row, "sparsity": float(row["sparsity"]), "value": float(row["value"])}) for row in rows]


def compare(numbers: list[Number], measured: list[dict], study: dict | None = None) -> list[Cell]:
    """A cell for each number.

    Args:
        measured: rows of `summary.csv` files, each with `device`, the name of its folder.
        study: `name` of a study, and `values`: (mean, low, high) by (variant, metric); None without one.
    """
    printed = {(n.table, n.model, n.method, n.sparsity, n.quantity): n.value for n in numbers}
    cells = []
    for number in numbers:
        if number.quantity == "flops":
            cells.append(_flops(number, printed[number.table, number.model, "Full", 0.0, "flops"]))
        elif number.unit == "x":
            cells.append(_speed(number, measured))
        else:
            cells.append(_quality(number, study))
    return cells


def flops_ratios(model: str, method: str, sparsity: float) -> tuple[float, float]:
    """FLOPs of a method over those of full attention, at the blocks that are really kept: all, and without sums of block states.

    The sums H_i = sum_j (1 - M_ij) h_j cost 2 T_m T_n (d^2 + d); the printed counts have room for 4 N d^2 and no more.
    """
    # Imported here: the page needs torch for nothing else.
    import torch

    from sla2.variant import kept_blocks
    from sla2_eval.flops import dense_flops, head_flops

    _, _, tokens, _, _ = MODELS[model]
    rows, columns = (-(-tokens // size) for size in BLOCKS.values())
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[:, : kept_blocks(sparsity, columns)] = True
    found = head_flops(mask, tokens, HEAD_DIM, *BLOCKS.values(), **WORDS[method])
    sums = 2 * rows * columns * (HEAD_DIM**2 + HEAD_DIM)
    dense = dense_flops(tokens, HEAD_DIM)
    return found.total / dense, (found.total - sums) / dense


def _flops(number: Number, full: float) -> Cell:
    heads, layers, tokens, _, _ = MODELS[number.model]
    head = 4 * tokens**2 * HEAD_DIM / 1e12
    if number.method == "Full":
        note = (
            f"4 N^2 d is {head:.4f} TFLOP a head, {head * heads:.1f} a layer, {head * heads * layers:.1f} a forward; printed are "
            f"{number.value / head:.0f} heads' worth, {number.value / head / heads:.1f} layers of {layers}: ratios are compared"
        )
        return Cell(number, DIFFERS, head * heads * layers, note)
    if number.method not in WORDS:
        return Cell(number, CANNOT, None, UNKNOWN)
    everything, ours = flops_ratios(number.model, number.method, number.sparsity)
    theirs = number.value / full
    note = (
        f"{100 * ours:.2f}% of full attention, printed {100 * theirs:.2f}%; {100 * everything:.2f}% are executed, with the sums of "
        "block states that the printed count has no room for"
    )
    close = abs(ours / theirs - 1) <= CLOSE
    if not close and theirs < 1 - number.sparsity:
        note += f"; less than the {100 * (1 - number.sparsity):.0f}% that are kept: probably a slip in the paper"
    return Cell(number, REPRODUCED if close else DIFFERS, ours * full, note)


def _speed(number: Number, measured: list[dict]) -> Cell:
    shape = MODELS[number.model][3]
    if number.quantity == "attention_speedup_fa2":
        rows = [
            row for row in measured
            if row.get("pass") == "forward" and row["shape"] == shape and abs(float(row["sparsity"]) - number.sparsity) < 1e-6
        ]  # fmt: skip
        source = "attention op"
    elif number.quantity == "end_to_end_speedup":
        rows = [
            row for row in measured
            if row.get("part") == "end_to_end" and row["shape"] == shape
            and row["row"].startswith(f"sla2-{100 * number.sparsity:.0f}")
        ]  # fmt: skip
        source = "whole video, nothing offloaded"
    elif number.quantity == "attention_time_ratio":
        rows = attention_in_a_step(measured, shape, number.sparsity)
        source = "what attention adds to a denoising step without it"
    else:
        return Cell(number, CANNOT, None, UNKNOWN)
    rows = [row for row in rows if row["speedup_fa2"]]
    if not rows:
        return Cell(number, CANNOT, None, "not measured: needs a run on a GPU")
    best = max(rows, key=lambda row: float(row["speedup_fa2"]))
    ours = float(best["speedup_fa2"])
    how = ", ".join(best[name] for name in ("precision", "mode") if best.get(name))
    note = f"{ours:.2f}x over FlashAttention2 in {best['device']} ({source}, {how}); the paper's GPU is an RTX 5090"
    return Cell(number, REPRODUCED if ours >= (1 - CLOSE) * number.value else DIFFERS, ours, note)


def attention_in_a_step(measured: list[dict], shape: str, sparsity: float) -> list[dict]:
    """Rows of steps, `speedup_fa2` being the time that FlashAttention2 adds to a step without attention over what SLA2 adds."""
    steps = {
        (row["device"], row["mode"], row["row"]): row
        for row in measured
        if row.get("part") == "denoising_step" and row["shape"] == shape
    }
    found = []
    for (device, mode, name), row in steps.items():
        dense, floor = (steps.get((device, mode, other)) for other in ("dense-fa2", "no-attention"))
        if name.startswith(f"sla2-{100 * sparsity:.0f}") and dense and floor:
            sparse_ms, dense_ms = (float(x["ms"]) - float(floor["ms"]) for x in (row, dense))
            found.append({**row, "speedup_fa2": dense_ms / sparse_ms})
    return found


def _quality(number: Number, study: dict | None) -> Cell:
    if study is None or not study["name"].lower().startswith(MODELS[number.model][4]):
        return Cell(number, CANNOT, None, QUALITY)
    if number.quantity == "vision_reward":
        sources = {"vision_reward": "the command of vision_reward"}
    else:
        sources = {f"{family}.{number.quantity}": by for family, by in MEASURED_BY.items()}
    row = variant_of(number)
    metric = next((name for name in sources if (row, name) in study["values"]), None)
    if metric is None:
        return Cell(number, CANNOT, None, f"study {study['name']} has no {' or '.join(sources)} of {row}")
    found = study["values"][row, metric]
    scale = 100 if number.unit == "x100" else 1
    mean, low, high = (None if value is None else scale * value for value in found)
    if low is None:
        return Cell(number, CANNOT, mean, "too few prompts for an interval")
    status = REPRODUCED if low <= number.value <= high else DIFFERS
    return Cell(
        number,
        status,
        mean,
        f"{mean:.4g} [{low:.4g}, {high:.4g}] by {sources[metric]}, on this study's prompts, not the paper's",
    )


def variant_of(number: Number) -> str:
    """The row of the sheet that a method of the paper is here."""
    if number.method == "Full":
        return "base"  # the paper's full attention was not fine-tuned
    percent = f"{100 * number.sparsity:.0f}"
    return {
        "SLA2 w/o QAT": f"sla2-{percent}-ptq",
        "SLA2 with top-k router": f"sla2-{percent}-topk",
    }.get(number.method, f"{number.method.lower()}-{percent}")


def read_measured(paths: Iterable[Path]) -> list[dict]:
    """Rows of `summary.csv` files, with the name of their folder as `device`.

    Raises:
        UserError: when one is missing.
    """
    rows = []
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; give summary.csv files of results/reference")
        with path.open(newline="", encoding="utf-8") as file:
            rows += [{**row, "device": path.parent.name} for row in csv.DictReader(file)]
    return rows


def write_cells(path: Path, cells: list[Cell]) -> None:
    """Write all cells as CSV."""
    text = io.StringIO()
    columns = [*asdict(cells[0].number), "status", "ours", "note"]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        ours = "" if cell.ours is None else f"{cell.ours:.6g}"
        writer.writerow(asdict(cell.number) | {"status": cell.status, "ours": ours, "note": cell.note})
    write_atomic(path, text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, nargs="*", default=[], help="summary.csv files with measured speeds")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    write_cells(args.output, compare(read_numbers(), read_measured(args.reference)))


if __name__ == "__main__":
    run_main(main)
