"""Attention error of each layer against dense attention on the same Q, K and V."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sla2.errors import run_main
from sla2_eval import plot
from sla2_eval.floors import DISTANCES, floor_of
from sla2_eval.palette import style
from sla2_eval.table_set import TableSet

PANELS = {
    "attention.rel_l1": "relative L1 error of the output ↓",
    "attention.cosine": "cosine with the dense output ↑",
    "attention.kept_mass": "softmax mass in the kept blocks ↑",
    "attention.alpha_error": "mean |α − kept mass| ↓",
}


def draw(tables: TableSet) -> Figure:
    layers = sorted({row["layer"] for row in tables.rows("attention") if row["layer"] is not None})
    metrics = [m for m in PANELS if any(tables.metric(m, layer) for layer in layers)] or list(PANELS)[:1]
    figure, axes = plot.panels(len(metrics), 2, 4.6, 2.7)
    shown: list[str] = []
    floored: list[str] = []
    for ax, metric in zip(axes, metrics, strict=True):
        ax.set_title(PANELS[metric])
        if not layers:
            plot.say_missing(ax, tables, metric)
            continue
        by_layer = {layer: tables.metric(metric, layer) for layer in layers}
        for name in tables.variants:
            points = [(layer, rows[name]["mean"]) for layer, rows in by_layer.items() if name in rows]
            if points:
                look = style(name)
                ax.plot(*zip(*points, strict=True), color=look.color, marker=look.marker, markersize=4.5, alpha=0.9)
                shown += [name] if name not in shown else []
        floors = [(layer, floor.mean) for layer in layers if (floor := floor_of(tables, metric, layer))]
        if metric in DISTANCES and floors:
            ax.plot(*zip(*floors, strict=True), linewidth=1.1, **plot.FLOOR_LINES[DISTANCES[metric][0]])
            floored.append(metric)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("layer")
    if shown:
        plot.legend(figure, [*plot.variant_handles(shown), *plot.floor_legend(tables, floored)])
    return figure


if __name__ == "__main__":
    run_main(lambda: plot.run(draw, __doc__))
