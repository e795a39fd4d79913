"""Routers of stage 1 against the heuristic, a random choice and the mass oracle."""

from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sla2.errors import run_main
from sla2.variant import LEARNED_ROUTERS, Variant
from sla2_eval import plot
from sla2_eval.palette import BLACK, style
from sla2_eval.table_set import TableSet

PANELS = {
    "hard_error": "hard relative squared error ↓",
    "kept_mass": "softmax mass in the kept blocks ↑",
    "oracle_overlap": "share of the mass oracle's blocks that are kept",
    "mask_concentration": "share of the soft mask in the hard choice",
}
LOGARITHMIC = ("hard_error", "kept_mass")


def looks(own: str) -> dict[tuple[str, str], Line2D]:
    """Colour, marker, dashes and name by router and alpha; a router has the colour of the row that routes so."""
    sla2, topk, random = style("sla2"), style("sla2-97-topk"), style("sla2-97-random")
    parts = {
        (own, "trained"): (sla2.color, sla2.marker, "-", f"{own}, its trained α"),
        (own, "fitted"): (sla2.color, "none", "--", f"{own}, α by least squares"),
        ("mean_pool", "fitted"): (topk.color, topk.marker, "--", "heuristic"),
        ("random", "fitted"): (random.color, random.marker, "--", "random"),
        ("oracle", "fitted"): (BLACK, "x", ":", "blocks of largest mass"),
    }
    return {
        key: Line2D([], [], color=color, marker=marker, linestyle=line, markersize=5, label=label)
        for key, (color, marker, line, label) in parts.items()
    }


def draw(tables: TableSet) -> Figure:
    runs: dict[str, Variant] = {}
    for row in tables.variants.values():
        variant = Variant.from_row({**row, "finetune": row["finetune"] == "yes"})
        if variant.stage1_group and variant.router in LEARNED_ROUTERS and variant.mixing == "alpha":
            runs.setdefault(variant.stage1_group, variant)
    own = next((variant.router for variant in runs.values()), "learned")
    runs = {group: variant for group, variant in runs.items() if variant.router == own}
    means: dict[tuple, list[float]] = {}
    for row in tables.rows("routers"):
        if row["run"] in runs and row["value"] is not None:
            key = row["metric"], row["router"], row["alpha"], runs[row["run"]].sparsity
            means.setdefault(key, []).append(row["value"])
    shown = [metric for metric in PANELS if any(key[0] == metric for key in means)] or ["hard_error"]
    figure, axes = plot.panels(len(shown), 2, 4.6, 2.9)
    handles = looks(own)
    for ax, metric in zip(axes, shown, strict=True):
        for (router, alpha), look in handles.items():
            if metric != "hard_error" and alpha != "fitted":
                continue
            wanted = metric, router, alpha if metric == "hard_error" else ""
            points = sorted((key[3], fmean(values)) for key, values in means.items() if key[:3] == wanted)
            if points:
                x, y = zip(*points, strict=True)
                marker = (
                    handles[own, "trained"].get_marker()
                    if metric != "hard_error" and router == own
                    else look.get_marker()
                )
                ax.plot(x, y, color=look.get_color(), marker=marker, linestyle=look.get_linestyle(), markersize=5)
        if not ax.lines:
            ax.text(0.5, 0.5, "no router was learned", transform=ax.transAxes, ha="center", color="#666666")
        elif metric in LOGARITHMIC:
            plot.logarithmic(ax)
        ax.set(title=PANELS[metric], xlabel="sparsity (fraction of key blocks skipped)")
        ax.set_xticks(sorted({variant.sparsity for variant in runs.values()}))
    plot.legend(figure, list(handles.values()))
    return figure


if __name__ == "__main__":
    run_main(lambda: plot.run(draw, __doc__))
