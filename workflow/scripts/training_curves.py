"""Training curves: the base model's parts, stage 1's hard error, stage 2's held-out loss."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sla2.errors import run_main
from sla2.variant import Variant
from sla2_eval import plot
from sla2_eval.palette import GREY, style
from sla2_eval.table_set import TableSet

LABELS = {"hard_error": "hard relative squared error", "loss": "diffusion loss"}
LINES = ("-", "--", ":", "-.")  # by training seed


def curves(rows: list[dict]) -> dict[tuple, tuple[np.ndarray, np.ndarray]]:
    """Steps and values by (run, training seed, split, metric)."""
    found: dict[tuple, list] = {}
    for row in rows:
        found.setdefault((row["run"], row["train_seed"], row["split"], row["metric"]), []).append(
            (row["step"], row["value"])
        )
    return {key: tuple(np.array(sorted(points)).T) for key, points in found.items()}


def smooth(values: np.ndarray) -> np.ndarray:
    """Running median over a twentieth of the curve: the noise of single batches hides its course."""
    width = max(1, len(values) // 20)
    return np.array([np.median(values[max(0, i - width) : i + width + 1]) for i in range(len(values))])


def base_panel(ax: Axes, rows: list[dict]) -> None:
    """One part of the base model: training loss, raw and smoothed, and what was measured on held-out clips."""
    for (_, _, split, metric), (steps, values) in curves(rows).items():
        if split == "train":
            ax.plot(steps, values, color=GREY, alpha=0.35, linewidth=0.6)
            ax.plot(steps, smooth(values), color=style("base").color, label=f"{metric}, training (running median)")
        else:
            ax.plot(steps, values, color=style("sla2").color, marker="o", markersize=4, label=f"{metric}, held out")
    ax.legend()
    if min(row["value"] for row in rows) > 0:
        plot.logarithmic(ax)


def run_panel(ax: Axes, rows: list[dict], metric: str, looks: dict[str, str]) -> list[str]:
    """Held-out curve of each run; `looks` gives the variant whose style a run takes. Returns those variants."""
    shown = []
    for (run, seed, split, name), (steps, values) in curves(rows).items():
        if split == "heldout" and name == metric and run in looks:
            look = style(looks[run])
            line = LINES[int(seed or 0) % len(LINES)]
            ax.plot(steps, values, color=look.color, marker=look.marker, markersize=4, linestyle=line, linewidth=1.1)
            shown.append(looks[run])
    return shown


def end_panel(ax: Axes, rows: list[dict], variants: list[str]) -> None:
    """Last held-out loss of each training run, side by side: curves that end within a hundredth of each other are one line."""
    for (run, _, split, name), (_, values) in curves(rows).items():
        if split == "heldout" and name == "loss" and run in variants:
            look = style(run)
            ax.plot(variants.index(run), values[-1], color=look.color, marker=look.marker, markersize=5, linestyle="")
    ax.set_xticks([])
    plot.logarithmic(ax)


def draw(tables: TableSet) -> Figure:
    training = tables.rows("training")
    phases = list(dict.fromkeys(row["phase"] for row in training if row["stage"] == "base_model"))
    groups: dict[str, str] = {}
    for name, row in tables.variants.items():
        group = Variant.from_row({**row, "finetune": row["finetune"] == "yes"}).stage1_group
        if group:
            groups.setdefault(group, name)
    stages = {
        "stage 1, held-out clips": ("stage1", "hard_error", groups),
        "stage 2, held-out clips (dashes: second training run)": ("stage2", "loss", {n: n for n in tables.variants}),
    }
    runs = {row["run"] for row in training if row["stage"] == "stage2"}
    tuned = [name for name in tables.variants if name in runs]
    figure, axes = plot.panels(len(phases) + len(stages) + bool(tuned), 2, 4.6, 2.9)
    for ax, phase in zip(axes, phases, strict=False):
        base_panel(ax, [row for row in training if row["stage"] == "base_model" and row["phase"] == phase])
        ax.set(title=f"base model: {phase}", xlabel="step", ylabel="value of the metric in the legend")
    shown: list[str] = []
    for ax, (title, (stage, metric, looks)) in zip(
        axes[len(phases) : len(phases) + len(stages)], stages.items(), strict=True
    ):
        drawn = run_panel(ax, [row for row in training if row["stage"] == stage], metric, looks)
        ax.set(title=title, xlabel="step", ylabel=LABELS[metric])
        if drawn:  # rows without alpha err ten times as much as the rest
            plot.logarithmic(ax)
        if not drawn:
            ax.text(0.5, 0.5, "nothing was trained", transform=ax.transAxes, ha="center", color="#666666")
        shown += drawn
    if tuned:
        end_panel(axes[-1], [row for row in training if row["stage"] == "stage2"], tuned)
        title, label = "stage 2, at the end: one mark a training run", "row, in the order of the legend"
        axes[-1].set(title=title, xlabel=label, ylabel=LABELS["loss"])
    order = [name for name in tables.variants if name in shown]
    if order:
        plot.legend(figure, plot.variant_handles(order))
    return figure


if __name__ == "__main__":
    run_main(lambda: plot.run(draw, __doc__))
