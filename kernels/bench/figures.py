"""Figures from the tables of `measure.py`; needs matplotlib, no GPU.

    python kernels/bench/figures.py results/reference/kernels-h100

Writes effective_tflops, parts and lengths, as .svg and .png, beside the tables. The floor is drawn where provenance.json has the
GPU's ceilings.
"""

import argparse
import csv
import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("agg")
mpl.rcParams["svg.hashsalt"] = "sla2"  # the same tables give the same file
COLOURS = {"bf16": "#0072b2", "int8": "#e69f00", "fp8": "#d55e00", "int8-bf16": "#009e73"}
DENSE = {"fa2": ("FlashAttention2, dense", "#555555", "--"), "cudnn": ("cuDNN, dense", "#999999", ":")}
PARTS = ("pooling", "routing", "block states", "sum of states", "attention and mixing")


def read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("H", "N", "D", "sparsity", "ms", "ms_p20", "ms_p80", "effective_tflops"):
            row[name] = float(row[name])
    return rows


def floor_ms(ceilings: dict[str, float], H: float, N: float, D: float, sparsity: float) -> float:
    """Least time of the bf16 forward: arithmetic of both branches at the measured matrix rate, beside its traffic of memory.

    Traffic: Q, K, V read and O written once, K once more for its mean, h written and read, H written and read.
    """
    sparse = 4 * H * N * N * D * (1 - sparsity)
    linear = 2 * H * (N / 128) * (N / 64) * D * D + 4 * H * N * D * D
    traffic = 2 * H * D * (5 * N + 2 * D * (N / 64 + N / 128))
    return max((sparse + linear) / ceilings["matmul_tflops"] / 1e9, traffic / ceilings["copy_tbps"] / 1e9)


def effective(rows: list[dict], ceilings: dict[str, float] | None, output: Path) -> None:
    """Effective TFLOP/s against sparsity, with the dense baselines and, of a GPU with known ceilings, the floor."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, shape in zip(axes, ("1.3B-480p", "14B-720p"), strict=True):
        whole = [r for r in rows if r["shape"] == shape and r["part"] == "whole" and r["pass"] == "forward"]
        for name, (label, colour, dash) in DENSE.items():
            rate = next(r["effective_tflops"] for r in whole if r["implementation"] == name)
            axis.axhline(rate, color=colour, linestyle=dash, label=label)
            axis.annotate(f"{rate:.0f}", (0.85, rate), (0, 3), textcoords="offset points", fontsize=7, color=colour)
        ours = [r for r in whole if r["implementation"] == "sla2"]
        for precision, colour in COLOURS.items():
            points = sorted((r["sparsity"], r["effective_tflops"]) for r in ours if r["precision"] == precision)
            axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=f"sla2_attention, {precision}")
        if ceilings:
            H, N, D = (ours[0][name] for name in ("H", "N", "D"))
            grid = [0.85 + i * 0.005 for i in range(25)]
            rates = [4 * H * N * N * D / floor_ms(ceilings, H, N, D, s) / 1e9 for s in grid]
            axis.plot(grid, rates, color="black", lw=0.8, label="floor, bf16")
        axis.set(title=shape, xlabel="sparsity (fraction of key blocks skipped)", yscale="log")
    axes[0].set_ylabel("effective TFLOP/s (4 H N² D / time)")
    figure.legend(
        *axes[0].get_legend_handles_labels(), ncol=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.0)
    )
    save(figure, output / "effective_tflops")


def parts(rows: list[dict], output: Path) -> None:
    """Share of each step of the forward at 97%, each timed alone."""
    figure, axis = plt.subplots(figsize=(9, 2.6))
    shapes = ("14B-720p", "1.3B-480p")
    names = list(dict.fromkeys(r["part"] for r in rows if r["part"] in PARTS))
    left = dict.fromkeys(shapes, 0.0)
    for index, name in enumerate(names):
        times = {r["shape"]: r["ms"] for r in rows if r["part"] == name}
        totals = {s: sum(r["ms"] for r in rows if r["shape"] == s and r["part"] in names) for s in shapes}
        widths = [times[s] / totals[s] for s in shapes]
        bars = axis.barh(shapes, widths, left=[left[s] for s in shapes], color=plt.cm.tab10(index), label=name)
        axis.bar_label(bars, [f"{times[s]:.2f}" for s in shapes], label_type="center", fontsize=7, color="white")
        for s, width in zip(shapes, widths, strict=True):
            left[s] += width
    axis.set(
        xlabel="share of the steps of the forward at 97% sparsity, bf16, each timed alone (figures in ms)", xlim=(0, 1)
    )
    axis.legend(ncol=len(names), fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    save(figure, output / "parts")


def lengths(rows: list[dict], output: Path) -> None:
    """Time against N, 12 heads, 97% sparsity."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, D in zip(axes, (128, 64), strict=True):
        mine = [r for r in rows if r["shape"] == f"N{r['N']:.0f}-D{D}"]
        for by, precision, label, colour, dash in (
            ("fa2", "bf16", *DENSE["fa2"]),
            ("cudnn", "bf16", *DENSE["cudnn"]),
            ("sla2", "bf16", "sla2_attention, bf16", COLOURS["bf16"], "-"),
            ("sla2", "fp8", "sla2_attention, fp8", COLOURS["fp8"], "-"),
        ):
            points = sorted(
                (r["N"], r["ms"]) for r in mine if r["implementation"] == by and r["precision"] == precision
            )
            axis.plot(*zip(*points, strict=True), marker="o", ms=3, color=colour, linestyle=dash, label=label)
        ticks = sorted({r["N"] for r in mine})
        axis.set(title=f"D = {D}, 12 heads, 97% sparsity", xlabel="N (tokens)", xscale="log", yscale="log")
        axis.set_xticks(ticks, [f"{n / 1024:.0f}k" for n in ticks])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    axes[0].set_ylabel("forward, ms")
    save(figure, output / "lengths")


def save(figure, path: Path) -> None:
    figure.savefig(path.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), bbox_inches="tight", dpi=150, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where measurements.csv is and the figures go")
    folder = parser.parse_args().folder
    rows = read(folder / "measurements.csv")
    effective(rows, json.loads((folder / "provenance.json").read_text()).get("ceilings"), folder)
    parts(rows, folder)
    lengths(rows, folder)


if __name__ == "__main__":
    main()
