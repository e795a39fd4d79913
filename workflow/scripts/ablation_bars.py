"""The ablation: each headline metric with its interval, for every variant at the sparsity that most rows share."""

from collections import Counter

from matplotlib.figure import Figure

from sla2.errors import run_main
from sla2_eval import plot
from sla2_eval.palette import style
from sla2_eval.table_set import TableSet


def ablation_rows(tables: TableSet) -> list[str]:
    """Dense rows and those of the commonest sparsity (the higher one of two equally common)."""
    counts = Counter(row["sparsity"] for row in tables.variants.values() if row["sparsity"])
    shared = max(counts, key=lambda sparsity: (counts[sparsity], sparsity), default=0.0)
    return [name for name, row in tables.variants.items() if row["sparsity"] in (0.0, shared)]


def draw(tables: TableSet) -> Figure:
    names, metrics = ablation_rows(tables), tables.study["headline"]
    reference = tables.study["reference"]
    figure, axes = plot.panels(len(metrics), 4, 2.7, 0.9 + 0.24 * len(names), sharey=True)
    plot.row_axes(axes, names)
    for ax, metric in zip(axes, metrics, strict=True):
        rows = tables.metric(metric)
        plot.entitle(ax, tables, metric)
        ax.set_xlabel(plot.with_unit(tables, metric, "mean"))
        plot.noise_floor(ax, tables, metric, along="x")
        if reference in rows:
            row = rows[reference]
            ax.axvline(row["mean"], color=style(reference).color, linewidth=0.8)
            if row["ci_low"] is not None:
                ax.axvspan(row["ci_low"], row["ci_high"], color=style(reference).color, alpha=0.08, linewidth=0)
        beyond = plot.beyond_others(tables, {name: rows[name] for name in names if name in rows})
        for place, name in enumerate(names):
            if name == beyond:
                plot.mark_beyond(ax, rows[name], place)
            elif name in rows:
                plot.point(ax, rows[name], place, along="x", fillstyle=plot.fill(rows[name]))
            else:
                plot.mark_missing(ax, place)
    plot.legend(figure, [*plot.fill_legend(reference), *plot.floor_legend(tables, metrics)])
    return figure


if __name__ == "__main__":
    run_main(lambda: plot.run(draw, __doc__))
