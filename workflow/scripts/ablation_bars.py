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
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    axes[0].set_yticks(range(len(names)), [style(name).label for name in names])
    for ax, metric in zip(axes, metrics, strict=True):
        rows = tables.metric(metric)
        plot.entitle(ax, tables, metric)
        ax.grid(axis="y", visible=False)
        if not any(name in rows for name in names):
            ax.text(0.5, 0.5, "no value", transform=ax.transAxes, ha="center", va="center", color="#666666")
            continue
        if reference in rows:
            row = rows[reference]
            ax.axvline(row["mean"], color=style(reference).color, linewidth=0.8)
            if row["ci_low"] is not None:
                ax.axvspan(row["ci_low"], row["ci_high"], color=style(reference).color, alpha=0.08, linewidth=0)
        for place, name in enumerate(names):
            if name in rows:
                plot.point(ax, rows[name], place, along="x", fillstyle=plot.fill(rows[name]))
    figure.legend(handles=plot.fill_legend(reference), loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    run_main(lambda: plot.run(draw, __doc__))
