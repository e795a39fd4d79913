"""Paired differences to the reference, prompt by prompt with the same noise: what the verdicts are made of."""

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sla2.errors import run_main
from sla2_eval import plot
from sla2_eval.palette import style
from sla2_eval.table_set import TableSet

MARGIN = "#2e8b57"
COLUMNS = ("difference", "difference_low", "difference_high")


def draw(tables: TableSet) -> Figure:
    reference = tables.study["reference"]
    names = [name for name in tables.variants if name != reference]
    metrics = [
        m for m in tables.study["headline"] if any(r["difference"] is not None for r in tables.metric(m).values())
    ]
    if not metrics:
        figure, (ax,) = plot.panels(1, 1, 5, 3)
        plot.say_missing(ax, tables, tables.study["headline"][0])
        return figure
    figure, axes = plot.panels(len(metrics), 4, 2.7, 0.9 + 0.24 * len(names), sharey=True)
    plot.row_axes(axes, names)
    for ax, metric in zip(axes, metrics, strict=True):
        rows = tables.metric(metric)
        margin = tables.study["margins"].get(metric)
        if margin:
            ax.axvspan(-margin, margin, color=MARGIN, alpha=0.13, linewidth=0)
        plot.noise_change(ax, tables, metric)
        ax.axvline(0, color=style(reference).color, linewidth=0.8)
        beyond = plot.beyond_others(tables, rows, COLUMNS[0])
        for place, name in enumerate(names):
            if name == beyond:
                plot.mark_beyond(ax, rows[name], place, COLUMNS[0])
            elif name in rows and rows[name]["difference"] is not None:
                plot.point(ax, rows[name], place, along="x", names=COLUMNS, fillstyle=plot.fill(rows[name]))
            else:
                plot.mark_missing(ax, place)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_title(plot.metric_name(tables, metric))
        ax.set_xlabel(plot.with_unit(tables, metric, "mean difference"))
    shade = Patch(color=MARGIN, alpha=0.13, linewidth=0, label="equivalence margin")
    floors = [plot.change_legend()] if any(plot.change(tables, metric) for metric in metrics) else []
    plot.legend(figure, [*plot.fill_legend(reference), shade, *floors])
    return figure


if __name__ == "__main__":
    run_main(lambda: plot.run(draw, __doc__))
